"""A whole training step of the 2003 MLP: rows drawn and indexed, forward, backward, AdamW. Shape: (batch, T, D, H, V).

Each contender trains a model of its own, all from the same weights and the same rows. The check compares the loss and
the gradients of ours' first step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import jax_runtime
from bench.cases import Case
from bench.layers.compare import assert_as_close_as_torch
from charlm import functional

Call = Callable[[], Any]
EXAMPLES = 1 << 17
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.99), 1e-8, 1e-2
PARAMETERS = ("embedding", "hidden", "hidden_bias", "head", "head_bias")
SEED = 1


@dataclass(frozen=True)
class Inputs:
    """contexts: (EXAMPLES, T) and targets: (EXAMPLES), uint8 or int16 tokens. weights: C (V, D), W (H, T * D), b (H),
    U (V, H), d (V)."""

    batch: int
    contexts: Tensor
    targets: Tensor
    weights: tuple[Tensor, ...]

    def parameters(self, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        return [w.to(dtype, copy=True).requires_grad_() for w in self.weights]

    def rows(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(self.contexts), (self.batch,), generator=generator)
        return self.contexts.index_select(0, index), self.targets.index_select(0, index)


def make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    batch, t, d, h, v = case.shape

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator).mul_(scale)

    tokens = torch.int16 if v > 256 else torch.uint8
    return Inputs(
        batch,
        torch.randint(v, (EXAMPLES, t), generator=generator).to(tokens),
        torch.randint(v, (EXAMPLES,), generator=generator).to(tokens),
        (
            normal(v, d),
            normal(h, t * d, scale=(t * d) ** -0.5),
            torch.zeros(h),
            normal(v, h, scale=0.1 * h**-0.5),
            torch.zeros(v),
        ),
    )


def names(case: Case) -> list[str]:
    return ["ours", "eager", "compile", "jax"]


def build(name: str, case: Case, inputs: Inputs) -> Call:
    if name == "jax":
        return _jax(inputs)
    loss_of = _our_loss if name == "ours" else _loss
    if name == "compile":
        torch.compiler.reset()
        loss_of = torch.compile(loss_of, dynamic=False, fullgraph=True)
    parameters = inputs.parameters()
    optimizer = torch.optim.AdamW(
        parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
    )
    generator = torch.Generator().manual_seed(SEED)

    def step() -> tuple[Tensor, ...]:
        contexts, targets = inputs.rows(generator)
        for parameter in parameters:
            parameter.grad = None
        loss = loss_of(contexts, targets, *parameters)
        loss.backward()
        optimizer.step()
        return loss, *(p.grad for p in parameters)

    return step


def _our_loss(
    contexts: Tensor,
    targets: Tensor,
    embedding: Tensor,
    hidden: Tensor,
    hidden_bias: Tensor,
    head: Tensor,
    d: Tensor,
) -> Tensor:
    h = functional.embedding_linear(contexts, embedding, hidden, hidden_bias, activation="tanh")
    return functional.linear_cross_entropy(h, head, targets, linear_bias=d)


def _loss(
    contexts: Tensor,
    targets: Tensor,
    embedding: Tensor,
    hidden: Tensor,
    hidden_bias: Tensor,
    head: Tensor,
    d: Tensor,
) -> Tensor:
    h = torch.tanh(F.linear(F.embedding(contexts.long(), embedding).flatten(1), hidden, hidden_bias))
    return F.cross_entropy(F.linear(h, head, d), targets.long())


def _jax(inputs: Inputs) -> Call:
    jax = jax_runtime.load()
    jnp = jax.numpy

    def loss_of(parameters: list[Any], contexts: Any, targets: Any) -> Any:
        embedding, hidden, hidden_bias, head, bias = parameters
        h = jnp.tanh(embedding[contexts].reshape(len(contexts), -1) @ hidden.T + hidden_bias)
        logits = h @ head.T + bias
        picked = jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()

    def step(state: tuple[Any, ...], contexts: Any, targets: Any) -> tuple[Any, ...]:
        parameters, means, squares, count, key = state
        key, drawn = jax.random.split(key)
        index = jax.random.randint(drawn, (inputs.batch,), 0, len(contexts))
        x, y = contexts[index].astype(jnp.int32), targets[index].astype(jnp.int32)
        loss, grads = jax.value_and_grad(loss_of)(parameters, x, y)
        count = count + 1
        means = [BETAS[0] * m + (1 - BETAS[0]) * g for m, g in zip(means, grads, strict=True)]
        squares = [BETAS[1] * s + (1 - BETAS[1]) * g * g for s, g in zip(squares, grads, strict=True)]
        corrected = [1 - beta**count for beta in BETAS]
        parameters = [
            p * (1 - LEARNING_RATE * WEIGHT_DECAY)
            - LEARNING_RATE * (m / corrected[0]) / (jnp.sqrt(s / corrected[1]) + EPS)
            for p, m, s in zip(parameters, means, squares, strict=True)
        ]
        return loss, (parameters, means, squares, count, key)

    compiled = jax.jit(step, donate_argnums=0)
    parameters = [jax_runtime.array(jax, w) for w in inputs.weights]
    zeros = [jnp.zeros_like(p) for p in parameters]
    state = (parameters, zeros, [jnp.zeros_like(p) for p in parameters], jnp.float32(0), jax.random.key(SEED))
    contexts, targets = (jax_runtime.array(jax, t) for t in (inputs.contexts, inputs.targets))

    def call() -> None:
        nonlocal state
        _, state = compiled(state, contexts, targets)
        jax.block_until_ready(state)

    return call


def check(inputs: Inputs, result: tuple[Tensor, ...]) -> None:
    contexts, targets = inputs.rows(torch.Generator().manual_seed(SEED))

    def evaluate(dtype: torch.dtype) -> dict[str, Tensor]:
        parameters = inputs.parameters(dtype)
        loss = _loss(contexts, targets, *parameters)
        grads = torch.autograd.grad(loss, parameters)
        return {"loss": loss.detach(), **dict(zip(PARAMETERS, grads, strict=True))}

    results = dict(zip(("loss", *PARAMETERS), (t.detach() for t in result), strict=True))
    assert_as_close_as_torch(results, evaluate, torch.float32)


def elements(case: Case) -> int:
    batch, t, d, h, v = case.shape
    return EXAMPLES * (t + 1) + batch * (t * d + h + v) + 4 * _parameters(case)


def _parameters(case: Case) -> int:
    _, t, d, h, v = case.shape
    return v * d + h * t * d + h + v * h + v


def minimal_bytes(case: Case) -> int:
    batch, t, _, _, v = case.shape
    token = 2 if v > 256 else 1
    return batch * (t + 1) * token + 4 * 7 * _parameters(case)  # three states read and written, a gradient written


def output_bytes(case: Case) -> int:
    return 4 * _parameters(case)
