"""entropy on every sample, dtype and instruction set, against torch and float64; what it is; bad input."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from charlm import functional, reference
from charlm.testing import FLOAT_DTYPES, SampleInput, assert_matches_reference, sample_inputs_entropy

SAMPLES = [
    pytest.param(sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_entropy(dtype)
]


def _with_gradient(logits: Tensor) -> tuple[Tensor, Tensor]:
    leaf = logits.detach().requires_grad_()
    result = functional.entropy(leaf)
    return result.detach(), torch.autograd.grad(result.sum(), leaf)[0]


@pytest.mark.covering
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(sample: SampleInput, isa: str) -> None:
    assert_matches_reference(functional.entropy, reference.entropy, sample)


@pytest.mark.covering(2)
@pytest.mark.parametrize("n_classes", [1, 2, 27, 256, 4099])
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e30])
def test_equal_logits_have_the_log_of_their_number_and_no_gradient(n_classes: int, offset: float, isa: str) -> None:
    result, gradient = _with_gradient(torch.full((3, n_classes), offset))
    torch.testing.assert_close(result, torch.full((3,), math.log(n_classes)), rtol=1e-6, atol=0)
    assert not gradient.any()


@pytest.mark.parametrize("other", [-torch.inf, -3e38, -1000.0])
def test_a_certain_row_has_entropy_and_gradient_zero(other: float, isa: str) -> None:
    logits = torch.full((3, 129), other)
    logits[:, 100] = 0
    result, gradient = _with_gradient(logits)
    assert result.tolist() == [0, 0, 0]
    assert not gradient.any()


@pytest.mark.covering(2)
@pytest.mark.parametrize("n_classes", [5, 65, 4099])
@pytest.mark.parametrize(
    ("place", "value"), [(0, torch.nan), (-1, torch.nan), (3, torch.inf), (slice(None), -torch.inf)], ids=str
)
def test_only_a_row_without_a_softmax_is_nan(n_classes: int, place: Any, value: float, isa: str) -> None:
    logits = torch.randn(3, n_classes)
    logits[1, place] = value
    result, gradient = _with_gradient(logits)
    assert result.isnan().tolist() == reference.entropy(logits).isnan().tolist() == [False, True, False]
    assert gradient.isnan().any(-1).tolist() == [False, True, False]


def _layouts(n_rows: int, n_classes: int, dtype: torch.dtype) -> Iterator[Tensor]:
    """The same logits, as rows that are aligned to 16 bytes as often as they can be, or not, and that lie apart."""
    logits = (torch.randn(n_rows, n_classes) * 3).to(dtype)
    logits[:, ::5] = -torch.inf
    for stride, offset in (
        (n_classes, 0),
        (n_classes, 1),
        (n_classes + 1, 0),
        (n_classes + 16, 16),
        (n_classes + 16, 3),
    ):
        memory = torch.empty(n_rows * stride + offset, dtype=dtype)
        yield memory.as_strided((n_rows, n_classes), (stride, 1), offset).copy_(logits)


# Around the numbers of classes from which on the GPU gives a row more lanes, a block, and larger blocks.
BORDERS = [n + off for n in (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096) for off in (-1, 0, 1, 8)]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("n_classes", BORDERS)
def test_rows_of_any_length_and_alignment(n_classes: int, dtype: torch.dtype, isa: str) -> None:
    tolerance = {} if dtype in (torch.float32, torch.float64) else {"rtol": 1e-2, "atol": 1e-3}
    for logits in _layouts(5, n_classes, dtype):
        leaf = logits.double().requires_grad_()
        reference.entropy(leaf).sum().backward()
        result, gradient = _with_gradient(logits)
        torch.testing.assert_close(result, reference.entropy(leaf).detach().to(dtype), **tolerance)
        torch.testing.assert_close(gradient, leaf.grad.to(dtype), **tolerance)


@pytest.mark.parametrize("n_rows", [132, 133])
def test_few_long_rows_are_as_many_long_rows(n_rows: int, isa: str) -> None:
    logits = torch.randn(n_rows, 5000)
    result, gradient = _with_gradient(logits)
    torch.testing.assert_close(result, reference.entropy(logits))
    torch.testing.assert_close(gradient[:3], _with_gradient(logits[:3])[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [0, -1000, 1000, -1030, 1030, 30000, torch.finfo(torch.bfloat16).min])
@pytest.mark.parametrize("n_classes", [48, 2056, 4100])
def test_an_offset_costs_half_types_no_digits(dtype: torch.dtype, offset: float, n_classes: int, isa: str) -> None:
    logits = (torch.randn(3, n_classes) * 9 + max(offset, torch.finfo(dtype).min)).to(dtype)
    logits[:, 7] = -torch.inf
    leaf = logits.double().requires_grad_()
    expected = reference.entropy(leaf)
    (expected * 2).sum().backward()
    ours = logits.clone().requires_grad_()
    result = functional.entropy(ours)
    (result * 2).sum().backward()
    torch.testing.assert_close(result, expected.to(dtype), rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(ours.grad, leaf.grad.to(dtype), rtol=1e-2, atol=1e-3)


def test_derivatives_of_first_and_second_order() -> None:
    logits = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert gradcheck(functional.entropy, logits)
    assert gradgradcheck(functional.entropy, logits)


def test_it_is_the_entropy_that_cross_entropy_returns(isa: str) -> None:
    logits = torch.randn(33, 4099) * 5
    output = functional.cross_entropy(logits, torch.zeros(33, dtype=torch.int64), return_entropy=True)
    torch.testing.assert_close(functional.entropy(logits), output.entropy)


@pytest.mark.parametrize("n_classes", [5, 64, 5000])
def test_no_rows_have_no_entropy_and_no_gradient(n_classes: int, isa: str) -> None:
    result, gradient = _with_gradient(torch.zeros(0, n_classes))
    assert (result.shape, gradient.shape) == ((0,), (0, n_classes))


def test_an_empty_class_dimension_has_entropy_zero() -> None:
    assert functional.entropy(torch.zeros(3, 0)).tolist() == reference.entropy(torch.zeros(3, 0)).tolist() == [0, 0, 0]


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_what_are_no_logits_is_refused(module: Any) -> None:
    with pytest.raises(
        RuntimeError, match=r"logits must have a dimension of classes, shape \(..., V\), got a 0-d tensor"
    ):
        module.entropy(torch.tensor(1.0))
    with pytest.raises(NotImplementedError, match='"entropy" not implemented for'):
        module.entropy(torch.ones(3, 5, dtype=torch.int64))


def test_logits_changed_in_place_before_backward_raise() -> None:
    logits = torch.randn(3, 5, requires_grad=True) * 1
    result = functional.entropy(logits)
    logits.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        result.sum().backward()


def test_backward_refuses_a_state_or_gradient_of_another_call() -> None:
    logits, other = torch.randn(3, 5), torch.randn(4, 5)
    result, state = torch.ops.charlm.entropy(logits)
    with pytest.raises(RuntimeError, match="grad_output must have the shape and device of the entropies"):
        torch.ops.charlm._entropy_backward(torch.ones(4), logits, state)
    with pytest.raises(RuntimeError, match="state must be the one that entropy returned"):
        torch.ops.charlm._entropy_backward(result, logits, torch.ops.charlm.entropy(other)[1])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_autocast_computes_in_float32_like_torchs_log_softmax(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 5).to(dtype).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = functional.entropy(logits), reference.entropy(logits)
    assert ours.dtype == theirs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert logits.grad.dtype == dtype
