"""kl_div: torch's function, on every sample, dtype and instruction set."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import charlm
from charlm import functional, nn, reference
from charlm.testing import FLOAT_DTYPES, assert_matches_reference, sample_inputs_kl_div

pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")

SAMPLES = [
    pytest.param(dtype, sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_kl_div(dtype)
]
P, Q = torch.tensor([[0.36, 0.48, 0.16], [0.1, 0.2, 0.7]]), torch.full((2, 3), 1 / 3)


def gradients(op: Any, input: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    leaves = input.detach().clone().requires_grad_(), target.detach().clone().requires_grad_()
    result = op(*leaves, **options)
    (result.sum() * 1.5).backward()
    return result.detach(), leaves[0].grad, leaves[1].grad


@pytest.mark.covering
@pytest.mark.parametrize(("dtype", "sample"), SAMPLES)
def test_every_sample_is_as_close_to_float64_as_torch(dtype: torch.dtype, sample: Any, isa: str) -> None:
    assert_matches_reference(functional.kl_div, reference.kl_div, sample)


@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_the_call_of_torchs_documentation_gives_torchs_result(reduction: str) -> None:
    result = functional.kl_div(Q.log(), P, reduction=reduction)
    torch.testing.assert_close(result, F.kl_div(Q.log(), P, reduction=reduction))
    if reduction == "batchmean":  # KL(P || Q) of the rows, by hand
        by_hand = sum(p * (torch.tensor(p) * 3).log() for row in P.tolist() for p in row) / 2
        torch.testing.assert_close(result, by_hand)


@pytest.mark.parametrize("log_target", [False, True])
def test_numbers_at_the_ends_of_their_range_give_what_torch_gives(log_target: bool, isa: str) -> None:
    inf, nan = torch.inf, torch.nan
    x = torch.tensor([0, -inf, -1.0, nan, 1.0, inf, -90.0])
    t = torch.tensor([0, 1.0, 0.5, -0.5, inf, nan, 1e-37, -inf, -100.0, 3.0])
    pairs = x[:, None].expand(7, 10), t.expand(7, 10)
    options = {"reduction": "none", "log_target": log_target}
    for ours, theirs in zip(
        gradients(functional.kl_div, *pairs, **options), gradients(F.kl_div, *pairs, **options), strict=True
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("reduction", ["none", "mean", "batchmean", "sum"])
def test_no_elements_give_what_torch_gives(shape: tuple[int, ...], reduction: str) -> None:
    empty = torch.zeros(shape)
    for ours, theirs in zip(
        gradients(functional.kl_div, empty, empty, reduction=reduction),
        gradients(F.kl_div, empty, empty, reduction=reduction),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


@pytest.mark.parametrize("first", FLOAT_DTYPES)
@pytest.mark.parametrize("second", FLOAT_DTYPES)
def test_dtypes_are_promoted_as_torch_promotes_them(first: torch.dtype, second: torch.dtype) -> None:
    arguments = Q.log().to(first), P.to(second)
    result = functional.kl_div(*arguments, reduction="sum")
    expected = F.kl_div(*arguments, reduction="sum")
    assert result.dtype == expected.dtype
    torch.testing.assert_close(result, expected, rtol=2e-2, atol=2e-2)


def test_integer_tensors_are_refused_as_torch_refuses_them() -> None:
    for op in (functional.kl_div, F.kl_div):
        with pytest.raises(RuntimeError, match="Integral inputs not supported"):
            op(Q.log(), torch.tensor([[1, 0, 0]]), reduction="sum")


def test_the_deprecated_arguments_and_warnings_are_torchs() -> None:
    with pytest.warns(UserWarning, match="size_average and reduce"):
        assert functional.kl_div(Q.log(), P, size_average=False).item() == pytest.approx(
            functional.kl_div(Q.log(), P, reduction="sum").item()
        )
    with pytest.warns(UserWarning, match="^reduction: 'mean' divides the total loss by both"):
        functional.kl_div(Q.log(), P)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        functional.kl_div(Q.log(), P, reduction="batchmean")
        functional.kl_div(Q.log(), P, reduction="sum")
    with pytest.raises(ValueError, match="average is not a valid value for reduction"):
        functional.kl_div(Q.log(), P, reduction="average")


@pytest.mark.parametrize("op", [F.kl_div, functional.kl_div, reference.kl_div])
def test_the_warning_of_mean_names_the_line_that_calls(op: Any) -> None:
    for input in (Q.log(), Q.log().to_sparse() if op is functional.kl_div else Q.log()):  # left to the reference
        with pytest.warns(UserWarning, match="^reduction: 'mean' divides") as caught, contextlib.suppress(RuntimeError):
            op(input, P)
        assert caught[0].filename == __file__


@pytest.mark.parametrize("reduction", ["mean", "batchmean", "sum", "none"])
@pytest.mark.parametrize("how", ["jit.trace", "make_fx"])
def test_a_trace_holds_for_other_sizes(how: str, reduction: str) -> None:
    def call(input: Tensor, target: Tensor) -> Tensor:
        return functional.kl_div(input, target, reduction=reduction)

    def pair(n: int) -> tuple[Tensor, Tensor]:
        return torch.randn(n, 4).log_softmax(1), torch.randn(n, 4).softmax(1)

    traced = torch.jit.trace(call, pair(5)) if how == "jit.trace" else make_fx(call, tracing_mode="symbolic")(*pair(5))
    other = pair(9)
    torch.testing.assert_close(traced(*other), F.kl_div(*other, reduction=reduction))


@pytest.mark.filterwarnings("ignore:size_average and reduce")
@pytest.mark.parametrize("legacy", [{"size_average": False}, {"size_average": True}, {"reduce": False}])
def test_deprecated_arguments_beside_batchmean_divide_by_the_batch_too(legacy: dict[str, bool]) -> None:
    ours, theirs = (op(Q.log(), P, reduction="batchmean", **legacy) for op in (functional.kl_div, F.kl_div))
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("first", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("second", [torch.float64, torch.float32])
def test_a_number_promotes_no_tensor_as_in_torch(first: torch.dtype, second: torch.dtype) -> None:
    for pair in ((Q.log().to(first), torch.tensor(0.5, dtype=second)), (torch.tensor(-1.0, dtype=second), P.to(first))):
        ours, theirs = (op(*pair, reduction="none") for op in (functional.kl_div, F.kl_div))
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-2)


def test_the_default_reduction_compiles_as_one_graph() -> None:
    torch.testing.assert_close(
        torch.compile(nn.KLDivLoss(), backend="aot_eager", fullgraph=True)(Q.log(), P), F.kl_div(Q.log(), P)
    )


@pytest.mark.parametrize("keyword", ["p_kind", "q_kind"])
def test_the_keywords_of_kl_divergence_are_refused_with_its_name(keyword: str) -> None:
    with pytest.raises(TypeError, match="kl_divergence"):
        functional.kl_div(P, Q, **{keyword: "probs"})


def test_what_is_no_tensor_or_no_bool_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="argument 'target' must be Tensor, not list"):
        functional.kl_div(P, [1.0])
    with pytest.raises(TypeError, match="argument 'log_target' must be bool, not int"):
        functional.kl_div(P, Q, log_target=1)
    with pytest.raises(RuntimeError):
        functional.kl_div(P, torch.ones(4), reduction="sum")


def test_an_input_that_holds_no_log_probabilities_warns_once() -> None:
    code = """
