"""The contender JAX: `jit` of the usual formula, loss and gradient, on the CPU.

Results are waited for: JAX returns before it has computed them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.cases import Case
from bench.inputs import CrossEntropyInputs, EmbeddingInputs
from bench.jax_runtime import array, load


def contender(case: Case, inputs: CrossEntropyInputs | EmbeddingInputs) -> Callable[[], object]:
    jax = load()
    if case.op == "cross_entropy":
        function, arguments = _cross_entropy(jax, case, inputs)
    else:
        function, arguments = _embedding(jax, case, inputs)
    compiled = jax.jit(function)
    return lambda: jax.block_until_ready(compiled(*arguments))


def _cross_entropy(jax: Any, case: Case, inputs: CrossEntropyInputs) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    jnp = jax.numpy
    weight = inputs.options.get("weight")
    weight = None if weight is None else array(jax, weight)
    smoothing = inputs.options.get("label_smoothing", 0.0)
    cotangent = None if inputs.cotangent is None else array(jax, inputs.cotangent)

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
    arguments = (array(jax, inputs.logits), array(jax, target))
    if case.variant == "forward_only":
        return mean, arguments
    if cotangent is not None:
        return jax.value_and_grad(weighted_sum, has_aux=True), arguments
    return jax.value_and_grad(mean), arguments


def _embedding(jax: Any, case: Case, inputs: EmbeddingInputs) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    index = inputs.index if inputs.index.dtype == torch.uint8 else inputs.index.to(torch.int32)
    index, weight = array(jax, index), array(jax, inputs.weight)
    if case.op == "embedding":
        return lambda weight, index: weight[index], (weight, index)

    def weight_gradient(weight: Any, index: Any, gradient: Any) -> Any:
        return jax.vjp(lambda table: table[index], weight)[1](gradient)[0]

    return weight_gradient, (weight, index, array(jax, inputs.gradient))
