"""entropy, kl_divergence of two sets of logits, kl_div, and surprisal: forward and gradients. Shape: (N, V).

torch's own kl_div is compared with itself; of the others, torch's are the compositions that people write: log_softmax,
exp, products and a sum, or a gather. The lower bound "copy" is one copy of the logits, of both sets for kl_divergence
and kl_div.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from bench.providers import Workload, spread_rows
from charlm import functional


class Information(Workload):
    """logits: one (N, V), or two. target: (N), for surprisal. cotangent: (N)."""

    bounds = ("copy",)

    def make(self, n: int, v: int) -> None:
        op = self.case.op
        two = op.startswith("kl_div")
        self.leaves = self.copied = tuple(self.normal(n, v, scale=2) for _ in range(1 + two))
        if op == "kl_div":
            log_probabilities, probabilities = self.leaves[0].log_softmax(-1), self.leaves[1].softmax(-1)
            self.leaves = self.copied = (log_probabilities, probabilities)
        self.arguments = (self.integers(v, n),) if self.case.op == "surprisal" else ()
        self.cotangent = self.uniform(*((n, v) if op == "kl_div" else (n,))).to(self.dtype)
        self.labels = ("output", "p.grad", "q.grad")[: 2 + two]

    def minimal_bytes(self) -> int:
        """Backward reads the inputs again."""
        return super().minimal_bytes() + sum(t.nbytes for t in self.leaves)

    def elements(self) -> int:
        return sum(t.numel() for t in self.leaves)

    def checked_rows(self) -> Tensor:
        return spread_rows(*self.leaves[0].shape, self.device)

    def forward(self, provider: str) -> Callable[..., Tensor]:
        function = getattr(functional, self.case.op) if provider == "ours" else EAGER[self.case.op]
        return partial(function, reduction="none") if self.case.op == "kl_div" else function

    def jax_forward(self, jax: Any) -> Callable[..., Any]:
        jnp, log_softmax = jax.numpy, jax.nn.log_softmax

        def entropy(logits: Any) -> Any:
            log_p = log_softmax(logits)
            return -(jnp.exp(log_p) * log_p).sum(-1)

        def kl_divergence(p: Any, q: Any) -> Any:
            log_p, log_q = log_softmax(p), log_softmax(q)
            return (jnp.exp(log_p) * (log_p - log_q)).sum(-1)

        def surprisal(logits: Any, target: Any) -> Any:
            return jax.nn.logsumexp(logits, axis=-1) - jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]

        def kl_div(log_q: Any, p: Any) -> Any:
            return jax.scipy.special.xlogy(p, p) - p * log_q

        functions = {"entropy": entropy, "kl_divergence": kl_divergence, "kl_div": kl_div, "surprisal": surprisal}
        return functions[self.case.op]


def entropy(logits: Tensor) -> Tensor:
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def kl_divergence(p: Tensor, q: Tensor) -> Tensor:
    log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def surprisal(logits: Tensor, target: Tensor) -> Tensor:
    return -logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]


EAGER: dict[str, Callable[..., Tensor]] = {
    "entropy": entropy,
    "kl_divergence": kl_divergence,
    "kl_div": F.kl_div,
    "surprisal": surprisal,
}
