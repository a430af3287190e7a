"""Sample inputs for each op, and the tolerance that judges a kernel: used by the tests and by the benchmark.

A sample is the arguments of one call. `evaluate` makes the call and its backward; `assert_matches_reference`
makes it three times, with the op, with the reference in the same dtype and with the reference in float64, and
compares the errors of the first two against the third. The rule: against float64 our root mean square error
is at most 1.05 times the reference's, our largest at most twice its largest, plus one ulp, so a kernel may
round differently from torch but never worse.

The sizes are odd on purpose (1, 27, 129, 4099): they leave a remainder in every vector width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PROBABILITIES = "probabilities"

# The largest error of so few elements is luck: over thousands of rows of 27 classes ours is 0.8 to 1.5 times
# torch's, but on one row torch's was seen at a tenth of an ulp of the largest element and ours at two. There the
# floor is three of them.
FEW_ELEMENTS = 1024


@dataclass(frozen=True)
class SampleInput:
    """One call of an op.

    name:           what is special about it, for a test's id and a table's row.
    arguments:      every argument by its name.
    differentiable: the names of those that get a gradient.
    """

    name: str
    arguments: dict[str, Any]
    differentiable: tuple[str, ...]


@dataclass(frozen=True)
class _CrossEntropyCase:
    """The recipe of a `SampleInput`; `shape` is the input's, () of 1-d inputs included."""

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

_ALL_EXTRAS = {
    "label_smoothing": 0.1,
    "lse_square_scale": 0.02,
    "softcap": 4.0,
    "logit_scale": 0.7,
    **_RETURN_ALL,
}

