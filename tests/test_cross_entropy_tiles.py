"""Small vocabularies go 16 rows at a time, without a maximum; the row-by-row kernel is their reference.

Logits that are columns of a wider tensor go row by row, so both kernels see the same numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from charlm import functional

# Rows that fill tiles, and some that do not; vocabularies below, at and above each vector width, of every number of
# vectors that has loops of its own, and the largest.
N = 5 * 16 + 7
VOCABULARIES = (1, 2, 3, 5, 8, 15, 16, 17, 27, 31, 40, 41, 56, 64, 65, 72, 73, 129, 255, 256, 257)


def _both_kernels(logits: Tensor, target: Tensor, **options: Any) -> list[tuple[Tensor, Tensor]]:
    """(loss, gradient) of the tiled kernel and of the row-by-row one."""
    wide = torch.zeros(logits.size(0), logits.size(1) + 3, dtype=logits.dtype)
    wide[:, : logits.size(1)] = logits
    results = []
    for x in (logits.clone(), wide[:, : logits.size(1)]):
        x = x.detach().requires_grad_()
        loss = functional.cross_entropy(x, target, **options)
        results.append((loss.detach(), torch.autograd.grad(loss.sum(), x)[0]))
    return results


def _assert_equal_to_rounding(logits: Tensor, target: Tensor, **options: Any) -> None:
    tiled, by_row = _both_kernels(logits, target, **options)
    ulp = torch.finfo(logits.dtype).eps
    for name, ours, reference in zip(("loss", "gradient"), tiled, by_row, strict=True):
        assert torch.equal(ours.isnan(), reference.isnan()), name
        scale = reference.nan_to_num(0.0, 0.0, 0.0).abs().max().item()
        torch.testing.assert_close(ours, reference, rtol=4 * ulp, atol=4 * ulp * scale, equal_nan=True, msg=name)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_tiles_give_what_rows_give(vocab_size: int, dtype: torch.dtype, isa: str) -> None:
    logits = torch.randn(N, vocab_size, dtype=dtype) * 3
    target = torch.randint(vocab_size, (N,))
    for reduction in ("mean", "sum", "none"):
        _assert_equal_to_rounding(logits, target, reduction=reduction)
    target[torch.rand(N) < 0.3] = -100
    weight = torch.rand(vocab_size, dtype=dtype) + 0.1
    token_weight = torch.rand(N)
    _assert_equal_to_rounding(logits, target, weight=weight, token_weight=token_weight)


def _special_logits() -> dict[str, Tensor]:
    normal = torch.randn(N, 27)
    found = {
        "far_above_zero": normal + 1000,
        "far_below_zero": normal - 1000,
        "too_large_for_exp": normal + 88,
        "too_small_for_exp": normal - 80,
        "wide": normal * 40,
        "confident": normal + 30 * torch.nn.functional.one_hot(torch.arange(N) % 27, 27),
        "largest_numbers": torch.full((N, 27), torch.finfo(torch.float32).max),
        "one_infinite_row": normal.clone(),
        "one_nan": normal.clone(),
        "masked_classes": normal.clone(),
        "a_row_of_minus_infinity": normal.clone(),
    }
    found["one_infinite_row"][20, 3] = torch.inf
    found["one_nan"][33, 26] = torch.nan
    found["masked_classes"][:, ::2] = -torch.inf
    found["a_row_of_minus_infinity"][40] = -torch.inf
    return found


SPECIAL = _special_logits()


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", SPECIAL)
def test_logits_that_need_their_maximum_get_it(name: str, dtype: torch.dtype, isa: str) -> None:
    target = torch.arange(N) % 27 // 2 * 2 + 1  # never a masked class
    target[target == 27] = 1
    _assert_equal_to_rounding(SPECIAL[name].to(dtype), target, reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_loss_far_beyond_the_smallest_probability_is_exact(dtype: torch.dtype, isa: str) -> None:
    for largest, target_logit in ((43, -60), (10, -75), (0, -100), (60, -20)):
        logits = torch.zeros(N, 27, dtype=dtype)
        logits[:, 0], logits[:, 5] = largest, target_logit
        target = torch.full((N,), 5)
        losses = functional.cross_entropy(logits, target, reduction="none")
        expected = torch.nn.functional.cross_entropy(logits.double(), target, reduction="none")
        torch.testing.assert_close(losses, expected.to(dtype))


def test_a_gradient_of_the_loss_near_the_ends_of_float_is_kept(isa: str) -> None:
    for offset, scale in ((-10.0, 1e25), (10.0, 1e-25)):
        logits = torch.full((16, 3), offset, requires_grad=True)
        loss = functional.cross_entropy(logits, torch.zeros(16, dtype=torch.int64), reduction="sum")
        (grad,) = torch.autograd.grad(loss * scale, logits)
        expected = torch.tensor([-2 / 3, 1 / 3, 1 / 3]).mul(scale).expand(16, 3)
        torch.testing.assert_close(grad, expected, rtol=1e-6, atol=0)


def test_an_ignored_row_has_a_loss_of_plus_zero(isa: str) -> None:
    losses = functional.cross_entropy(torch.randn(16, 5), torch.full((16,), -100), reduction="none")
    assert not losses.signbit().any()


@pytest.mark.parametrize("vocab_size", [4, 27, 300, 5000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_row_of_minus_infinity_has_a_gradient_of_nans_like_torch(reduction: str, vocab_size: int, isa: str) -> None:
    logits = torch.randn(33, vocab_size)
    logits[5] = -torch.inf
    logits.requires_grad_()
    loss = functional.cross_entropy(logits, torch.zeros(33, dtype=torch.int64), reduction=reduction)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    assert grad[5].isnan().all()
    assert grad[4].isfinite().all()


@pytest.mark.parametrize("value", [-88.1, -100.0, -1e30, -torch.inf])
@pytest.mark.parametrize("vocab_size", [27, 300])
def test_a_class_too_improbable_for_float_has_a_gradient_of_exactly_zero(
    vocab_size: int, value: float, isa: str
) -> None:
    logits = torch.zeros(N, vocab_size)
    logits[:, 1:-1:2] = value
    for reduction in ("mean", "none"):
        x = logits.clone().requires_grad_()
        loss = functional.cross_entropy(x, torch.zeros(N, dtype=torch.int64), reduction=reduction)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad[:, 1:-1:2].eq(0).all()
        assert grad[:, 2:-1:2].gt(0).all()


def test_a_masked_class_has_a_gradient_of_exactly_zero(isa: str) -> None:
    logits = SPECIAL["masked_classes"].clone().requires_grad_()
    functional.cross_entropy(logits, torch.ones(N, dtype=torch.int64)).backward()
    assert (logits.grad[:, ::2] == 0).all()


def test_an_ignored_row_of_nans_leaves_its_tile_alone(isa: str) -> None:
    logits = torch.randn(N, 27)
    logits[7] = torch.nan
    target = torch.randint(27, (N,))
    target[7] = -100
    _assert_equal_to_rounding(logits, target)
    logits.requires_grad_()
    functional.cross_entropy(logits, target).backward()
    assert (logits.grad[7] == 0).all()
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("inplace", ["forward", "backward"])
def test_a_tile_may_be_written_over_its_logits(inplace: str, isa: str) -> None:
    leaf = torch.randn(N, 27, requires_grad=True)
    target = torch.randint(27, (N,))
    functional.cross_entropy(leaf * 1, target, inplace=inplace).backward()
    (expected,) = torch.autograd.grad(functional.cross_entropy(leaf, target), leaf)
    assert torch.equal(leaf.grad, expected)
