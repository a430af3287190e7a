"""Checks of the arguments of the public functions, and their errors.

The compiled module accepts the common types itself and calls these functions for everything else, so that eager mode,
`torch.compile` and the fallback accept and refuse the same arguments with the same text. `charlm.reference` has checks
of its own.
"""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import _reduction

_INT64_MAX = torch.iinfo(torch.int64).max

ACTIVATIONS = ("none", "tanh", "relu", "gelu")
PLANS = ("auto", "folded", "gathered")
KINDS = ("logits", "log_probs", "probs")

# How to write a call with a differentiable option, if there is a simple way.
_WITH_GRADIENT = {
    "logit_scale": "Scale the logits instead: cross_entropy(x * s, t). ",
    "softcap": "Cap the logits instead: cross_entropy(c * torch.tanh(x / c), t). ",
}


def tensor(function: str, name: str, value: Any) -> None:
    """TypeError if `value` is not a Tensor. A name that ends in "?" may be None, as in a schema."""
    if not (isinstance(value, Tensor) or (value is None and name.endswith("?"))):
        raise TypeError(f"{function}(): argument {name.rstrip('?')!r} must be Tensor, not {type(value).__name__}")


def tensors(function: str, names: Sequence[str], values: Sequence[Any]) -> None:
    for name, value in zip(names, values, strict=True):
        tensor(function, name, value)


def number(function: str, name: str, value: Any) -> float:
    """A float, from a number or a 0-d tensor without a gradient."""
    if isinstance(value, Tensor):
        value = _constant(function, name, "float", value)
    if isinstance(value, (torch.SymInt, torch.SymFloat)):
        return value
    if not isinstance(value, numbers.Real):
        raise TypeError(f"{function}(): argument {name!r} must be float, not {type(value).__name__}")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{function}(): argument {name!r} is too large for a float") from None


def integer(function: str, name: str, value: Any) -> int:
    """A 64-bit int, from an integer or a 0-d integer tensor without a gradient; bool is refused, as by torch."""
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TypeError(f"{function}(): argument {name!r} must be int, not Tensor of dtype {value.dtype}")
        value = _constant(function, name, "int", value)
    if isinstance(value, torch.SymInt):
        return value
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{function}(): argument {name!r} must be int, not {type(value).__name__}")
    if not -_INT64_MAX - 1 <= value <= _INT64_MAX:
        raise ValueError(f"{function}(): argument {name!r} must fit into 64 bits, got {value}")
    return int(value)


def memory_budget(value: Any) -> int:
    """Bytes: TypeError for anything but an int, ValueError for one that is not positive."""
    budget = integer("linear_cross_entropy", "memory_budget", value)
    if budget <= 0:
        raise ValueError(f"memory_budget must be > 0, got {budget}")
    return budget


def boolean(function: str, name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{function}(): argument {name!r} must be bool, not {type(value).__name__}")
    return value


def dtype(name: str, value: Any) -> torch.dtype | None:
    """TypeError if `value` is neither a dtype nor None."""
    if value is not None and not isinstance(value, torch.dtype):
        raise TypeError(f"{name} must be a torch.dtype or None, not {type(value).__name__}")
    return value


def choice(name: str, value: Any, choices: Sequence[str | None]) -> None:
    """ValueError if `value` is not in `choices`."""
    if not (value is None or isinstance(value, str)) or value not in choices:
        shown = ["None" if one is None else f'"{one}"' for one in choices]
        raise ValueError(f"{name} must be {', '.join(shown[:-1])} or {shown[-1]}, got {value!r}")


def reduction_number(reduction: Any) -> int:
    """torch's number of a reduction: 0 "none", 1 "mean", 2 "sum"; ValueError for any other name."""
    return _reduction.get_enum(reduction)


def softcap_number(function: str, softcap: Any) -> float:
    """The softcap as a float; 0.0 for None."""
    if softcap is None:
        return 0.0
    softcap = number(function, "softcap", softcap)
    if not softcap > 0:
        raise ValueError(f"softcap must be > 0, got {softcap}")
    return softcap


def padding_row(function: str, padding_idx: Any, num_embeddings: int) -> int:
    """The row of `padding_idx`, which may be negative; -1 for None. AssertionError, as in torch, for no such row."""
    if padding_idx is None:
        return -1
    padding_idx = integer(function, "padding_idx", padding_idx)
    if not -num_embeddings <= padding_idx < num_embeddings:
        raise AssertionError(f"padding_idx {padding_idx} must be within num_embeddings {num_embeddings}")
    return padding_idx % num_embeddings


def activation_and_plan(activation: Any, plan: Any) -> None:
    """ValueError for an unknown activation or plan of `embedding_linear`."""
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}")
    if plan not in PLANS:
        raise ValueError(f"plan must be one of {', '.join(PLANS)}, got {plan!r}")