import torch, warnings, charlm.functional as F
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    F.kl_div(torch.tensor([-0.5, 1e-7]), torch.ones(2), reduction="sum")  # within rounding
    assert not caught, caught
    for _ in range(3):
        F.kl_div(torch.tensor([-0.5, 0.5]), torch.ones(2), reduction="sum")
assert [w.category for w in caught] == [UserWarning], caught
assert "log_softmax" in str(caught[0].message)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_double_backward_and_functorch_use_torchs_formula() -> None:
    x, t = Q.log().double().requires_grad_(), P.double().requires_grad_()
    for options in ({"reduction": "sum"}, {"reduction": "none"}, {"reduction": "batchmean", "log_target": True}):
        torch.autograd.gradgradcheck(lambda x, t, options=options: functional.kl_div(x, t, **options), (x, t))
    ours, theirs = (
        torch.func.vmap(torch.func.grad(lambda x, t, f=f: f(x, t, reduction="sum"), argnums=(0, 1)))(x, t)
        for f in (functional.kl_div, F.kl_div)
    )
    torch.testing.assert_close(ours, theirs)
    primals, tangents = (Q.log(), P), (P, Q)
    ours, theirs = (
        torch.func.jvp(lambda x, t, f=f: f(x, t, reduction="batchmean"), primals, tangents)
        for f in (functional.kl_div, F.kl_div)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_loss_is_float32_like_torchs(dtype: torch.dtype) -> None:
    with torch.autocast("cpu", dtype=dtype):
        ours, theirs = (f(Q.log().to(dtype), P.to(dtype), reduction="sum") for f in (functional.kl_div, F.kl_div))
    assert ours.dtype == theirs.dtype == torch.float32
    torch.testing.assert_close(ours, theirs)


def test_compiled_with_dynamic_sizes_and_checked_by_torch() -> None:
    compiled = torch.compile(
        lambda x, t: functional.kl_div(x, t, reduction="batchmean"), backend="aot_eager", fullgraph=True, dynamic=True
    )
    for rows in (2, 5):
        x, t = torch.randn(rows, 27).log_softmax(1), torch.randn(rows, 27).softmax(1)
        torch.testing.assert_close(compiled(x, t), F.kl_div(x, t, reduction="batchmean"))
    for reduce in (True, False):
        arguments = (Q.log().requires_grad_(), P.clone().requires_grad_(), False, reduce, 2)
        torch.library.opcheck(torch.ops.charlm.pointwise_kl_div.default, arguments)


def test_results_have_the_same_bits_for_any_number_of_threads() -> None:
    x, t = torch.randn(999, 257).log_softmax(1), torch.randn(999, 257).softmax(1)
    found = torch.get_num_threads()
    try:
        results = []
        for n_threads in (1, 2, 3):
            torch.set_num_threads(n_threads)
            results.append(gradients(functional.kl_div, x, t, reduction="sum"))
    finally:
        torch.set_num_threads(found)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("log_target", [False, True])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 1023, 4096, 4099, 8192 + 7, 3 * 8192 + 5])
