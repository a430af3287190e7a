"""torch.compile, torch.export and fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounter
from torch._functorch.aot_autograd import make_boxed_func
from torch._subclasses.fake_tensor import FakeTensorMode

import charlm
from charlm import functional
from charlm.testing import (
    SampleInput,
    evaluate,
    sample_inputs_cross_entropy,
    sample_inputs_embedding,
    sample_inputs_entropy,
    sample_inputs_kl_divergence,
    sample_inputs_surprisal,
)

SAMPLES = {
    functional.cross_entropy: list(sample_inputs_cross_entropy(torch.float32)),
    functional.embedding: list(sample_inputs_embedding(torch.float32)),
    functional.entropy: list(sample_inputs_entropy(torch.float32)),
    functional.kl_divergence: list(sample_inputs_kl_divergence(torch.float32)),
    functional.surprisal: list(sample_inputs_surprisal(torch.float32)),
}
COMPILED_SAMPLES = {
    "names_batch",
    "all_extras",
    "probabilities_all_extras",
    "classes_last_in_memory",
    "empty_batch_mean",
    "uint8_targets",
    "names",
    "max_norm",
    "negative_padding_idx",
    "scale_grad_by_freq_padding",
    "uint8_index",
    "probs_logits",
    "outer",
}
CALLS_TO_COMPILE = [
    pytest.param(function, sample, id=f"{function.__name__}-{sample.name}")
    for function, samples in SAMPLES.items()
    for sample in samples
    if sample.name in COMPILED_SAMPLES
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    torch._dynamo.reset()


@pytest.mark.covering
@pytest.mark.parametrize(("function", "sample"), CALLS_TO_COMPILE)
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compiled_without_a_graph_break_results_equal_eager(
    function: Callable[..., Any], sample: SampleInput, dynamic: bool
) -> None:
    compiled = torch.compile(function, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    actual, expected = evaluate(compiled, sample), evaluate(function, sample)
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], equal_nan=True)


class Bigram(torch.nn.Module):
    """The smallest model with both ops: tokens in, loss out."""

    def __init__(self, **loss_options: Any) -> None:
        super().__init__()
        self.table = charlm.nn.Embedding(27, 27)
        self.loss = charlm.nn.CrossEntropyLoss(**loss_options)

    def forward(self, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return self.loss(self.table(tokens), target)


def _compile_and_list_ops(model: torch.nn.Module) -> tuple[list[str], list[str]]:
    """Runs a model under torch.compile; the ops of its forward and of its backward graph."""
    graphs: list[list[str]] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(torch.randint(27, (33,)), torch.randint(27, (33,))).backward()
    forward, backward = graphs
    return forward, backward


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1, "softcap": 5.0, "lse_square_scale": 0.1}], ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_compiled_graphs_hold_our_ops_and_not_torchs_formula(options: dict[str, Any], autocast: bool) -> None:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        forward, backward = _compile_and_list_ops(Bigram(**options))
    assert {"charlm.embedding.default", "charlm.cross_entropy.default"} <= set(forward)
    assert {"charlm._embedding_backward.default", "charlm._cross_entropy_backward.default"} <= set(backward)
    assert not [name for name in forward + backward if "softmax" in name or "nll_loss" in name]


def test_inductor_trains_a_model_like_eager() -> None:
    tokens, target = torch.randint(27, (33,)), torch.randint(27, (33,))
    gradients = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model = Bigram(lse_square_scale=0.1)
        step = torch.compile(model, fullgraph=True) if compile_it else model
        step(tokens, target).backward()
        gradients.append(model.table.weight.grad)
    torch.testing.assert_close(*gradients)


def test_a_dynamic_batch_compiles_once() -> None:
    counter = CompileCounter()
    compiled = torch.compile(functional.cross_entropy, fullgraph=True, dynamic=True, backend=counter)
    for n in (5, 17, 33):
        logits, target = torch.randn(n, 27), torch.randint(27, (n,))
        torch.testing.assert_close(compiled(logits, target), F.cross_entropy(logits, target))
    assert counter.frame_count == 1


def test_a_bad_target_raises_index_error_when_compiled() -> None:
    compiled = torch.compile(functional.cross_entropy, fullgraph=True, backend="aot_eager")
    with pytest.raises(IndexError, match=r"target 27 at position \(1,\) is out of range for 27 classes"):
        compiled(torch.randn(2, 27), torch.tensor([0, 27]))


def test_an_exported_model_of_dynamic_batch_runs_our_ops_with_the_same_result() -> None:
    model = Bigram(return_lse=False)
    batch = torch.export.Dim("batch", min=2, max=1024)
    program = torch.export.export(
        model,
        (torch.randint(27, (33,)), torch.randint(27, (33,))),
        dynamic_shapes={"tokens": {0: batch}, "target": {0: batch}},
    )
    ops = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert {"charlm.embedding.default", "charlm.cross_entropy.default"} <= ops
    tokens, target = torch.randint(27, (65,)), torch.randint(27, (65,))
    torch.testing.assert_close(program.module()(tokens, target), model(tokens, target))
    assert {"charlm.embedding.default", "charlm.cross_entropy.default"} <= {
        str(node.target) for node in program.run_decompositions().graph.nodes if node.op == "call_function"
    }


def _results_of_fake_and_real_tensors(function: Callable[..., Any], sample: SampleInput) -> tuple[list[Tensor], ...]:
    arguments = dict(sample.arguments)
    for name in sample.differentiable:
        arguments[name] = arguments[name].detach().requires_grad_()

    def outputs(arguments: dict[str, Any]) -> list[Tensor]:
        result = function(**arguments)
        results = [value for value in result if value is not None] if isinstance(result, tuple) else [result]
        if arguments.get("sparse"):
            return results  # as in torch, how many entries a sparse gradient has depends on the indices
        leaves = [arguments[name] for name in sample.differentiable]
        return [*results, *torch.autograd.grad(results[0].sum(), leaves)]

    expected = outputs(arguments)
    with FakeTensorMode() as mode:
        fake = {
            name: mode.from_tensor(value) if isinstance(value, Tensor) else value for name, value in arguments.items()
        }
        actual = outputs(fake)
    return actual, expected


@pytest.mark.parametrize("function", SAMPLES, ids=lambda function: function.__name__)
def test_fake_tensors_have_the_shape_dtype_and_strides_of_real_ones(function: Callable[..., Any]) -> None:
    for sample in SAMPLES[function]:
        actual, expected = _results_of_fake_and_real_tensors(function, sample)
        assert len(actual) == len(expected), sample.name
        for ours, real in zip(actual, expected, strict=True):
            assert (ours.shape, ours.dtype, ours.stride()) == (real.shape, real.dtype, real.stride()), sample.name


def test_meta_tensors_are_accepted() -> None:
    loss = functional.cross_entropy(torch.randn(3, 5, device="meta"), torch.zeros(3, device="meta").long())
    assert (loss.device.type, loss.shape) == ("meta", ())
    output = functional.embedding(torch.zeros(3, device="meta").long(), torch.randn(5, 2, device="meta"))
    assert (output.device.type, output.shape) == ("meta", (3, 2))


def test_a_traced_fx_graph_of_the_modules_runs_like_them() -> None:
    model = Bigram()
    traced = torch.fx.symbolic_trace(model)
    tokens, target = torch.randint(27, (33,)), torch.randint(27, (33,))
    assert torch.equal(traced(tokens, target), model(tokens, target))


def test_code_compiled_under_patch_torch_returns_to_torch_afterwards() -> None:
    logits, target = torch.randn(33, 27), torch.randint(27, (33,))
    ops: list[str] = []

    def keep(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        ops.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph)

    def loss(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(x, y)

    compiled = torch.compile(loss, backend=aot_autograd(fw_compiler=keep))
    with charlm.patch_torch():
        compiled(logits, target)
        assert any("charlm.cross_entropy" in op for op in ops)
    ops.clear()
    compiled(logits, target)
    assert ops
    assert not any("charlm" in op for op in ops)
