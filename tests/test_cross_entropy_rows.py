"""Rows of many classes: the numbers of classes and rows at which the GPU's choice of kernel changes, and neighbours."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from charlm import functional

# csrc/cuda/cross_entropy.cu: the packs of 16 bytes that the threads of a row hold, of 8 halves or 4 floats. A row of a
# warp, of 128, of 256 threads, of clusters of 2, 4 and 8 blocks, of 512 threads, and one too long for registers.
PACKS = (128, 256, 512, 1024, 2048, 4096, 8192)
CLASSES = sorted({257, 1000, *(4 * packs + more for packs in PACKS for more in (0, 1))})
LONG = (16384 * 4 + 5, 32768 * 4, 32768 * 4 + 4)
ROWS = 3
TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3, torch.float64: 1e-10}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "uniform": {"label_smoothing": 0.1, "lse_square_scale": 1e-3, "logit_scale": 0.7},
    "all": {"label_smoothing": 0.1, "softcap": 8.0, "logit_scale": -0.9},
}


def reference(logits: Tensor, target: Tensor, **options: Any) -> Tensor:
    z = logits.double() * options.pop("logit_scale", 1.0)
    if softcap := options.pop("softcap", None):
        z = softcap * torch.tanh(z / softcap)
    square = options.pop("lse_square_scale", 0.0) * z.logsumexp(-1)[target >= 0].square()
    of_rows = square.mean() if options.get("reduction", "mean") == "mean" else square.sum()
    return F.cross_entropy(z, target, **options) + of_rows


def check(logits: Tensor, target: Tensor, *, grad_loss: float = 1.0, **options: Any) -> None:
    x = logits.detach().requires_grad_()
    loss = functional.cross_entropy(x, target, **options)
    (grad,) = torch.autograd.grad(loss, x, torch.full_like(loss, grad_loss))
    exact = logits.detach().double().requires_grad_()
    expected = reference(exact, target, **options)
    (expected_grad,) = torch.autograd.grad(expected, exact, torch.full_like(expected, grad_loss))
    tolerance = TOLERANCE[logits.dtype]
    torch.testing.assert_close(loss.double(), expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=2 * tolerance, atol=1e-6)


def rows(n_rows: int, n_classes: int, dtype: torch.dtype, padding: int = 0) -> Tensor:
    return (torch.randn(n_rows, n_classes + padding) * 3).to(dtype)[:, :n_classes]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("n_classes", CLASSES)
def test_float32_rows_of_every_length_are_right(n_classes: int, options: dict[str, Any]) -> None:
    target = torch.randint(n_classes, (ROWS,))
    check(rows(ROWS, n_classes, torch.float32), target, **options)
    target[1] = -100
    check(rows(ROWS, n_classes, torch.float32, padding=3), target, reduction="sum", grad_loss=0.3, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("n_classes", [2 * n for n in CLASSES[::2]])
def test_half_rows_of_every_length_are_right(n_classes: int, dtype: torch.dtype) -> None:
    target = torch.randint(n_classes, (ROWS,))
    for options in OPTIONS.values():
        check(rows(ROWS, n_classes, dtype), target, **options)
    check(rows(ROWS, n_classes, dtype, padding=2), target)


@pytest.mark.parametrize("n_classes", LONG)
def test_rows_at_the_end_of_the_registers_are_right(n_classes: int) -> None:
    target = torch.randint(n_classes, (2,))
    check(rows(2, n_classes, torch.float32), target, **OPTIONS["uniform"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n_rows", [1, 16, 17, 129])
def test_few_rows_and_many_are_right(n_rows: int, dtype: torch.dtype) -> None:
    target = torch.randint(4200, (n_rows,))
    check(rows(n_rows, 4200, dtype), target)
    check(rows(n_rows, 4200, dtype), target, grad_loss=-0.7, reduction="sum")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("n_rows", [1, 16, 17])
def test_losses_without_a_gradient_are_right(n_rows: int, dtype: torch.dtype) -> None:
    logits, target = rows(n_rows, 16400, dtype), torch.randint(16400, (n_rows,))
    losses = functional.cross_entropy(logits, target, reduction="none")
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(
        losses.double(), reference(logits, target, reduction="none"), rtol=tolerance, atol=tolerance
    )


@pytest.mark.parametrize("n_classes", [300, 4099, 20001])
def test_the_target_may_be_any_class(n_classes: int) -> None:
    places = torch.tensor([0, 1, 5, n_classes // 2, n_classes - 6, n_classes - 1])
    logits = rows(len(places), n_classes, torch.float32)
    check(logits, places)
    expected = torch.autograd.functional.jacobian(lambda x: F.cross_entropy(x, places), logits)
    for inplace in ("forward", "backward"):
        leaf = logits.clone().requires_grad_()
        functional.cross_entropy(leaf * 1, places, inplace=inplace).backward()
        assert leaf.grad is not None
        torch.testing.assert_close(leaf.grad, expected, rtol=6e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_classes", [300, 3000, 20001])
def test_nan_and_infinity_reach_the_rows_that_have_them(n_classes: int, dtype: torch.dtype) -> None:
    logits = rows(7, n_classes, dtype)
    logits[1, 3] = torch.nan
    logits[2, -1] = torch.inf
    logits[3, ::2] = -torch.inf
    logits[4] = -torch.inf
    logits[5] = torch.finfo(dtype).min
    target = torch.full((7,), 7)
    results = []
    for op in (functional.cross_entropy, F.cross_entropy):
        x = logits.float().detach() if op is F.cross_entropy else logits.clone()
        x.requires_grad_()
        loss = op(x, target, reduction="none")
        results.append((loss.detach().float(), torch.autograd.grad(loss.sum(), x)[0].float()))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-2, atol=1e-5, equal_nan=True)
