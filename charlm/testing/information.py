"""Sample calls of entropy, kl_divergence, kl_div and surprisal, whose classes are the last dimension."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .samples import SampleInput, laid_out

_INFINITE_SHARE = 0.3
# Measured against long double: the oracle's own error is up to 26 ulps of the largest element (logits.grad of entropy,
# "few_long_rows", sums of 20011 terms). Our error there is 1.3 ulps, and at most 6 in any sample.
_FLOAT64_ULPS = 32.0


@dataclass(frozen=True)
class _Case:
    """The recipe of a `SampleInput`: logits (or distributions p) of `shape`, (..., V).

    Attributes:
        q: the shape of the second distribution; () for that of the first.
        kinds: the kinds of p and q.
        target: the dtype of the targets.
        target_shape: the shape of the targets; None for that of the logits.
    """

    name: str
    shape: tuple[int, ...]
    values: str = "normal"
    layout: str = "contiguous"
    q: tuple[int, ...] = ()
    kinds: tuple[str, str] = ("logits", "logits")
    target: torch.dtype = torch.int64
    target_shape: tuple[int, ...] | None = None
    ignored: float = 0.0


# Samples with one tensor of logits, for each of the ops.
_ROWS = (
    _Case("one_class", (3, 1)),
    _Case("two_classes", (33, 2)),
    _Case("one_row", (1, 7)),
    _Case("no_batch_dimension", (27,)),
    _Case("names_batch", (33, 27)),
    _Case("many_rows", (4099, 27)),
    _Case("bytes", (257, 256)),
    _Case("thousand_classes", (33, 1000)),
    _Case("odd_large_vocabulary", (33, 4099)),
    _Case("few_long_rows", (3, 20011)),
    _Case("four_dimensions", (2, 3, 2, 65)),
    _Case("no_row", (0, 27)),
    _Case("no_row_of_a_batch", (3, 0, 27)),
    _Case("sliced_columns", (33, 27), layout="sliced_columns"),
    _Case("every_other_column", (33, 65), layout="every_other_column"),
    _Case("every_other_row", (33, 65), layout="every_other_row"),
    _Case("transposed", (33, 65), layout="transposed"),
    _Case("batch_transposed", (3, 27, 5), layout="classes_last"),
    _Case("offset_1000", (33, 27), "offset"),
    _Case("offset_1000_long_rows", (9, 4099), "offset"),
    _Case("rising", (9, 8195), "rising"),
    _Case("peaked", (33, 129), "peaked"),
    _Case("minus_infinity", (257, 65), "minus_infinity"),
    _Case("minus_infinity_long_rows", (9, 8195), "minus_infinity"),
)
_KINDS = ("logits", "log_probs", "probs")
# With fewer rows one element can be twice as large as any other, and torch's error there decides by chance.
_PAIRS = (
    *(_Case(f"{p}_{q}", (513, 27), kinds=(p, q)) for p in _KINDS for q in _KINDS),
    *(_Case(f"{kind}_long_rows", (9, 4099), kinds=(kind, kind)) for kind in _KINDS),
    *(_Case(f"{p}_{q}_zeros", (33, 65), "minus_infinity", kinds=(p, q)) for p in _KINDS for q in _KINDS),
    _Case("one_row_of_q", (33, 27), q=(27,)),
    _Case("one_row_of_p", (27,), q=(33, 27), kinds=("probs", "logits")),
    _Case("outer", (5, 1, 27), q=(3, 27), kinds=("log_probs", "logits")),
    _Case("outer_of_four_dimensions", (2, 1, 3, 27), q=(2, 1, 27)),
)
_TARGETS = (
    _Case("ignored", (257, 27), ignored=0.3),
    _Case("uint8_targets", (257, 65), target=torch.uint8),
    _Case("int16_targets", (3, 33, 27), target=torch.int16),
    _Case("one_row_of_logits", (27,), target_shape=(33,)),
    _Case("one_target", (33, 27), target_shape=()),
    _Case("outer", (5, 1, 27), target_shape=(3,)),
)


def sample_inputs_entropy(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Sample calls of `entropy`, about one for each shape, memory layout and kind of values."""
    for seed, case in enumerate(_ROWS):
        generator = torch.Generator(device).manual_seed(seed)
        logits = _logits(case, case.shape, generator).to(dtype)
        yield SampleInput(case.name, {"logits": laid_out(logits, case.layout)}, ("logits",), _FLOAT64_ULPS)


