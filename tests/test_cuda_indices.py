"""Indices out of range on a GPU: recorded where they are met, raised later, and never the end of the context.

`make gpu` runs this file with test_cuda.py.
"""

from __future__ import annotations

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from gpu_support import ABOUT_10_MS, ON_GPU, assert_equal, embedding_and_gradient
from torch import Tensor

import charlm
from charlm import functional

if not ON_GPU:
    pytest.skip("all of it needs a GPU", allow_module_level=True)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """The same random numbers for every test, and no index error that another one left behind."""
    torch.manual_seed(0)
    yield
    with contextlib.suppress(IndexError):
        charlm.synchronize()


def on_gpu(values: list[int] | list[list[int]], dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype).cuda()


def run_python(code: str, **env: str) -> str:
    """What a python of its own prints: one whose context may die."""
    result = subprocess.run(
        [sys.executable, "-c", f"import torch, charlm\nfrom charlm import functional\n{code}"],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


TARGETS, INDICES = [0, 1, 2, 27, 3], [[0, 1, 27], [3, 4, 5]]
TARGET_SENTENCE = r"target 27 at position \(3,\) is out of range for 27 classes"
INDEX_SENTENCE = r"index 27 at position \(0, 2\) is out of range for 27 embeddings"


def _logits(**options: bool) -> Tensor:
    return torch.randn(5, 27, device="cuda", **options)


def _table(**options: bool) -> Tensor:
    return torch.randn(27, 10, device="cuda", **options)


def _layer_and_gradient(plan: str) -> None:
    table, weight = _table(requires_grad=True), torch.randn(20, 30, device="cuda", requires_grad=True)
    functional.embedding_linear(on_gpu(INDICES), table, weight, activation="tanh", plan=plan).sum().backward()


BAD_CALLS: dict[str, tuple[Callable[[], object], str]] = {
    "loss": (lambda: functional.cross_entropy(_logits(), on_gpu(TARGETS)), TARGET_SENTENCE),
    "loss_and_gradient": (
        lambda: functional.cross_entropy(_logits(requires_grad=True), on_gpu(TARGETS)).backward(),
        TARGET_SENTENCE,
    ),
    "loss_of_each": (
        lambda: functional.cross_entropy(_logits(), on_gpu(TARGETS), reduction="none"),
        TARGET_SENTENCE,
    ),
    "in_place": (
        lambda: functional.cross_entropy(_logits(requires_grad=True) * 2, on_gpu(TARGETS), inplace="forward"),
        TARGET_SENTENCE,
    ),
    "metrics": (
        lambda: functional.cross_entropy(_logits(), on_gpu(TARGETS), return_token_accuracy=True),
        TARGET_SENTENCE,
    ),
    "long_row": (
        lambda: functional.cross_entropy(torch.randn(1, 70_001, device="cuda"), on_gpu([70_001])),
        r"target 70001 at position \(0,\) is out of range for 70001 classes",
    ),
    "target_that_wraps_to_minus_100": (
        lambda: functional.cross_entropy(_logits()[:2], on_gpu([0, 156], torch.uint8)),
        r"target 156 at position \(1,\) is out of range for 27 classes",
    ),
    "target_beyond_int64": (
        lambda: functional.cross_entropy(_logits()[:2], on_gpu([0, 2**64 - 100], torch.uint64)),
        rf"target {2**64 - 100} at position \(1,\)",
    ),
    "index": (lambda: functional.embedding(on_gpu(INDICES), _table()), INDEX_SENTENCE),
    "negative_index": (
        lambda: functional.embedding(on_gpu([-1]), _table()),
        r"index -1 at position \(0,\) is out of range for 27 embeddings",
    ),
    "index_and_gradient": (
        lambda: functional.embedding(on_gpu(INDICES), _table(requires_grad=True)).sum().backward(),
        INDEX_SENTENCE,
    ),
    **{
        f"{plan}_layer_and_gradient": (functools.partial(_layer_and_gradient, plan), INDEX_SENTENCE)
        for plan in ("folded", "gathered")
    },
}
every_bad_call = pytest.mark.parametrize("name", BAD_CALLS)


@every_bad_call
def test_a_bad_index_is_raised_once_by_synchronize_at_the_latest_and_the_context_survives(name: str) -> None:
    call, sentence = BAD_CALLS[name]
    with pytest.raises(IndexError, match=sentence):  # noqa: PT012
        call()  # of several ops a later one may know of the index already
        charlm.synchronize()
    charlm.synchronize()
    assert torch.ones(3, device="cuda").sum().item() == 3
    assert functional.embedding(on_gpu([1]), _table()).shape == (1, 10)


@pytest.mark.parametrize(
    ("op", "values", "indices", "sentence"),
    [
        (functional.cross_entropy, _logits, TARGETS, TARGET_SENTENCE),
        (lambda table, index: functional.embedding(index, table), _table, INDICES, INDEX_SENTENCE),
    ],
    ids=["cross_entropy", "embedding"],
)
def test_a_bad_index_is_not_waited_for(
    op: Callable[..., Tensor], values: Callable[[], Tensor], indices: list[int], sentence: str
) -> None:
    given = values(), on_gpu(indices)
    torch.cuda._sleep(20 * ABOUT_10_MS)
    op(*given)
    done = torch.cuda.Event()
    done.record()
    assert not done.query()
    with pytest.raises(IndexError, match=sentence):
        charlm.synchronize()


@every_bad_call
def test_a_bad_index_is_raised_by_the_next_op_on_the_device(name: str) -> None:
    call, sentence = BAD_CALLS[name]
    with pytest.raises(IndexError, match=sentence):  # noqa: PT012
        call()
        torch.cuda.synchronize()
        functional.embedding(on_gpu([1]), _table())
    functional.embedding(on_gpu([1]), _table())
    charlm.synchronize()


def test_a_bad_target_changes_no_other_row() -> None:
    logits, target, is_good = _logits(requires_grad=True), on_gpu(TARGETS), on_gpu(TARGETS) != 27

    def losses_and_gradient(target: Tensor) -> list[Tensor]:
        losses = functional.cross_entropy(logits, target, reduction="none")
        return [losses.detach(), *torch.autograd.grad(losses.sum(), logits)]

    expected = losses_and_gradient(target % 27)
    torch.cuda._sleep(20 * ABOUT_10_MS)  # the backward is launched before the forward has found the target
    actual = losses_and_gradient(target)
    with pytest.raises(IndexError, match=TARGET_SENTENCE):
        charlm.synchronize()
    assert_equal([result[is_good] for result in actual], [result[is_good] for result in expected])


def test_a_bad_index_changes_no_other_row_of_output_or_gradient() -> None:
    weight, index, is_good = _table(requires_grad=True), on_gpu(TARGETS), on_gpu(TARGETS) != 27
    embedding_and_gradient(weight, index % 27)
    torch.cuda._sleep(20 * ABOUT_10_MS)
    output, gradient = embedding_and_gradient(weight, index)
    with pytest.raises(IndexError, match=r"index 27 at position \(3,\)"):
        charlm.synchronize()
    assert_equal([output[is_good]], [weight[index[is_good]]])
    assert_equal(
        [gradient[:4], gradient[4:]], [weight[:4], torch.zeros_like(weight[4:])]
    )  # the cotangent is the output


def test_with_the_check_on_the_call_itself_raises() -> None:
    code = """
for call in (
    lambda: functional.cross_entropy(torch.zeros(5, 27).cuda(), torch.tensor([0, 1, 2, 27, 3]).cuda()),
    lambda: functional.embedding(torch.tensor([[0, 1, 27]]).cuda(), torch.zeros(27, 10).cuda()),
):
    try:
        call()
    except IndexError as error:
        print(error)
"""
    printed = run_python(code, CHARLM_CUDA_CHECK="1")
    assert "target 27 at position (3,) is out of range for 27 classes" in printed
    assert "index 27 at position (0, 2) is out of range for 27 embeddings" in printed


def test_a_bad_index_with_max_norm_does_not_kill_the_context() -> None:
    code = """
weight = torch.ones(7, 10).cuda()
try:
    functional.embedding(torch.tensor([[0, 1], [2, 7]]).cuda(), weight, max_norm=1.0)
    charlm.synchronize()
except IndexError as error:
    print(error)
print(weight.isfinite().all().item())
"""
    printed = run_python(code)
    assert "index 7 at position (1, 1) is out of range for 7 embeddings" in printed
    assert "True" in printed


def test_a_bad_index_in_a_replayed_graph_is_reported() -> None:
    weight, index = _table(), on_gpu([1, 2, 3])
    functional.embedding(index, weight)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        functional.embedding(index, weight)
    index[1] = 27
    graph.replay()
    with pytest.raises(IndexError, match=r"index 27 at position \(1,\) is out of range for 27 embeddings"):
        charlm.synchronize()