def test_tensors_of_any_length_and_alignment(n: int, log_target: bool, dtype: torch.dtype, isa: str) -> None:
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-3}
    )
    x, t = torch.randn(n) - 3, torch.rand(n) + 0.1
    for offsets in ((0, 0), (1, 1), (0, 3), (5, 5)):
        pair = [torch.cat([torch.ones(off), y]).to(dtype)[off:] for off, y in zip(offsets, (x, t), strict=True)]
        for reduction in ("none", "sum"):
            options = {"reduction": reduction, "log_target": log_target}
            expected = gradients(F.kl_div, pair[0].double(), pair[1].double(), **options)
            for ours, theirs in zip(gradients(functional.kl_div, *pair, **options), expected, strict=True):
                torch.testing.assert_close(ours, theirs.to(dtype), **tolerance)
            leaf = pair[0].clone().requires_grad_()
            functional.kl_div(leaf, pair[1], **options).sum().backward()
            torch.testing.assert_close(leaf.grad * 1.5, expected[1].to(dtype), **tolerance)


def test_the_module_and_both_patches_use_the_kernel() -> None:
    x, t = Q.log(), P
    expected = F.kl_div(x, t, reduction="batchmean")
    module = charlm.patch_model(torch.nn.KLDivLoss(reduction="batchmean"))
    assert type(module) is nn.KLDivLoss
    torch.testing.assert_close(module(x, t), expected)
    torch.testing.assert_close(nn.KLDivLoss(reduction="batchmean", log_target=True)(x, t.log()), expected)
    with charlm.patch_torch():
        assert F.kl_div is functional.kl_div
        torch.testing.assert_close(torch.nn.KLDivLoss(reduction="batchmean")(x, t), expected)
    assert F.kl_div is not functional.kl_div
