"""A training step of the 2003 MLP: rows drawn and indexed, forward, backward, AdamW. Shape: (batch, T, D, H, V).

Variants: "default"; "gradients", forward and backward of fixed rows alone; "graph", the same captured in a CUDA graph.
"drop_in" is torch's model with charlm's embedding and loss in place of torch's.

Each provider trains a model of its own, all from the same weights and rows. The check compares the loss and the
gradients of charlm's first step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers import Call, Unavailable, Workload, assert_close, compiled, gradients_with, load_jax, to_jax
from charlm import functional

EXAMPLES = 1 << 17
LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.99), 1e-8, 1e-2
SEED = 1


class TrainStep(Workload):
    """leaves: C (V, D), W (H, T * D), b (H), U (V, H), d (V). arguments: contexts (EXAMPLES, T), targets (EXAMPLES)."""

    labels = ("loss", "embedding", "hidden", "hidden_bias", "head", "head_bias")
    gpu_peers = ("drop_in",)

    def make(self, batch: int, t: int, d: int, h: int, v: int) -> None:
        self.batch = batch
        token = torch.int16 if v > 256 else torch.uint8
        self.arguments = (self.integers(v, EXAMPLES, t).to(token), self.integers(v, EXAMPLES).to(token))
        self.leaves = (
            self.normal(v, d),
            self.normal(h, t * d, scale=(t * d) ** -0.5),
            torch.zeros(h, dtype=self.dtype),
            self.normal(v, h, scale=0.1 * h**-0.5),
            torch.zeros(v, dtype=self.dtype),
        )

    def elements(self) -> int:
        batch, t, d, h, v = self.case.shape
        return EXAMPLES * (t + 1) + batch * (t * d + h + v) + 4 * super().elements()

    def minimal_bytes(self) -> int:
        """Of the parameters three states are read and written, and a gradient is written."""
        tokens = sum(t.nbytes for t in self.arguments) * self.batch // EXAMPLES
        return tokens + 7 * sum(t.nbytes for t in self.leaves)

    def rows(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        contexts, targets = self.arguments
        index = torch.randint(len(contexts), (self.batch,), generator=generator, device=self.device)
        return contexts.index_select(0, index), targets.index_select(0, index)

    def forward(self, provider: str) -> Callable[..., Tensor]:
        def ours(c: Tensor, w: Tensor, b: Tensor, u: Tensor, d: Tensor, contexts: Tensor, targets: Tensor) -> Tensor:
            h = functional.embedding_linear(contexts, c, w, b, activation="tanh")
            return functional.linear_cross_entropy(h, u, targets, linear_bias=d)

        def by_torch(
            c: Tensor, w: Tensor, b: Tensor, u: Tensor, d: Tensor, contexts: Tensor, targets: Tensor
        ) -> Tensor:
            h = torch.tanh(F.linear(F.embedding(contexts.long(), c).flatten(1), w, b))
            return F.cross_entropy(F.linear(h, u, d), targets.long())

        def drop_in(c: Tensor, w: Tensor, b: Tensor, u: Tensor, d: Tensor, contexts: Tensor, targets: Tensor) -> Tensor:
            h = torch.tanh(F.linear(functional.embedding(contexts, c).flatten(1), w, b))
            return functional.cross_entropy(F.linear(h, u, d), targets)

        return {"ours": ours, "drop_in": drop_in}.get(provider, by_torch)

    def build(self, name: str) -> Call:
        if name == "jax" and self.case.variant == "default":
            return self.jax_call()
        if name == "jax":
            raise Unavailable("its step has an optimizer")
        loss_of = compiled(self.forward("eager")) if name == "compile" else self.forward(name)
        parameters = [w.clone().requires_grad_() for w in self.leaves]
        optimizer = torch.optim.AdamW(
            parameters, lr=LEARNING_RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, fused=True
        )
        generator = torch.Generator(self.device).manual_seed(SEED)
        if self.case.variant != "default":
            return self.gradients(loss_of, parameters, self.rows(generator))

        def step() -> tuple[Tensor, ...]:
            rows = self.rows(generator)
            for parameter in parameters:
                parameter.grad = None
            loss = loss_of(*parameters, *rows)
            loss.backward()
            optimizer.step()
            return loss, *(p.grad for p in parameters)

        return step

    def gradients(self, loss_of: Callable[..., Tensor], parameters: list[Tensor], rows: tuple[Tensor, ...]) -> Call:
        """The loss and the gradients, launched by Python or, for "graph" on a GPU, by a CUDA graph."""

        gradients = gradients_with(None)

        def call() -> tuple[Tensor, ...]:
            loss = loss_of(*parameters, *rows)
            return loss, *gradients(loss, parameters)

        if self.case.variant != "graph" or self.device != "cuda":
            return call
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            result = call()

        def replay(kept_alive: object = (call, stream)) -> tuple[Tensor, ...]:
            graph.replay()
            return result

        return replay

    def check(self, result: Sequence[Tensor]) -> None:
        rows = self.rows(torch.Generator(self.device).manual_seed(SEED))
        expected = []
        for dtype in (self.dtype, torch.float64):
            parameters = [w.to(dtype, copy=True).requires_grad_() for w in self.leaves]
            loss = self.forward("eager")(*parameters, *rows)
            expected.append((loss.detach(), *torch.autograd.grad(loss, parameters)))
        for label, part, *parts in zip(self.labels, result, *expected, strict=True):
            assert_close(part.detach(), *parts, label)

    def jax_call(self) -> Call:
        jax = load_jax()
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
            index = jax.random.randint(drawn, (self.batch,), 0, len(contexts))
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

        jitted = jax.jit(step, donate_argnums=0)
        parameters, means, squares = ([to_jax(jax, w * factor) for w in self.leaves] for factor in (1, 0, 0))
        state = (parameters, means, squares, jnp.float32(0), jax.random.key(SEED))
        contexts, targets = (to_jax(jax, t) for t in self.arguments)

        def call() -> Any:
            nonlocal state
            loss, state = jitted(state, contexts, targets)
            return jax.block_until_ready((loss, state))

        return call
