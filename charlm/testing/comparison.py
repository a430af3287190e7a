"""One sample called and differentiated, and the rule by which its results are judged."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from charlm.functional import CrossEntropyOutput

from .samples import FLOAT64_ULPS, SampleInput

# The largest error of so few elements is luck: over thousands of rows of 27 classes ours is 0.8 to 1.5 times
# torch's, but on one row torch's was seen at a tenth of an ulp of the largest element and ours at two. There the
# floor is three of them.
FEW_ELEMENTS = 1024


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
    results = CrossEntropyOutput(*output)._asdict() if isinstance(output, tuple) else {first_name: output}
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


def tolerances(dtype: torch.dtype, float64_ulps: float = FLOAT64_ULPS) -> Tolerance:
    """The bound for results of `dtype`."""
    if dtype == torch.float64:
        # The oracle is torch in float64, so the baseline's error reads as 0: what is left is the rounding of both.
        return Tolerance(ulps=float64_ulps)
    return Tolerance()


def assert_close_to_reference(
    actual: Tensor, baseline: Tensor, exact: Tensor, what: str = "result", float64_ulps: float = FLOAT64_ULPS
) -> None:
    """Fails if `actual` is further from `exact` than `baseline` is, by the rule of this package.

    actual: the result that is judged. baseline: torch's, at the same dtype. exact: the same in float64. All
    of one shape. Integers must be equal to `baseline`, and so must infinities and NaNs, one by one.
    """
    assert actual.shape == baseline.shape, f"{what}: shape {tuple(actual.shape)}, torch's {tuple(baseline.shape)}"
    assert actual.dtype == baseline.dtype, f"{what}: dtype {actual.dtype}, torch's {baseline.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, baseline), f"{what}: differs from torch's"
        return
    tolerance = tolerances(actual.dtype, float64_ulps)
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
        what = f"{sample.name}, {name}"
        assert_close_to_reference(actual[name], baseline[name], exact[name], what, sample.float64_ulps)


def _rms(values: Tensor) -> float:
    return values.square().mean().sqrt().item()


def _ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance of neighbouring numbers of `dtype` at each of the float64 `values`."""
    info = torch.finfo(dtype)
    exponent = torch.frexp(values).exponent - 1
    return torch.ldexp(torch.full_like(values, info.eps), exponent).clamp(min=info.tiny * info.eps)
