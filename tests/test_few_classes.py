"""Rows of few classes, which the CPU works on many at once: each is what it is alone, whatever it holds."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from charlm import functional
from charlm.testing import FLOAT_DTYPES

KINDS = ("logits", "log_probs", "probs")
PAIRS = list(itertools.product(KINDS, KINDS))
CLASSES = (1, 2, 27, 128, 129)  # 128 is the last number that is few
ROWS = 37  # some vectors of rows, for each instruction set, and rows left over
EVERY_LAYOUT = ("contiguous", "one_row", "sliced")


def rows(n_classes: int, kind: str, seed: int) -> Tensor:
    """Ordinary rows, and from the first vector on those with what a sum or a maximum may stumble over."""
    x = torch.randn(ROWS, n_classes, generator=torch.Generator().manual_seed(seed)) * 3
    x[1, 0] = x[2, n_classes // 2] = x[3, -1] = torch.nan
    x[4, 0] = x[5, -1] = x[6] = torch.inf
    x[7] = -torch.inf
    x[8, ::2] = x[9, 0] = x[10, -1] = -torch.inf
    x[11] = 1.5  # all of them the largest
    x[12] *= 30
    x[13] += 1000
    x[14, n_classes // 2 :] -= 200  # no probability in float32
    if kind == "log_probs":
        return x.log_softmax(-1)
    return x.softmax(-1) if kind == "probs" else x


def laid_out(x: Tensor, layout: str) -> Tensor:
    if layout == "one_row":
        return x[12:13].expand(ROWS, -1)
    if layout == "sliced":
        return torch.cat([x, x], dim=-1)[:, : x.shape[1]]
    return x


def with_gradients(op: Callable[..., Tensor], inputs: tuple[Tensor, ...], cotangent: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    result = op(*leaves)
    return [result.detach(), *torch.autograd.grad(result, leaves, cotangent)]


def assert_each_row_is_what_it_is_alone(op: Callable[..., Tensor], *inputs: Tensor) -> None:
    cotangent = torch.linspace(-1, 2, ROWS).to(inputs[0].dtype)
    together = with_gradients(op, inputs, cotangent)
    alone = [with_gradients(op, tuple(x[i : i + 1] for x in inputs), cotangent[i : i + 1]) for i in range(ROWS)]
    for ours, expected in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.cat(expected), equal_nan=True)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("n_classes", CLASSES)
@pytest.mark.parametrize("layout", EVERY_LAYOUT)
def test_entropy_of_many_rows_is_that_of_each(layout: str, n_classes: int, dtype: torch.dtype, isa: str) -> None:
    assert_each_row_is_what_it_is_alone(functional.entropy, laid_out(rows(n_classes, "logits", 0).to(dtype), layout))


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("n_classes", CLASSES)
@pytest.mark.parametrize(("p_kind", "q_kind"), PAIRS)
def test_kl_div_of_many_rows_is_that_of_each(
    p_kind: str, q_kind: str, n_classes: int, dtype: torch.dtype, isa: str
) -> None:
    def op(p: Tensor, q: Tensor) -> Tensor:
        return functional.kl_divergence(p, q, p_kind=p_kind, q_kind=q_kind)

    p, q = rows(n_classes, p_kind, 0).to(dtype), rows(n_classes, q_kind, 1).to(dtype)
    q[15:20] = rows(n_classes, q_kind, 0)[15:20].to(dtype)  # equal, where the kinds are
    for p_layout, q_layout in ((layout, "contiguous") for layout in EVERY_LAYOUT):
        assert_each_row_is_what_it_is_alone(op, laid_out(p, p_layout), laid_out(q, q_layout))
    assert_each_row_is_what_it_is_alone(op, p, laid_out(q, "one_row"))
    assert_each_row_is_what_it_is_alone(op, p.roll(8, 0), q)  # what is special in one meets what is not


@pytest.mark.covering
@pytest.mark.parametrize("n_rows", [3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33])
def test_rows_that_fill_vectors_or_do_not_are_all_written(n_rows: int, isa: str) -> None:
    p, q = torch.randn(n_rows, 27), torch.randn(n_rows, 27)
    for op, inputs in ((functional.entropy, (p,)), (functional.kl_divergence, (p, q))):
        exact = with_gradients(op, tuple(x.double() for x in inputs), torch.ones(n_rows, dtype=torch.float64))
        for ours, expected in zip(with_gradients(op, inputs, torch.ones(n_rows)), exact, strict=True):
            torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-6)
