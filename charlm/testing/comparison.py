"""Evaluation of one sample and its gradients, and the rule that judges the results."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from charlm.functional import CrossEntropyOutput

from .samples import FLOAT64_ULPS, SampleInput

RMS_FACTOR = 1.05  # the largest ratio of the root mean square errors, ours to the baseline's
MAX_FACTOR = 2.0  # the largest ratio of the largest errors
# The largest error of fewer elements depends on chance. Over thousands of rows of 27 classes ours is 0.8 to 1.5 times
# torch's, but for one row torch's was a tenth of an ulp of the largest element and ours two: three ulps are allowed.
FEW_ELEMENTS = 1024


def strided_copy(tensor: Tensor) -> Tensor:
    """A detached copy with the same strides; `clone` would remove the gaps of a sliced view."""
    storage = tensor.detach().untyped_storage().clone()
    return torch.empty(0, dtype=tensor.dtype, device=tensor.device).set_(
        storage, tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def evaluate(op: Callable[..., Any], sample: SampleInput, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Calls `op` on copies of the sample's tensors and runs backward from its first result.

    Args:
        op: a function of `charlm.functional` or `charlm.reference`, or one with the same arguments.
        sample: the arguments of the call.
        dtype: the dtype that floating tensors are converted to first; None leaves them as they are.

    Returns:
        The results by name: "loss" for functions with a `target`, else "output"; the other fields of a
        `CrossEntropyOutput`; "X.grad" for each differentiable argument X; and "weight" as an embedding with `max_norm`
        leaves it.
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
    # Rounded to the sample's own dtype, so that float64 gets the same cotangent.
    cotangent = cotangent.to(sample.arguments[sample.differentiable[0]].dtype)
    first.backward(cotangent.to(first))
    for name in sample.differentiable:
        results[f"{name}.grad"] = arguments[name].grad.to_dense()
    if sample.arguments.get("max_norm") is not None:
        results["weight"] = arguments["weight"]
    return {name: value.detach() for name, value in results.items()}


def assert_close_to_reference(
    actual: Tensor, baseline: Tensor, exact: Tensor, what: str = "result", float64_ulps: float = FLOAT64_ULPS
) -> None:
    """Asserts that `actual` is not further from `exact` than `baseline` is, by the rule of this package.

    Args:
        actual: the result that is judged.
        baseline: the reference's result in the same dtype and shape.
        exact: the reference's result in float64.
        what: the name of the result in an error.
        float64_ulps: the error, in ulps of the largest element, that is always allowed for float64.

    Raises:
        AssertionError: the errors are too large; integers, infinities or NaNs differ from the baseline's.
    """
    assert actual.shape == baseline.shape, f"{what}: shape {tuple(actual.shape)}, torch's {tuple(baseline.shape)}"
    assert actual.dtype == baseline.dtype, f"{what}: dtype {actual.dtype}, torch's {baseline.dtype}"
    if not actual.is_floating_point():
        assert torch.equal(actual, baseline), f"{what}: differs from torch's"
        return
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
    slack = _ulp(exact, actual.dtype)
    if actual.dtype == torch.float64:
        # The oracle is torch in float64 too, so the baseline's error is 0 and only these ulps are left.
        slack = float64_ulps * slack.max()
    elif exact.numel() < FEW_ELEMENTS:
        slack = 3 * slack.max()
    rms, limit = _rms(error), RMS_FACTOR * _rms(baseline_error) + _rms(slack)
    assert rms <= limit, f"{what}: RMS error {rms:.3e}, limit {limit:.3e} (torch's {_rms(baseline_error):.3e})"
    largest, limit = (error - slack).max().item(), MAX_FACTOR * baseline_error.max().item()
    assert largest <= limit, f"{what}: largest error, less the allowed ulps, is {largest:.3e}, limit {limit:.3e}"


def assert_matches_reference(
    op: Callable[..., Any],
    reference: Callable[..., Any],
    sample: SampleInput,
) -> None:
    """Evaluates `op`, `reference`, and `reference` in float64 on one sample and compares results and gradients.

    Args:
        op: the function that is judged.
        reference: the function of the same arguments in `charlm.reference`.
        sample: the arguments of the call.

    Raises:
        AssertionError: as in `assert_close_to_reference`, for any result or gradient.
    """
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
