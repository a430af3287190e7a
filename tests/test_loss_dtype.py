"""loss_dtype of both losses, and a class weight of another dtype than half logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_support import arguments
from torch import Tensor

from charlm import functional, reference


def logits_and_target(n: int = 40) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(n, 27), torch.arange(n) * 7 % 27


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_float32_loss_of_half_logits_is_not_rounded(reduction: str, dtype: torch.dtype) -> None:
    x, target = logits_and_target(2000)
    half, weight = x.to(dtype).requires_grad_(), (torch.randn(27, 27) / 8).to(dtype)
    loss = functional.cross_entropy(half, target, reduction=reduction, loss_dtype=torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(half.float(), target, reduction=reduction))
    (ours,) = torch.autograd.grad(loss.sum(), half)
    (theirs,) = torch.autograd.grad(F.cross_entropy(half.float(), target, reduction=reduction).sum(), half)
    torch.testing.assert_close(ours, theirs)
    linear = functional.linear_cross_entropy(half, weight, target, reduction=reduction, loss_dtype=torch.float32)
    assert linear.dtype == torch.float32
    expected = F.cross_entropy(half.float() @ weight.float().T, target, reduction=reduction)
    torch.testing.assert_close(linear, expected, rtol=2e-2, atol=2e-2)
    (ours,) = torch.autograd.grad(linear.sum(), half)
    assert ours.dtype == dtype


def test_a_loss_dtype_that_is_refused() -> None:
    x, target = logits_and_target()
    with pytest.raises(ValueError, match=r"loss_dtype must be the dtype of the logits, Float, .* got Double"):
        functional.cross_entropy(x, target, loss_dtype=torch.float64)
    with pytest.raises(TypeError, match=r"loss_dtype must be a torch\.dtype or None, not str"):
        functional.cross_entropy(x, target, loss_dtype="float32")
    with pytest.raises(ValueError, match="loss_dtype"):
        reference.cross_entropy(x, target, loss_dtype=torch.float64)


def test_a_float32_class_weight_of_half_logits() -> None:
    x, target = logits_and_target()
    half, weight = x.bfloat16().requires_grad_(), torch.linspace(0.5, 2, 27)
    loss = functional.cross_entropy(half, target, weight)
    assert loss.dtype == torch.bfloat16
    torch.testing.assert_close(loss, F.cross_entropy(half.float(), target, weight).bfloat16())
    (ours,) = torch.autograd.grad(loss, half)
    (theirs,) = torch.autograd.grad(F.cross_entropy(half.float(), target, weight), half)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-5)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        functional.cross_entropy(x, target, weight.bfloat16())


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_a_linear_loss_in_float32_takes_a_class_weight_of_either_dtype(weight_dtype: torch.dtype) -> None:
    x, weight, target = arguments(40, 6, 27, torch.bfloat16)
    options: dict[str, Any] = {"weight": torch.linspace(0.5, 2, 27).to(weight_dtype), "loss_dtype": torch.float32}
    results = []
    for f in (functional, reference):
        loss = f.linear_cross_entropy(x, weight, target, **options)
        assert loss.dtype == torch.float32
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        results.append((loss, *first, *torch.autograd.grad(first[0].float().square().sum(), (x, weight))))
    torch.testing.assert_close(results[0], results[1], rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_beside_an_explicit_half_loss(dtype: torch.dtype) -> None:
    x, weight, target = arguments(40, 6, 27, dtype)
    output = functional.linear_cross_entropy(x, weight, target, loss_dtype=dtype, return_lse=True, return_entropy=True)
    assert output.loss.dtype == dtype
    logits, probabilities = torch.randn(4, 27), torch.rand(4, 27, dtype=torch.float64).softmax(1)
    output = functional.cross_entropy(logits, probabilities, loss_dtype=torch.float64, return_predicted_tokens=True)
    assert output.loss.dtype == torch.float64
    assert output.predicted_tokens.equal(logits.argmax(1))


@pytest.mark.parametrize("block_rows", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_cross_entropy_refuses_the_loss_dtypes_that_cross_entropy_refuses(
    dtype: torch.dtype, block_rows: int
) -> None:
    inputs, weight, target = arguments(40, 6, 27, dtype)
    target[:block_rows] = -100  # ignored targets take another path
    for loss_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        if loss_dtype in (dtype, torch.promote_types(dtype, torch.float32)):
            loss = functional.linear_cross_entropy(inputs, weight, target, loss_dtype=loss_dtype)
            assert loss.dtype == loss_dtype
        else:
            with pytest.raises(ValueError, match="loss_dtype must be"):
                functional.linear_cross_entropy(inputs, weight, target, loss_dtype=loss_dtype)


def test_the_reference_refuses_a_loss_dtype_of_promoted_probabilities() -> None:
    logits, probabilities = torch.randn(4, 27), torch.rand(4, 27, dtype=torch.float64).softmax(1)
    for f in (functional.cross_entropy, reference.cross_entropy):
        with pytest.raises(ValueError, match="loss_dtype must be"):
            f(logits, probabilities, loss_dtype=torch.float32)
