"""The Kullback-Leibler divergence of two distributions over classes."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks, reference

from .broadcasting import broadcast_shapes, result_dtype, upcast
from .kernels import _C, by_sharding_rule, have_kernels

Kind: TypeAlias = Literal["logits", "log_probs", "probs"]

_KIND_NUMBERS = {name: number for number, name in enumerate(_checks.KINDS)}


def kl_divergence(p: Tensor, q: Tensor, *, p_kind: Kind = "logits", q_kind: Kind = "logits") -> Tensor:
    """The Kullback-Leibler divergence KL(P || Q) in nats, of each row of p and q.

    Args:
        p, q: (..., V); float32, float64, bfloat16 or float16; any strides. Leading dimensions are broadcast and dtypes
            are promoted as torch's are. Whether log-probabilities and probabilities sum to 1 is not checked.
        p_kind, q_kind: what the numbers are: "logits", "log_probs" or "probs".

    Returns:
        (...), the promoted dtype; float32 under autocast. At least 0, and exactly 0 for identical inputs. +inf where a
        class has p_c > 0 and q_c = 0. NaN for a row that holds NaN, and for logits with +inf or nothing but -inf.
        Differentiable to any order with respect to both.

    Raises:
        RuntimeError: shapes that do not fit, 0-d tensors among them; tensors on two devices.
        ValueError: an unknown kind; on the CPU, a negative probability, with its value and position.
        NotImplementedError: tensors that are not of a floating dtype.

    Formula:
        KL(P || Q) = sum_c p_c (log p_c - log q_c), with 0 log 0 = 0 (Kullback and Leibler 1951). The kinds and the
        gradients of each kind are::

                            "logits"                        "log_probs"                     "probs"
            log p_c =       x_c - log sum_k exp x_k         x_c                             log x_c
            dKL/dp:         p_c (log p_c - log q_c - KL)    p_c (log p_c - log q_c + 1)     log p_c - log q_c + 1
            dKL/dq:         q_c sum_k p_k - p_c             -p_c                            -p_c / q_c

    Example:
        >>> p, q = torch.tensor([0.5, 0.5, 0.0]), torch.zeros(3)
        >>> kl_divergence(p, q, p_kind="probs")
        tensor(0.4055)

    Note:
        A class of p_c = 0 adds nothing and has no gradient in p. Where KL is +inf, derivatives that are not finite are
        0: those of p_c, of q_c as a probability, and, for logits p, of the whole row of p. The gradients of logits are
        exactly 0 for identical inputs.

        One pass over both rows computes the divergence, and a second one the gradients. `kl_div` is torch's function:
        it takes log q first, then p, and reduces over all elements.
    """
    if has_torch_function_variadic(p, q):
        return handle_torch_function(kl_divergence, (p, q), p, q, p_kind=p_kind, q_kind=q_kind)
    has_kernels = have_kernels("kl_divergence", ("p", "q"), (p, q))
    _checks.choice("p_kind", p_kind, _checks.KINDS)
    _checks.choice("q_kind", q_kind, _checks.KINDS)
    if not has_kernels:
        result = by_sharding_rule("kl_divergence", (p, q), p_kind=p_kind, q_kind=q_kind)
        if result is not NotImplemented:
            return result
        return reference.kl_divergence(p, q, p_kind=p_kind, q_kind=q_kind)
    if p.shape == q.shape and p.dtype == q.dtype:
        result = _kl_div(p, q, _KIND_NUMBERS[p_kind], _KIND_NUMBERS[q_kind])
    else:
        wide_p, wide_q, dtype = broadcast_distributions(p, q)
        result = _kl_div(wide_p, wide_q, _KIND_NUMBERS[p_kind], _KIND_NUMBERS[q_kind]).to(dtype)
    if p_kind == "probs" or q_kind == "probs":
        _checks.nonnegative_probabilities(result, ("p", p, p_kind), ("q", q, q_kind))
    return result


def _kl_div(p: Tensor, q: Tensor, p_kind: int, q_kind: int) -> Tensor:
    if is_compiling():
        return torch.ops.charlm.kl_div.default(p, q, p_kind, q_kind)[0]
    return _C.kl_divergence(p, q, p_kind, q_kind)


def broadcast_distributions(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
    """p and q in one dtype and shape (..., V), as torch promotes and broadcasts, and the dtype of their divergence.

    Half types that are expanded become float32: the gradient of the smaller tensor is a sum, which is rounded once.
    """
    for x in (p, q):
        if not x.is_floating_point():
            raise NotImplementedError(f'"kl_divergence" not implemented for {x.dtype}')
    if p.dim() < 1 or q.dim() < 1 or p.shape[-1] != q.shape[-1]:
        raise RuntimeError(
            f"p and q must be of shape (..., V) with the same number of classes V, got {list(p.shape)} "
            f"and {list(q.shape)}"
        )
    dtype = torch.promote_types(p.dtype, q.dtype)
    p, q = p.to(dtype), q.to(dtype)
    dtype = result_dtype(p)
    if p.shape == q.shape:
        return p, q, dtype
    leading = broadcast_shapes(p.shape[:-1], q.shape[:-1], f"p and q of shapes {list(p.shape)} and {list(q.shape)}")
    p, q = (upcast(x).expand(*leading, x.shape[-1]) for x in (p, q))
    return p, q, dtype
