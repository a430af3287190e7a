"""Is the result right? Ours against the reference in float64, by the rule of charlm/testing, before any timing.

The loss is compared as a whole. Of large logits rows of the gradient are, evenly spread from the first to the last, so
that a float64 copy of all of it need never exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.inputs import CrossEntropyInputs, EmbeddingInputs
from bench.layers import LAYERS
from charlm import reference, testing

ROWS = 128
ELEMENTS = 1 << 22  # of float64, at a time; rows are checked up to here even where that is more than 128


def error(case: Case, inputs: CrossEntropyInputs | EmbeddingInputs, result: Any) -> str | None:
    """What is wrong with the result of `ours`, in one line; None if nothing is."""
    check = {"cross_entropy": _cross_entropy, "embedding": _embedding, "embedding_backward": _embedding_backward}
    try:
        (LAYERS[case.op].check if case.op in LAYERS else check[case.op])(inputs, result)
    except AssertionError as failed:
        return " ".join(str(failed).split()) or "differs from the reference"
    return None


def _spread_rows(n: int, row_length: int) -> Tensor:
    """Indices of all rows, or of as many as the limits above allow."""
    most = max(ROWS, ELEMENTS // row_length)
    return torch.arange(n) if n <= most else torch.linspace(0, n - 1, most, dtype=torch.float64).long()


def _assert_close(actual: Tensor, baseline: Tensor, exact: Tensor, what: str) -> None:
    """The rule. Where torch's sum overflows its dtype and the result does not, ours has to be the result."""
    overflown = exact.isfinite() & ~baseline.isfinite()
    testing.assert_close_to_reference(actual, torch.where(overflown, exact.to(baseline.dtype), baseline), exact, what)


def _cross_entropy(inputs: CrossEntropyInputs, result: Tensor | tuple[Tensor, Tensor]) -> None:
    loss, gradient = result if isinstance(result, tuple) else (result, None)
    logits, target = inputs.logits, inputs.target
    n, v = logits.shape
    rows = _spread_rows(n, v).to(logits.device)
    shares = _shares(inputs)  # (N): the weight of each row's loss in the mean
    with torch.no_grad():
        if inputs.cotangent is None:
            every_row = torch.arange(n, device=logits.device)
            every_loss = torch.cat(
                [_row_losses(inputs, piece, torch.float64)[1] for piece in every_row.split(max(1, ELEMENTS // v))]
            )
            baseline = reference.cross_entropy(logits, target, **inputs.options)
            _assert_close(loss, baseline, every_loss.sum() / shares.sum(), "loss")
        else:
            baseline, exact = (_row_losses(inputs, rows, dtype)[1] for dtype in (logits.dtype, torch.float64))
            _assert_close(loss[rows], baseline, exact, "loss")
    if gradient is None:
        return
    assert gradient.shape == logits.shape, f"gradient: shape {tuple(gradient.shape)}"
    expected = []
    for dtype in (logits.dtype, torch.float64):
        leaf, losses = _row_losses(inputs, rows, dtype)
        cotangent = torch.ones_like(rows, dtype=torch.float64) / shares.sum()
        cotangent = cotangent if inputs.cotangent is None else inputs.cotangent[rows]
        expected.append(torch.autograd.grad(losses, leaf, cotangent.to(dtype))[0])
    _assert_close(gradient[rows], *expected, "gradient")


def _row_losses(inputs: CrossEntropyInputs, rows: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The logits of these rows as a leaf, and the reference's loss of each, computed in `dtype`."""
    leaf = inputs.logits[rows].to(dtype).requires_grad_(torch.is_grad_enabled())
    target = inputs.target[rows]
    options = {**inputs.options, "reduction": "none"}
    if "weight" in options:
        options["weight"] = options["weight"].to(dtype)
    return leaf, reference.cross_entropy(leaf, target.to(dtype) if target.is_floating_point() else target, **options)


def _shares(inputs: CrossEntropyInputs) -> Tensor:
    if inputs.target.is_floating_point():
        return inputs.target.new_ones(len(inputs.target), dtype=torch.float64)
    valid = inputs.target != -100
    weight = inputs.options.get("weight")
    return valid.double() if weight is None else weight.double()[torch.where(valid, inputs.target, 0)] * valid


def _embedding(inputs: EmbeddingInputs, output: Tensor) -> None:
    n, d = len(inputs.index), inputs.weight.size(1)
    assert output.shape == (n, d), f"output: shape {tuple(output.shape)}"
    rows = _spread_rows(n, d)
    baseline = reference.embedding(inputs.index[rows], inputs.weight)
    exact = reference.embedding(inputs.index[rows], inputs.weight.double())
    _assert_close(output[rows], baseline, exact, "output")


def _embedding_backward(inputs: EmbeddingInputs, weight_gradient: Tensor) -> None:
    weight = inputs.weight.detach().requires_grad_()
    baseline = torch.autograd.grad(reference.embedding(inputs.index, weight), weight, inputs.gradient)[0]
    exact = torch.zeros_like(inputs.weight, dtype=torch.float64)
    rows = max(1, ELEMENTS // weight.size(1))
    for index, gradient in zip(inputs.index.split(rows), inputs.gradient.split(rows), strict=True):
        exact.index_add_(0, index, gradient.double())
    _assert_close(weight_gradient, baseline, exact, "gradient of the weight")