_CROSS_ENTROPY_CASES = (
    _CrossEntropyCase("one_class", (3, 1)),
    _CrossEntropyCase("two_classes", (33, 2)),
    _CrossEntropyCase("one_row", (1, 7)),
    _CrossEntropyCase("names_batch", (33, 27)),
    _CrossEntropyCase("many_rows", (4099, 27)),
    _CrossEntropyCase("many_rows_of_bytes", (1025, 256), options={"reduction": "sum"}),
    _CrossEntropyCase("uint8_targets", (257, 65), target=torch.uint8),
    _CrossEntropyCase("int32_targets", (33, 129), target=torch.int32, options={"reduction": "sum"}),
    _CrossEntropyCase("bytes", (257, 256), options={"reduction": "none"}),
    _CrossEntropyCase("thousand_classes", (33, 1000), ignored=0.3),
    _CrossEntropyCase("odd_large_vocabulary", (33, 4099), target=torch.uint16, ignored=0.1),
    _CrossEntropyCase("few_long_rows", (3, 20011), ignored=0.3),
    _CrossEntropyCase("many_classes_sliced", (9, 515), layout="sliced_columns", options={"reduction": "sum"}),
    _CrossEntropyCase("many_classes_minus_infinity", (9, 1024), logits="minus_infinity", class_weight=True),
    _CrossEntropyCase("no_batch_dimension", (27,)),
    _CrossEntropyCase("empty_batch_mean", (0, 27)),
    _CrossEntropyCase("empty_batch_sum", (0, 27), options={"reduction": "sum"}),
    _CrossEntropyCase("empty_batch_none", (0, 27), options={"reduction": "none"}),
    _CrossEntropyCase("empty_batch_zero", (0, 27), options={"all_ignored": "zero"}),
    _CrossEntropyCase("three_dimensions", (3, 7, 5), ignored=0.3),
    _CrossEntropyCase("four_dimensions", (2, 27, 3, 2), class_weight=True, options={"label_smoothing": 0.1}),
    _CrossEntropyCase("classes_last_in_memory", (3, 27, 33), layout="classes_last"),
    _CrossEntropyCase("sliced_columns", (33, 27), layout="sliced_columns"),
    _CrossEntropyCase("every_other_column", (33, 27), layout="every_other_column"),
    _CrossEntropyCase("every_other_row", (33, 65), layout="every_other_row", options={"label_smoothing": 0.2}),
    _CrossEntropyCase("transposed", (33, 65), layout="transposed"),
    _CrossEntropyCase("offset_1000", (33, 27), logits="offset"),
    _CrossEntropyCase("peaked", (33, 129), logits="peaked"),
    _CrossEntropyCase(
        "minus_infinity_logits",
        (33, 27),
        logits="minus_infinity",
        options={"reduction": "none", **_RETURN_ALL},
    ),
    _CrossEntropyCase("all_ignored_mean", (33, 27), ignored=1.0),
    _CrossEntropyCase("all_ignored_sum", (33, 27), ignored=1.0, options={"reduction": "sum"}),
    _CrossEntropyCase("all_ignored_zero", (3, 27), ignored=1.0, options={"all_ignored": "zero", **_RETURN_ALL}),
    _CrossEntropyCase("class_weight", (33, 27), class_weight=True, ignored=0.3),
    _CrossEntropyCase("ignored_class", (33, 7), class_weight=True, options={"ignore_index": 3}),
    _CrossEntropyCase("smoothing", (33, 65), options={"label_smoothing": 0.1}),
    _CrossEntropyCase("smoothing_one", (33, 27), ignored=0.3, options={"label_smoothing": 1.0}),
    _CrossEntropyCase(
        "weight_smoothing_ignored",
        (257, 27),
        class_weight=True,
        ignored=0.3,
        options={"label_smoothing": 0.1},
    ),
    _CrossEntropyCase("probabilities", (33, 27), target=PROBABILITIES),
    _CrossEntropyCase("probabilities_none", (33, 129), target=PROBABILITIES, options={"reduction": "none"}),
    _CrossEntropyCase("probabilities_no_batch", (27,), target=PROBABILITIES, options={"reduction": "sum"}),
    _CrossEntropyCase(
        "probabilities_weight_smoothing",
        (3, 7, 5),
        target=PROBABILITIES,
        class_weight=True,
        options={"label_smoothing": 0.1},
    ),
    _CrossEntropyCase(
        "probabilities_all_extras",
        (33, 27),
        target=PROBABILITIES,
        class_weight=True,
        token_weight=True,
        options=_ALL_EXTRAS,
    ),
    _CrossEntropyCase("probabilities_many_classes", (9, 515), target=PROBABILITIES, class_weight=True),
    _CrossEntropyCase(
        "probabilities_few_long_rows",
        (2, 17001),
        target=PROBABILITIES,
        class_weight=True,
        options={"label_smoothing": 0.1, "lse_square_scale": 0.02, "reduction": "sum"},
    ),
    _CrossEntropyCase("z_loss", (33, 65), ignored=0.3, options={"lse_square_scale": 0.1}),
    _CrossEntropyCase(
        "z_loss_with_class_weight",
        (33, 27),
        class_weight=True,
        ignored=0.3,
        options={"lse_square_scale": 0.1},
    ),
    _CrossEntropyCase("softcap", (33, 129), logits="peaked", options={"softcap": 15.0}),
    _CrossEntropyCase("logit_scale", (33, 27), options={"logit_scale": 1.7, "return_entropy": True}),
    _CrossEntropyCase("negative_logit_scale", (33, 27), options={"logit_scale": -0.5, **_RETURN_ALL}),
    _CrossEntropyCase("token_weight", (33, 27), token_weight=True, ignored=0.3),
    _CrossEntropyCase("token_weight_none", (3, 27, 5), token_weight=True, options={"reduction": "none"}),
    _CrossEntropyCase("returns", (33, 27), ignored=0.3, options=_RETURN_ALL),
    _CrossEntropyCase("returns_none", (3, 27, 5), ignored=0.3, options={"reduction": "none", **_RETURN_ALL}),
    _CrossEntropyCase(
        "all_extras",
        (257, 65),
        class_weight=True,
        token_weight=True,
        ignored=0.3,
        options=_ALL_EXTRAS,
    ),
    _CrossEntropyCase(
        "all_extras_many_classes",
        (9, 1000),
        class_weight=True,
        token_weight=True,
        ignored=0.3,
        options=_ALL_EXTRAS,
    ),
    _CrossEntropyCase(
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
    """Calls of `cross_entropy` with logits of `dtype`, about one for each option, shape and layout."""
    for seed, case in enumerate(_CROSS_ENTROPY_CASES):
        yield _cross_entropy_sample(case, dtype, device, torch.Generator(device).manual_seed(seed))


def _cross_entropy_sample(
    case: _CrossEntropyCase, dtype: torch.dtype, device: str, generator: torch.Generator
) -> SampleInput:
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

    arguments: dict[str, Any] = {"input": _laid_out(logits.to(dtype), case.layout)}
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


def _laid_out(logits: Tensor, layout: str) -> Tensor:
    """The same values with other strides, as a view of a larger or a differently ordered tensor."""
    if layout == "contiguous":
        return logits
    if layout in ("transposed", "classes_last"):
        return (
            logits.transpose(1, -1 if layout == "classes_last" else 0)
            .contiguous()
            .transpose(1, -1 if layout == "classes_last" else 0)
        )
    n_rows, n_classes = logits.shape
    view = {
        "sliced_columns": logits.new_empty(n_rows, n_classes + 5)[:, 2:-3],
        "every_other_column": logits.new_empty(n_rows, 2 * n_classes)[:, ::2],
        "every_other_row": logits.new_empty(2 * n_rows, n_classes)[::2],
    }[layout]
    return view.copy_(logits)


@dataclass(frozen=True)
class _EmbeddingCase:
    name: str
    index_shape: tuple[int, ...]
    weight_shape: tuple[int, int]
    index: torch.dtype = torch.int64
    weight_layout: str = "contiguous"
    hot: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_EMBEDDING_CASES = (
    _EmbeddingCase("one_row_table", (3,), (1, 1)),
    _EmbeddingCase("names", (33, 3), (27, 10)),
    _EmbeddingCase("scalar_index", (), (7, 5)),
    _EmbeddingCase("four_dimensional_index", (3, 1, 5, 2), (65, 24)),
    _EmbeddingCase("empty_index", (0,), (27, 10)),
    _EmbeddingCase("empty_index_2d", (3, 0), (27, 10)),
    _EmbeddingCase("empty_rows", (3,), (27, 0)),
    _EmbeddingCase("uint8_index", (257, 8), (256, 33), index=torch.uint8),
    _EmbeddingCase("int16_index", (33,), (1000, 17), index=torch.int16),
    _EmbeddingCase("large_table", (257,), (4099, 65), index=torch.int32),
    _EmbeddingCase("hot_row", (4099,), (27, 10), hot=True),
    _EmbeddingCase("many_indices", (9001,), (27, 2)),
    _EmbeddingCase("hot_row_of_a_large_table", (17001,), (1000, 3), hot=True),
    _EmbeddingCase("transposed_weight", (33,), (27, 10), weight_layout="transposed"),
    _EmbeddingCase("sliced_weight", (33,), (27, 10), weight_layout="sliced_columns"),
    _EmbeddingCase("every_other_weight_row", (33,), (27, 10), weight_layout="every_other_row"),
    _EmbeddingCase("padding_idx", (257,), (27, 10), options={"padding_idx": 3}),
    _EmbeddingCase("padding_idx_0", (257,), (7, 10), options={"padding_idx": 0}),
    _EmbeddingCase("negative_padding_idx", (257,), (7, 10), options={"padding_idx": -1}),
    _EmbeddingCase("scale_grad_by_freq", (257,), (27, 10), options={"scale_grad_by_freq": True}),
    _EmbeddingCase(
        "scale_grad_by_freq_padding", (257,), (7, 10), options={"scale_grad_by_freq": True, "padding_idx": 2}
    ),
    _EmbeddingCase("sparse", (33, 3), (27, 10), options={"sparse": True}),
    _EmbeddingCase("sparse_padding", (33, 3), (7, 10), options={"sparse": True, "padding_idx": 2}),
    _EmbeddingCase("max_norm", (33,), (65, 10), options={"max_norm": 1.5}),
    _EmbeddingCase("max_norm_1", (33, 2), (27, 10), options={"max_norm": 2.0, "norm_type": 1.0}),
    _EmbeddingCase("max_norm_3", (33,), (27, 129), options={"max_norm": 2.0, "norm_type": 3.0}),
    _EmbeddingCase("max_norm_inf", (33,), (27, 10), options={"max_norm": 1.0, "norm_type": torch.inf}),
    _EmbeddingCase("max_norm_sliced", (33,), (27, 10), weight_layout="sliced_columns", options={"max_norm": 1.0}),
)


def sample_inputs_embedding(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Calls of `embedding` with a table of `dtype`, about one for each option, shape and index dtype."""
    for seed, case in enumerate(_EMBEDDING_CASES):
        generator = torch.Generator(device).manual_seed(seed)
        n_rows = case.weight_shape[0]
        index = torch.randint(0, n_rows, case.index_shape, generator=generator, device=device)
        if case.hot:
            index[torch.rand(index.shape, generator=generator, device=device) < 0.9] = 0
        weight = torch.randn(case.weight_shape, generator=generator, device=device).to(dtype)
        arguments = {"input": index.to(case.index), "weight": _laid_out(weight, case.weight_layout)}
        yield SampleInput(case.name, {**arguments, **case.options}, ("weight",))


def strided_copy(tensor: Tensor) -> Tensor:
    """A detached copy with the same strides; `clone` would close the gaps of a sliced view."""
    storage = tensor.detach().untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def evaluate(op: Callable[..., Any], sample: SampleInput, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Calls `op` on copies of the sample's tensors and goes backward from its first result.

    dtype: converts every floating tensor first (float64: the oracle).

    Returns each result by name ("loss" for the single result of cross_entropy, "output" of embedding),
    "X.grad" for each differentiable argument X, and "weight" as an embedding with `max_norm` leaves it.
    """
    arguments = dict(sample.arguments)
    for name, value in arguments.items():
        if isinstance(value, Tensor):
            arguments[name] = strided_copy(value)
            if dtype is not None and value.is_floating_point():
                arguments[name] = value.detach().to(dtype, copy=True)
    for name in sample.differentiable:
        arguments[name].requires_grad_()
    output = op(**arguments)
    first_name = "loss" if "target" in arguments else "output"
    results = output._asdict() if isinstance(output, tuple) else {first_name: output}
    results = {name: value for name, value in results.items() if value is not None}

    first = results[first_name]
    cotangent = torch.randn(first.shape, generator=torch.Generator().manual_seed(0))
    # Rounded as the sample's own dtype would round it, so that float64 gets the same cotangent.
    cotangent = cotangent.to(sample.arguments[sample.differentiable[0]].dtype)
    first.backward(cotangent.to(first))
    for name in sample.differentiable:
        results[f"{name}.grad"] = arguments[name].grad.to_dense()
    if sample.arguments.get("max_norm") is not None:
        results["weight"] = arguments["weight"]
    return {name: value.detach() for name, value in results.items()}


@dataclass(frozen=True)
class Tolerance:
    """Factors of the baseline's root mean square error and of its largest error, plus so many ulps."""

    rms_factor: float = 1.05
    max_factor: float = 2.0
    ulps: float = 1.0


def tolerances(dtype: torch.dtype) -> Tolerance:
    """The bound for results of `dtype`."""
    if dtype == torch.float64:
        # The oracle is torch in float64, so the baseline's error reads as 0: what is left is the rounding of
        # both, seen to reach 10 ulps of the largest element over all samples (an entropy is a difference).
        return Tolerance(ulps=16.0)
    return Tolerance()


def assert_close_to_reference(actual: Tensor, baseline: Tensor, exact: Tensor, what: str = "result") -> None:
    """Fails if `actual` is further from `exact` than `baseline` is, by the rule at the top of this file.

    actual: the result that is judged. baseline: torch's, at the same dtype. exact: the same in float64. All
    of one shape. Integers must be equal to `baseline`, and so must infinities and NaNs, one by one.
    """
    assert actual.shape == baseline.shape, f"{what}: shape {tuple(actual.shape)}, torch's {tuple(baseline.shape)}"
    assert actual.dtype == baseline.dtype, f"{what}: dtype {actual.dtype}, torch's {baseline.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, baseline), f"{what}: differs from torch's"
        return
    tolerance = tolerances(actual.dtype)
    actual64, baseline64, exact = actual.double(), baseline.double(), exact.double()
    finite = baseline64.isfinite()
    special_equal = (actual64 == baseline64) | (actual64.isnan() & baseline64.isnan())
    assert special_equal[~finite].all(), f"{what}: an infinity or NaN of torch's is another value here"
    assert actual64[finite].isfinite().all(), f"{what}: not finite where torch's is"
    finite &= exact.isfinite()
    if not finite.any():
        return
    exact = exact[finite]
    error, baseline_error = (actual64[finite] - exact).abs(), (baseline64[finite] - exact).abs()
    floor = tolerance.ulps * _ulp(exact, actual.dtype)
    if actual.dtype == torch.float64:
        floor = floor.max()
    elif exact.numel() < FEW_ELEMENTS:
        floor = 3 * floor.max()
    rms, limit = _rms(error), tolerance.rms_factor * _rms(baseline_error) + _rms(floor)
    assert rms <= limit, f"{what}: RMS error {rms:.3e}, limit {limit:.3e} (torch's {_rms(baseline_error):.3e})"
    largest, limit = (error - floor).max().item(), tolerance.max_factor * baseline_error.max().item()
    assert largest <= limit, f"{what}: largest error, less the floor, is {largest:.3e}, limit {limit:.3e}"


def assert_matches_reference(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    sample: SampleInput,
) -> None:
    """Calls `op`, `reference`, and `reference` in float64 on one sample; compares results and gradients."""
    actual = evaluate(op, sample)
    baseline = evaluate(reference, sample)
    exact = evaluate(reference, sample, torch.float64)
    assert actual.keys() == baseline.keys()
    for name in actual:
        assert_close_to_reference(actual[name], baseline[name], exact[name], f"{sample.name}, {name}")


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at each of the float64 `values`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent).clamp(min=info.tiny * info.eps)
