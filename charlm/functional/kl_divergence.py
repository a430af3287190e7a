"""The Kullback-Leibler divergence of two distributions over classes."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks, reference

from .broadcasting import broadcast_shapes, result_dtype, upcast
from .kernels import _C, have_kernels

Kind: TypeAlias = Literal["logits", "log_probs", "probs"]

_KIND_NUMBERS = {name: number for number, name in enumerate(_checks.KINDS)}


def kl_divergence(p: Tensor, q: Tensor, *, p_kind: Kind = "logits", q_kind: Kind = "logits") -> Tensor:
    """KL(P || Q) = `sum_c p_c (log p_c - log q_c)`, in nats, of each row of p and q.

    What P costs beyond its entropy if it is coded for Q (Kullback and Leibler 1951). `kl_div` is torch's function of
    the same divergence: it takes log q first, then p, and sums over everything. Each side says what its numbers are,
    by its kind::

        "logits"      log p = x - log sum_c exp x_c
        "log_probs"   log p = x
        "probs"           p = x

    The gradients, of each kind::

        of p: p_c (log p_c - log q_c - KL)   p_c (log p_c - log q_c + 1)   log p_c - log q_c + 1
        of q: q_c sum_k p_k - p_c            -p_c                          -p_c / q_c

    One walk over both rows, and a second one for the gradients. KL is never negative, and exactly 0 for identical
    inputs, as are then the gradients of logits. A class of p_c = 0 adds nothing, 0 log 0 being 0, and has no gradient
    in p; one of p_c > 0 = q_c makes KL +inf, never NaN. There, what has no finite derivative has the gradient 0: p_c,
    q_c as a probability, and if p are logits every p of the row. Arithmetic is in float32 (float64 for float64) and
    each result is rounded once. Same bits for any number of threads.

    Args:
        p, q: (..., V), float32, float64, bfloat16 or float16, any strides; leading dimensions and dtypes are broadcast
            and promoted as torch's are. Log-probabilities and probabilities are taken as they are: whether they sum
            to 1 is not looked at.
        p_kind, q_kind: "logits", "log_probs" or "probs".

    Returns:
        (...), the promoted dtype; float32 under autocast. NaN for a row that holds NaN, and for logits with +inf or
        nothing but -inf. Differentiable to any order with respect to both.

    Raises:
        RuntimeError: shapes that do not fit, 0-d ones among them; tensors on two devices.
        ValueError: an unknown kind; on the CPU, a negative probability, with its value and position.
        NotImplementedError: tensors that are not of a floating dtype.

    Example:
        >>> p, q = torch.tensor([0.5, 0.5, 0.0]), torch.zeros(3)
        >>> kl_divergence(p, q, p_kind="probs")
        tensor(0.4055)
    """
    if has_torch_function_variadic(p, q):
        return handle_torch_function(kl_divergence, (p, q), p, q, p_kind=p_kind, q_kind=q_kind)
    has_kernels = have_kernels("kl_divergence", ("p", "q"), (p, q))
    _checks.choice("p_kind", p_kind, _checks.KINDS)
    _checks.choice("q_kind", q_kind, _checks.KINDS)
    if not has_kernels:
        return reference.kl_divergence(p, q, p_kind=p_kind, q_kind=q_kind)
    if p.shape == q.shape and p.dtype == q.dtype:
        result = _kl_div(p, q, _KIND_NUMBERS[p_kind], _KIND_NUMBERS[q_kind])
    else:
        wide_p, wide_q, dtype = _broadcast(p, q)
        result = _kl_div(wide_p, wide_q, _KIND_NUMBERS[p_kind], _KIND_NUMBERS[q_kind]).to(dtype)
    if p_kind == "probs" or q_kind == "probs":
        _checks.nonnegative_probabilities(result, ("p", p, p_kind), ("q", q, q_kind))
    return result


def _kl_div(p: Tensor, q: Tensor, p_kind: int, q_kind: int) -> Tensor:
    if torch.compiler.is_compiling():
        return torch.ops.charlm.kl_div.default(p, q, p_kind, q_kind)[0]
    return _C.kl_div(p, q, p_kind, q_kind)


def _broadcast(p: Tensor, q: Tensor) -> tuple[Tensor, Tensor, torch.dtype]:
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