def sample_inputs_kl_divergence(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Sample calls of `kl_divergence`, about one for each pair of kinds, shape and memory layout."""
    for seed, case in enumerate((*_ROWS, *_PAIRS)):
        generator = torch.Generator(device).manual_seed(seed)
        p, q = (_logits(case, shape, generator) for shape in (case.shape, case.q or case.shape))
        if case.values == "minus_infinity":
            p = p.masked_fill(q == -torch.inf, -torch.inf)  # the support of p lies in that of q
        pair = {
            name: laid_out(_as_kind(x, kind).to(dtype), case.layout)
            for name, x, kind in zip("pq", (p, q), case.kinds, strict=True)
        }
        kinds = dict(zip(("p_kind", "q_kind"), case.kinds, strict=True))
        yield SampleInput(case.name, {**pair, **kinds}, ("p", "q"))


def sample_inputs_kl_div(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Sample calls of `kl_div`, about one for each reduction, kind of target, shape and memory layout."""
    cases = [
        *(
            (f"{reduction}_{kind}", (513, 27), (513, 27), "contiguous", reduction, kind)
            for reduction, kind in _KL_DIV_OPTIONS
        ),
        *(
            (f"long_{reduction}", (9, 8195), (9, 8195), "contiguous", reduction, "probs")
            for reduction in ("none", "sum")
        ),
        ("transposed", (65, 33), (65, 33), "transposed", "batchmean", "probs"),
        ("sliced", (65, 33), (65, 33), "sliced_columns", "sum", "log_probs"),
        ("one_row_of_target", (257, 27), (27,), "contiguous", "batchmean", "probs"),
        ("one_row_of_input", (27,), (257, 27), "contiguous", "mean", "log_probs"),
        ("no_dimension", (), (), "contiguous", "sum", "probs"),
        ("three_dimensions", (5, 7, 27), (5, 7, 27), "contiguous", "none", "log_probs"),
    ]
    for seed, (name, shape, target_shape, layout, reduction, kind) in enumerate(cases):
        generator = torch.Generator(device).manual_seed(seed)
        logits, of_target = (
            torch.randn(sizes or (1,), generator=generator, device=device) * 2 for sizes in (shape, target_shape)
        )
        arguments = {
            "input": laid_out(logits.log_softmax(-1).sub(0.0 if shape else 1.0).reshape(shape).to(dtype), layout),
            "target": laid_out(_as_kind(of_target, kind).reshape(target_shape).to(dtype), layout),
            "reduction": reduction,
            "log_target": kind == "log_probs",
        }
        yield SampleInput(name, arguments, ("input", "target"))


_KL_DIV_OPTIONS = [(r, kind) for r in ("none", "mean", "batchmean", "sum") for kind in ("probs", "log_probs")]


def sample_inputs_surprisal(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Sample calls of `surprisal`, about one for each shape, memory layout and dtype of the targets."""
    for seed, case in enumerate((*_ROWS, *_TARGETS)):
        generator = torch.Generator(device).manual_seed(seed)
        logits = _logits(case, case.shape, generator)
        shape = case.shape[:-1] if case.target_shape is None else case.target_shape
        target = torch.randint(0, case.shape[-1], shape, generator=generator, device=device)
        ignored = torch.rand(shape, generator=generator, device=device) < case.ignored
        arguments = {
            "logits": laid_out(logits.to(dtype), case.layout),
            "target": target.masked_fill(ignored, -100).to(case.target),
        }
        yield SampleInput(case.name, arguments, ("logits",))


def _logits(case: _Case, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    logits = torch.randn(shape, generator=generator, device=generator.device) * 2
    if case.values == "offset":
        logits += 1000
    elif case.values == "rising":  # each part of a row has a larger maximum than the one before
        logits += torch.arange(shape[-1], device=generator.device) / 100
    elif case.values == "peaked":
        logits *= 10
    elif case.values == "minus_infinity":
        infinite = torch.rand(shape, generator=generator, device=generator.device) < _INFINITE_SHARE
        infinite[..., : shape[-1] // 3] = True  # a whole chunk of a long row
        logits = logits.masked_fill(infinite, -torch.inf)
        logits[..., -1] = 0  # one finite logit in each row
    return logits


def _as_kind(logits: Tensor, kind: str) -> Tensor:
    if kind == "logits":
        return logits
    return logits.log_softmax(-1) if kind == "log_probs" else logits.softmax(-1)