def linear_shapes(input: Tensor, linear_weight: Tensor, linear_bias: Tensor | None) -> None:
    """RuntimeError, with torch's text, for a linear layer whose tensors do not fit each other."""
    if input.dim() < 1 or input.dim() > 2:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}")
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    if linear_bias is not None and linear_bias.shape != linear_weight.shape[:-1]:
        raise RuntimeError(
            f"expected linear_bias shape {tuple(linear_weight.shape[:-1])}, got {tuple(linear_bias.shape)}"
        )
    if linear_weight.dim() > 2 and input.dim() == 1:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} requires batched input, "
            f"(N, {input.shape[-1]}), got unbatched input with shape {tuple(input.shape)}"
        )


def nonnegative_probabilities(result: Tensor, *sides: tuple[str, Tensor, str]) -> None:
    """ValueError, with the value and its position, for a negative probability.

    A negative probability makes `result` NaN, so the probabilities are read only where a NaN is found. Tensors on
    another device than the CPU are not read, since that would wait for the device; traced and transformed ones have no
    values.

    Args:
        result: the divergence.
        sides: name, tensor and kind of each distribution.
    """
    if torch.compiler.is_compiling() or type(result) is not Tensor or not result.is_cpu:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(result) or not result.isnan().any():
        return
    for name, values, kind in sides:
        negative = (values < 0).nonzero() if kind == "probs" else ()
        if len(negative) > 0:
            position = tuple(negative[0].tolist())
            raise ValueError(f"{name} must hold probabilities, but is {values[position].item()} at position {position}")


def is_kernel_tensor(value: Tensor) -> bool:
    """Whether the kernels support the layout, the dtype and the class of a tensor."""
    return value.layout is torch.strided and not value.is_quantized and not has_dispatch(value)


def has_dispatch(value: Tensor) -> bool:
    """Whether a tensor's class implements torch's ops and does not know charlm's (DTensor, quantised weights).

    False for fake and functional tensors, by which torch traces: they use an op's Meta kernel.
    """
    from torch._subclasses.fake_tensor import FakeTensor
    from torch._subclasses.functional_tensor import FunctionalTensor

    return type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__ and not isinstance(
        value, (FakeTensor, FunctionalTensor)
    )


def _constant(function: str, name: str, kind: str, value: Tensor) -> int | float:
    if value.dim() != 0:
        raise TypeError(f"{function}(): argument {name!r} must be {kind}, not Tensor of shape {tuple(value.shape)}")
    reason = None
    if value.requires_grad:
        reason = "requires grad"
    elif torch._C._functorch.is_functorch_wrapped_tensor(value):
        reason = "is transformed by torch.func"
    elif torch.autograd.forward_ad.unpack_dual(value).tangent is not None:
        reason = "carries a forward-mode gradient"
    if reason is not None:
        raise TypeError(
            f"{function}(): argument {name!r} must be {kind}, not a Tensor that {reason}: an option has no gradient. "
            f"{_WITH_GRADIENT.get(name, '')}A constant is {name}.item()."
        )
    return value.item()
