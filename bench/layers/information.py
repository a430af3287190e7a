"""entropy, kl_divergence of two sets of logits, and surprisal: each forward and its gradients. Shape: (N, V).

Torch's are the compositions that people write: log_softmax, exp, products and a sum, or a gather. The floor "copy" is
one copy of the logits, of both sets for kl_divergence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench import jax_runtime
from bench.cases import Case
from bench.layers.compare import assert_as_close_as_torch
from charlm import functional

Call = Callable[[], Any]
CHECKED = 1 << 22  # elements of float64: beyond, rows of the check are fewer


@dataclass(frozen=True)
class Inputs:
    """logits: one (N, V), two for kl_divergence. target: (N), for surprisal. cotangent: (N), the results' gradient."""

    op: str
    logits: tuple[Tensor, ...]
    target: tuple[Tensor, ...]
    cotangent: Tensor

    def leaves(self, rows: Tensor | slice = slice(None), dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """Over the same memory where these are all rows in their own dtype."""
        return tuple(z.detach()[rows].to(dtype or z.dtype).requires_grad_() for z in self.logits)


def make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    n, v = case.shape
    dtype = getattr(torch, case.dtype)

    def logits() -> Tensor:
        return torch.randn((n, v), generator=generator).mul_(2).to(dtype)

    return Inputs(
        case.op,
        (logits(), logits()) if case.op == "kl_divergence" else (logits(),),
        (torch.randint(v, (n,), generator=generator),) if case.op == "surprisal" else (),
        torch.rand(n, generator=generator).to(dtype),
    )


def names(case: Case) -> list[str]:
    return ["ours", "eager", "compile", "jax", "copy"]


def build(name: str, case: Case, inputs: Inputs) -> Call:
    if name == "jax":
        return _jax(inputs)
    if name == "copy":
        others = [z.clone() for z in inputs.logits]
        return lambda: [other.copy_(z) for other, z in zip(others, inputs.logits, strict=True)]
    op = getattr(functional, case.op) if name == "ours" else EAGER[case.op]
    if name == "compile":
        torch.compiler.reset()
        op = torch.compile(op, dynamic=False, fullgraph=True)
    leaves = inputs.leaves()

    def call() -> tuple[Tensor, ...]:
        result = op(*leaves, *inputs.target)
        return result, *torch.autograd.grad(result, leaves, inputs.cotangent)

    return call


def _entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def _kl_div(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def _surprisal(logits: Tensor, target: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


EAGER: dict[str, Callable[..., Tensor]] = {"entropy": _entropy, "kl_divergence": _kl_div, "surprisal": _surprisal}


def _jax(inputs: Inputs) -> Call:
    jax = jax_runtime.load()
    jnp, log_softmax = jax.numpy, jax.nn.log_softmax

    def entropy(logits: Any) -> Any:
        log_p = log_softmax(logits)
        return -(jnp.exp(log_p) * log_p).sum(-1)

    def kl_divergence(p: Any, q: Any) -> Any:
        log_p, log_q = log_softmax(p), log_softmax(q)
        return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

    def surprisal(logits: Any) -> Any:
        picked = jnp.take_along_axis(logits, target[0][:, None], axis=-1)[:, 0]
        return jax.nn.logsumexp(logits, axis=-1) - picked

    op = {"entropy": entropy, "kl_divergence": kl_divergence, "surprisal": surprisal}[inputs.op]

    def step(logits: tuple[Any, ...], cotangent: Any) -> tuple[Any, ...]:
        result, backward = jax.vjp(op, *logits)
        return result, *backward(cotangent)

    target = tuple(jax_runtime.array(jax, t.to(torch.int32)) for t in inputs.target)
    logits = tuple(jax_runtime.array(jax, z) for z in inputs.logits)
    cotangent = jax_runtime.array(jax, inputs.cotangent)
    compiled = jax.jit(step)
    return lambda: jax.block_until_ready(compiled(logits, cotangent))


def check(inputs: Inputs, result: tuple[Tensor, ...]) -> None:
    """Of rows that are spread evenly, from the first to the last."""
    n, v = inputs.logits[0].shape
    rows = torch.linspace(0, n - 1, min(n, max(128, CHECKED // v)), dtype=torch.float64).long()
    labels = ("output", "p.grad", "q.grad")
    target = [t[rows] for t in inputs.target]

    def evaluate(dtype: torch.dtype) -> dict[str, Tensor]:
        leaves = inputs.leaves(rows, dtype)
        output = EAGER[inputs.op](*leaves, *target)
        grads = torch.autograd.grad(output, leaves, inputs.cotangent[rows].to(dtype))
        return dict(zip(labels, (output.detach(), *grads), strict=False))

    results = dict(zip(labels, (t.detach()[rows] for t in result), strict=False))
    assert_as_close_as_torch(results, evaluate, inputs.logits[0].dtype)


def elements(case: Case) -> int:
    n, v = case.shape
    return _sides(case) * n * v


def _sides(case: Case) -> int:
    return 2 if case.op == "kl_divergence" else 1


def minimal_bytes(case: Case) -> int:
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    return 2 * size * elements(case) + case.shape[0] * (2 * size + 8 * (case.op == "surprisal"))


def output_bytes(case: Case) -> int:
    return torch.finfo(getattr(torch, case.dtype)).bits // 8 * (elements(case) + case.shape[0])
