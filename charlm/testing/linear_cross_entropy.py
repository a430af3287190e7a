"""Sample calls of linear_cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .samples import PROBABILITIES, SampleInput, laid_out


@dataclass(frozen=True)
class _Case:
    """The recipe of a `SampleInput`: the shapes are (N, D) or (D), and (C, d1, ...)."""

    name: str
    input: tuple[int, ...]
    outputs: tuple[int, ...]
    target: torch.dtype | str = torch.int64
    layout: str = "contiguous"
    ignored: float = 0.0
    bias: bool = False
    class_weight: bool = False
    token_weight: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_EXTRAS = {"label_smoothing": 0.1, "lse_square_scale": 0.02, "softcap": 4.0, "logit_scale": 0.7}
_RETURNS = {"return_lse": True, "return_entropy": True}

_CASES = (
    _Case("names", (33, 19), (27,)),
    _Case("many_rows", (1025, 10), (27,), bias=True),
    _Case("thousand_classes", (129, 33), (1000,), ignored=0.3),
    _Case("odd_large_vocabulary", (33, 65), (4099,), target=torch.uint16, bias=True),
    _Case("one_row", (1, 19), (27,), bias=True),
    _Case("one_class", (33, 19), (1,)),
    _Case("one_feature", (33, 1), (27,)),
    _Case("no_batch_dimension", (19,), (27,), bias=True),
    _Case("no_batch_dimension_none", (19,), (27,), options={"reduction": "none"}),
    _Case("empty_batch_mean", (0, 19), (27,), bias=True),
    _Case("empty_batch_none", (0, 19), (27,), options={"reduction": "none"}),
    _Case("empty_batch_zero", (0, 19), (27,), options={"all_ignored": "zero"}),
    _Case("sum_uint8", (33, 19), (27,), target=torch.uint8, options={"reduction": "sum"}),
    _Case("none", (257, 19), (65,), bias=True, ignored=0.3, options={"reduction": "none"}),
    _Case("all_ignored_mean", (33, 19), (27,), bias=True, ignored=1.0),
    _Case("all_ignored_zero", (33, 19), (27,), ignored=1.0, options={"all_ignored": "zero"}),
    _Case("ignored_class", (33, 19), (27,), options={"ignore_index": 3}),
    _Case("class_weight", (33, 19), (65,), class_weight=True, ignored=0.3),
    _Case("smoothing", (33, 19), (65,), bias=True, options={"label_smoothing": 0.1}),
    _Case("token_weight", (33, 19), (65,), token_weight=True, ignored=0.3),
    _Case(
        "all_extras", (129, 33), (515,), bias=True, class_weight=True, token_weight=True, ignored=0.3, options=_EXTRAS
    ),
    _Case(
        "all_extras_none",
        (33, 19),
        (65,),
        class_weight=True,
        token_weight=True,
        options={"reduction": "none", **_EXTRAS},
    ),
    _Case("returns", (33, 19), (65,), bias=True, ignored=0.3, options={**_EXTRAS, **_RETURNS}),
    _Case("returns_none", (33, 19), (65,), options={"reduction": "none", **_RETURNS}),
    _Case("sliced_columns", (33, 19), (65,), layout="sliced_columns"),
    _Case("every_other_column", (33, 19), (65,), layout="every_other_column", bias=True),
    _Case("every_other_row", (33, 19), (65,), layout="every_other_row", ignored=0.3),
    _Case("transposed", (33, 19), (65,), layout="transposed"),
    _Case("probabilities", (33, 19), (65,), target=PROBABILITIES, bias=True),
    _Case(
        "probabilities_all_extras",
        (33, 19),
        (65,),
        target=PROBABILITIES,
        class_weight=True,
        token_weight=True,
        options=_EXTRAS,
    ),
    _Case("probabilities_no_batch", (19,), (27,), target=PROBABILITIES),
    _Case("two_more_dimensions", (9, 19), (27, 3, 2), bias=True, class_weight=True, ignored=0.3),
    _Case("probabilities_of_two_dimensions", (9, 19), (27, 3), target=PROBABILITIES),
)


# Measured against long double: the oracle's sum over 4099 classes, and ours, are up to 30 ulps of the largest element
# away.
MANY_CLASSES_FLOAT64_ULPS = 64.0


def sample_inputs_linear_cross_entropy(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Sample calls of `linear_cross_entropy`, about one for each option, shape and memory layout."""
    for seed, case in enumerate(_CASES):
        yield _sample(case, dtype, device, torch.Generator(device).manual_seed(seed))


def _sample(case: _Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> SampleInput:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    n_rows, (n_classes, *others) = case.input[:-1], case.outputs
    arguments: dict[str, Any] = {
        "input": laid_out(normal(*case.input).to(dtype), case.layout),
        "linear_weight": laid_out(
            (normal(*case.outputs, case.input[-1]) / case.input[-1] ** 0.5).to(dtype), case.layout
        ),
    }
    differentiable = ["input", "linear_weight"]
    if case.target == PROBABILITIES:
        class_dim = len(n_rows)
        arguments["target"] = normal(*n_rows, *case.outputs).softmax(class_dim).to(dtype)
    else:
        per_target = (*n_rows, *others)
        target = torch.randint(0, n_classes, per_target, generator=generator, device=device)
        arguments["target"] = target.masked_fill(uniform(*per_target) < case.ignored, -100).to(case.target)
    if case.bias:
        arguments["linear_bias"] = normal(*case.outputs).to(dtype)
        differentiable.append("linear_bias")
    if case.class_weight:
        arguments["weight"] = (uniform(n_classes) + 0.5).to(dtype)
    if case.token_weight:
        arguments["token_weight"] = (uniform(*n_rows) + 0.5).to(dtype)
    return SampleInput(case.name, {**arguments, **case.options}, tuple(differentiable), MANY_CLASSES_FLOAT64_ULPS)
