"""The kernels as part of a CUDA program: devices, streams, graphs, torch.compile, and nothing that waits.

`make gpu` runs this file with test_cuda.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gpu_support import ABOUT_10_MS, ON_GPU, assert_equal, call_and_inputs, every_call
from torch import Tensor

from charlm import functional

if not ON_GPU:
    pytest.skip("all of it needs a GPU", allow_module_level=True)

needs_two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def _logits() -> Tensor:
    return torch.randn(5, 27, device="cuda")


def _targets() -> Tensor:
    return torch.arange(5, device="cuda")


def _table() -> Tensor:
    return torch.randn(27, 10, device="cuda")


def _index() -> Tensor:
    return torch.ones(1, dtype=torch.int64, device="cuda")


@pytest.mark.parametrize(
    "call",
    [
        lambda: functional.embedding(_index(), torch.zeros(27, 10)),
        lambda: functional.embedding(torch.tensor([1]), _table()),
        lambda: functional.cross_entropy(_logits(), torch.tensor([0, 1, 2, 3, 4])),
        lambda: functional.cross_entropy(torch.zeros(5, 27), _targets()),
        lambda: functional.cross_entropy(_logits(), _targets(), torch.ones(27)),
        lambda: functional.cross_entropy(_logits(), _targets(), token_weight=torch.ones(5)),
    ],
    ids=["weight", "indices", "target", "logits", "class_weight", "token_weight"],
)
def test_a_tensor_that_is_left_on_the_cpu_is_a_runtime_error(call: Callable[[], object]) -> None:
    with pytest.raises(RuntimeError, match="device"):
        call()


@needs_two_gpus
@every_call
def test_tensors_on_another_device_than_the_current_one_are_computed_there(name: str) -> None:
    call, values, index = call_and_inputs(name, "cuda:1")
    expected = call(values.detach().to("cuda:0").requires_grad_(), index.to("cuda:0"))
    actual = call(values, index)
    assert torch.cuda.current_device() == 0
    assert {result.device for result in actual} == {torch.device("cuda:1")}
    assert_equal([result.to("cuda:0") for result in actual], expected)


@needs_two_gpus
def test_tensors_on_two_gpus_are_a_runtime_error() -> None:
    with pytest.raises(RuntimeError, match="device"):
        functional.embedding(_index().to("cuda:1"), _table())


@every_call
def test_kernels_run_on_the_current_stream(name: str) -> None:
    call, values, index = call_and_inputs(name)
    new = torch.randn_like(values)
    expected = call(new.requires_grad_(), index)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(ABOUT_10_MS)
        with torch.no_grad():
            values.copy_(new)  # what another stream would read is the old values
        actual = call(values, index)
    stream.synchronize()
    assert_equal(actual, expected)


@every_call
def test_forward_and_backward_do_not_wait_for_the_device(name: str) -> None:
    call, values, index = call_and_inputs(name)
    spare, expected = call(values, index), call(values, index)
    del spare  # memory that the call below need not ask the driver for
    torch.cuda.synchronize()
    slept = torch.cuda.Event()
    torch.cuda.set_sync_debug_mode("error")  # sees torch's own waiting; the event sees any
    try:
        torch.cuda._sleep(20 * ABOUT_10_MS)
        slept.record()
        actual = call(values, index)
        assert not slept.query(), "the call returned only when the device had caught up"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert_equal(actual, expected)


@every_call
def test_a_captured_graph_replays_on_new_values(name: str) -> None:
    call, values, index = call_and_inputs(name)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call(values, index)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call(values, index)
    for _ in range(2):
        with torch.no_grad():
            values.normal_()
            index.copy_(index.flip(0))
        graph.replay()
        assert_equal(captured, call(values, index))


@pytest.mark.parametrize("vocab_size", [27, 4099])
def test_reduce_overhead_replays_a_graph_with_the_gradients_of_eager(vocab_size: int) -> None:
    pytest.importorskip("triton", reason="torch.compile on a GPU needs triton")

    def loss_of(weight: Tensor, index: Tensor) -> Tensor:
        return functional.cross_entropy(functional.embedding(index[:-1], weight), index[1:])

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(loss_of, mode="reduce-overhead", fullgraph=True)
    weight = torch.randn(vocab_size, vocab_size, device="cuda", requires_grad=True)
    for _ in range(4):
        index = torch.randint(vocab_size, (258,), device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        (gradient,) = torch.autograd.grad(compiled(weight, index), weight)
        (expected,) = torch.autograd.grad(loss_of(weight, index), weight)
        torch.testing.assert_close(gradient, expected)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
