"""Sample calls of cross_entropy."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .samples import PROBABILITIES, SampleInput, laid_out


@dataclass(frozen=True)
class _Case:
    """The recipe of a `SampleInput`; `shape` is that of the input."""

    name: str
    shape: tuple[int, ...]
    target: torch.dtype | str = torch.int64
    layout: str = "contiguous"
    logits: str = "normal"
    ignored: float = 0.0
    class_weight: bool = False
    token_weight: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_RETURN_ALL = {
    "return_lse": True,
    "return_entropy": True,
    "return_predicted_tokens": True,
    "return_token_accuracy": True,
}
_ALL_EXTRAS = {"label_smoothing": 0.1, "lse_square_scale": 0.02, "softcap": 4.0, "logit_scale": 0.7, **_RETURN_ALL}

_CASES = (
    _Case("one_class", (3, 1)),
    _Case("two_classes", (33, 2)),
    _Case("one_row", (1, 7)),
    _Case("names_batch", (33, 27)),
    _Case("many_rows", (4099, 27)),
    _Case("many_rows_of_bytes", (1025, 256), options={"reduction": "sum"}),
    _Case("uint8_targets", (257, 65), target=torch.uint8),
    _Case("int32_targets", (33, 129), target=torch.int32, options={"reduction": "sum"}),
    _Case("bytes", (257, 256), options={"reduction": "none"}),
    _Case("thousand_classes", (33, 1000), ignored=0.3),
    _Case("odd_large_vocabulary", (33, 4099), target=torch.uint16, ignored=0.1),
    _Case("few_long_rows", (3, 20011), ignored=0.3),
    _Case("many_classes_sliced", (9, 515), layout="sliced_columns", options={"reduction": "sum"}),
    _Case("many_classes_minus_infinity", (9, 1024), logits="minus_infinity", class_weight=True),
    _Case("no_batch_dimension", (27,)),
    _Case("empty_batch_mean", (0, 27)),
    _Case("empty_batch_sum", (0, 27), options={"reduction": "sum"}),
    _Case("empty_batch_none", (0, 27), options={"reduction": "none"}),
    _Case("empty_batch_zero", (0, 27), options={"all_ignored": "zero"}),
    _Case("three_dimensions", (3, 7, 5), ignored=0.3),
    _Case("four_dimensions", (2, 27, 3, 2), class_weight=True, options={"label_smoothing": 0.1}),
    _Case("classes_last_in_memory", (3, 27, 33), layout="classes_last"),
    _Case("sliced_columns", (33, 27), layout="sliced_columns"),
    _Case("every_other_column", (33, 27), layout="every_other_column"),
    _Case("every_other_row", (33, 65), layout="every_other_row", options={"label_smoothing": 0.2}),
    _Case("transposed", (33, 65), layout="transposed"),
    _Case("offset_1000", (33, 27), logits="offset"),
    _Case("peaked", (33, 129), logits="peaked"),
    _Case("minus_infinity_logits", (33, 27), logits="minus_infinity", options={"reduction": "none", **_RETURN_ALL}),
    _Case("all_ignored_mean", (33, 27), ignored=1.0),
    _Case("all_ignored_sum", (33, 27), ignored=1.0, options={"reduction": "sum"}),
    _Case("all_ignored_zero", (3, 27), ignored=1.0, options={"all_ignored": "zero", **_RETURN_ALL}),
    _Case("class_weight", (33, 27), class_weight=True, ignored=0.3),
    _Case("ignored_class", (33, 7), class_weight=True, options={"ignore_index": 3}),
    _Case("smoothing", (33, 65), options={"label_smoothing": 0.1}),
    _Case("smoothing_one", (33, 27), ignored=0.3, options={"label_smoothing": 1.0}),
    _Case("weight_smoothing_ignored", (257, 27), class_weight=True, ignored=0.3, options={"label_smoothing": 0.1}),
    _Case("probabilities", (33, 27), target=PROBABILITIES),
    _Case("probabilities_none", (33, 129), target=PROBABILITIES, options={"reduction": "none"}),
    _Case("probabilities_no_batch", (27,), target=PROBABILITIES, options={"reduction": "sum"}),
    _Case(
        "probabilities_weight_smoothing",
        (3, 7, 5),
        target=PROBABILITIES,
        class_weight=True,
        options={"label_smoothing": 0.1},
    ),
    _Case(
        "probabilities_all_extras",
        (33, 27),
        target=PROBABILITIES,
        class_weight=True,
        token_weight=True,
        options=_ALL_EXTRAS,
    ),
    _Case("probabilities_many_classes", (9, 515), target=PROBABILITIES, class_weight=True),
    _Case(
        "probabilities_few_long_rows",
        (2, 17001),
        target=PROBABILITIES,
        class_weight=True,
        options={"label_smoothing": 0.1, "lse_square_scale": 0.02, "reduction": "sum"},
    ),
    _Case("z_loss", (33, 65), ignored=0.3, options={"lse_square_scale": 0.1}),
    _Case("z_loss_with_class_weight", (33, 27), class_weight=True, ignored=0.3, options={"lse_square_scale": 0.1}),
    _Case("softcap", (33, 129), logits="peaked", options={"softcap": 15.0}),
    _Case("logit_scale", (33, 27), options={"logit_scale": 1.7, "return_entropy": True}),
    _Case("negative_logit_scale", (33, 27), options={"logit_scale": -0.5, **_RETURN_ALL}),
    _Case("token_weight", (33, 27), token_weight=True, ignored=0.3),
    _Case("token_weight_none", (3, 27, 5), token_weight=True, options={"reduction": "none"}),
    _Case("returns", (33, 27), ignored=0.3, options=_RETURN_ALL),
    _Case("returns_none", (3, 27, 5), ignored=0.3, options={"reduction": "none", **_RETURN_ALL}),
    _Case("all_extras", (257, 65), class_weight=True, token_weight=True, ignored=0.3, options=_ALL_EXTRAS),
    _Case("all_extras_many_classes", (9, 1000), class_weight=True, token_weight=True, ignored=0.3, options=_ALL_EXTRAS),
    _Case(
        "all_extras_strided_none",
        (3, 27, 33),
        layout="classes_last",
        class_weight=True,
        token_weight=True,
        ignored=0.3,
        options={"label_smoothing": 0.1, "lse_square_scale": 0.02, "softcap": 4.0, "reduction": "none"},
    ),
)


def sample_inputs_cross_entropy(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Sample calls of `cross_entropy`, about one for each option, shape and memory layout."""
    for seed, case in enumerate(_CASES):
        yield _sample(case, dtype, device, torch.Generator(device).manual_seed(seed))


