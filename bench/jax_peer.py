"""The contender JAX: `jit` of the usual formula, loss and gradient, on the CPU.

XLA's threads are as many as the cores and cannot be changed once it runs, so it takes part only where torch uses all
cores too. Results are waited for: JAX returns before it has computed them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case
from bench.inputs import CrossEntropyInputs, EmbeddingInputs


class Unavailable(RuntimeError):
    """A contender that cannot take part here; the text says why."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def contender(case: Case, inputs: CrossEntropyInputs | EmbeddingInputs) -> Callable[[], object]:
    if torch.get_num_threads() != cores():
        raise Unavailable(f"XLA uses {cores()} threads, not {torch.get_num_threads()}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
    except ImportError as error:
        raise Unavailable("jax is not installed") from error

    jax.config.update("jax_enable_x64", True)  # else float64 becomes float32
    if case.op == "cross_entropy":
        function, arguments = _cross_entropy(jax, case, inputs)
    else:
        function, arguments = _embedding(jax, case, inputs)
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*arguments))


def _cross_entropy(jax: Any, case: Case, inputs: CrossEntropyInputs) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    jnp = jax.numpy
    weight = inputs.options.get("weight")
    weight = None if weight is None else _array(jax, weight)
    smoothing = inputs.options.get("label_smoothing", 0.0)
    cotangent = None if inputs.cotangent is None else _array(jax, inputs.cotangent)

    def losses(logits: Any, target: Any) -> tuple[Any, Any]:
        """Of each row, and each row's share of the mean."""
        if case.variant == "probabilities":
            return -(target * jax.nn.log_softmax(logits)).sum(-1), jnp.ones(len(logits), logits.dtype)
        valid = target != -100
        index = jnp.where(valid, target, 0)
        lse = jax.nn.logsumexp(logits, axis=-1)
        loss = lse - jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0]
        if smoothing:
            loss = (1 - smoothing) * loss + smoothing * (lse - logits.mean(-1))
        share = jnp.ones_like(lse) if weight is None else weight[index]
        if case.variant == "ignore_index":
            share = jnp.where(valid, share, 0)
        return loss * share, share

    def mean(logits: Any, target: Any) -> Any:
        loss, share = losses(logits, target)
        if case.variant in ("weight", "ignore_index"):
            return loss.sum() / share.sum()
        return loss.mean()

    def weighted_sum(logits: Any, target: Any) -> tuple[Any, Any]:
        loss = losses(logits, target)[0]
        return (loss * cotangent).sum(), loss

    target = inputs.target if case.variant == "probabilities" else inputs.target.to(torch.int32)
    arguments = (_array(jax, inputs.logits), _array(jax, target))
    if case.variant == "forward_only":
        return mean, arguments
    if cotangent is not None:
        return jax.value_and_grad(weighted_sum, has_aux=True), arguments
    return jax.value_and_grad(mean), arguments


def _embedding(jax: Any, case: Case, inputs: EmbeddingInputs) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    index = inputs.index if inputs.index.dtype == torch.uint8 else inputs.index.to(torch.int32)
    index, weight = _array(jax, index), _array(jax, inputs.weight)
    if case.op == "embedding":
        return lambda weight, index: weight[index], (weight, index)

    def weight_gradient(weight: Any, index: Any, gradient: Any) -> Any:
        return jax.vjp(lambda table: table[index], weight)[1](gradient)[0]

    return weight_gradient, (weight, index, _array(jax, inputs.gradient))


def _array(jax: Any, tensor: Tensor) -> Any:
    """A copy: contenders write over their own memory."""
    return jax.numpy.array(jax.numpy.from_dlpack(tensor.detach()), copy=True)
