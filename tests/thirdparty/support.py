"""Runs a call with torch's functions and with charlm's, and compares what comes out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from charlm.testing.comparison import assert_close_to_reference

Results = list[torch.Tensor | None]


class CountCharlmOps(TorchDispatchMode):
    """Counts the calls of each op of charlm's namespace by its name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "charlm":
            name = func.overloadpacket.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def fresh(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of a tensor that is a leaf, since an op may change its argument (`max_norm`); other values as they are.

    dtype: converts the floating ones.
    """
    if not isinstance(value, torch.Tensor):
        return value
    copy = value.detach().clone()
    if dtype is not None and copy.is_floating_point():
        copy = copy.to(dtype)
    return copy.requires_grad_(value.requires_grad)


def outputs_and_gradients(out: torch.Tensor, inputs: list[torch.Tensor], rounded_to: torch.dtype) -> Results:
    """The output, then the gradient of each input for a random gradient of the output that `rounded_to` can hold."""
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(rounded_to).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad, allow_unused=True)]


def assert_same(found: Results, expected: Results, where: object, exact: Callable[[], Results]) -> None:
    """Equal within the default tolerances of torch.testing for the dtype; NaN equals NaN.

    torch rounds between its ops to 16 bits, which alone exceeds these tolerances. Of such results, those that differ
    by more are held to charlm's rule: no further than torch's from torch's in float64, which `exact` computes.
    """
    assert len(found) == len(expected)
    for number, (ours, torchs) in enumerate(zip(found, expected, strict=True)):
        if torchs is not None and torchs.dtype in (torch.float16, torch.bfloat16) and not is_close(ours, torchs):
            assert_close_to_reference(ours, torchs, exact()[number], f"{where}, result {number}")
        else:
            torch.testing.assert_close(ours, torchs, equal_nan=True, msg=lambda text: f"{where}\n{text}")


def is_close(ours: torch.Tensor | None, torchs: torch.Tensor) -> bool:
    try:
        torch.testing.assert_close(ours, torchs, equal_nan=True)
    except AssertionError:
        return False
    return True


def raised(call: Callable[[], object]) -> type[BaseException]:
    """The type of the error that `call` raises."""
    try:
        call()
    except Exception as error:
        return type(error)
    return pytest.fail("no error")