def _sample(case: _Case, dtype: torch.dtype, device: str, generator: torch.Generator) -> SampleInput:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    class_dim = 0 if len(case.shape) == 1 else 1
    n_classes = case.shape[class_dim]
    per_target = case.shape[:class_dim] + case.shape[class_dim + 1 :]
    logits = normal(*case.shape) * 2
    if case.logits == "offset":
        logits += 1000
    elif case.logits == "peaked":
        logits *= 10
    elif case.logits == "minus_infinity":
        logits[uniform(*case.shape) < 0.3] = -torch.inf
        logits.select(class_dim, 0).fill_(0)  # one finite logit in each row

    arguments: dict[str, Any] = {"input": laid_out(logits.to(dtype), case.layout)}
    differentiable = ["input"]
    if case.target == PROBABILITIES:
        arguments["target"] = normal(*case.shape).softmax(class_dim).to(dtype)
        differentiable.append("target")
    else:
        target = torch.randint(0, n_classes, per_target, generator=generator, device=device)
        arguments["target"] = target.masked_fill(uniform(*per_target) < case.ignored, -100).to(case.target)
        if case.ignored and case.target in (torch.uint16, torch.uint8):
            # An unsigned target cannot be -100: its ignored value is the one that -100 wraps to.
            arguments["ignore_index"] = torch.iinfo(case.target).max - 99
    if case.class_weight:
        arguments["weight"] = (uniform(n_classes) + 0.5).to(dtype)
        if case.target == PROBABILITIES:
            differentiable.append("weight")
    if case.token_weight:
        arguments["token_weight"] = (uniform(*per_target) + 0.5).to(dtype)
    return SampleInput(case.name, {**arguments, **case.options}, tuple(differentiable))
