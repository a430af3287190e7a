"""cross_entropy: the loss and the gradient of its logits. Shape: (N, V).

Variants: "default"; one option each, four of which torch's user composes; "padded" rows of a multiple of 64;
"forward_only"; and "inplace_*", in which charlm writes the gradient over the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers import (
    CHECKED_ELEMENTS,
    Call,
    Unavailable,
    Workload,
    assert_close,
    gradients_with,
    imported,
    spread_rows,
    to_jax,
)
from charlm import functional

INPLACE = {"inplace_forward": "forward", "inplace_backward": "backward"}
OWN_OPTIONS = {"z_loss": {"lse_square_scale": 1e-4}, "softcap": {"softcap": 30.0}, "logit_scale": {"logit_scale": 0.5}}


class CrossEntropy(Workload):
    """logits: (N, V). target: (N) int64, or (N, V) probabilities."""

    labels = ("loss", "gradient")
    compiled_peers = ("liger", "quack")

    def make(self, n: int, v: int) -> None:
        variant = self.case.variant
        self.options: dict[str, Any] = {}
        padding = -v % 64 if variant == "padded" else 0
        logits, target = self.normal(n, v + padding, scale=2)[:, :v], self.integers(v, n)
        if variant == "label_smoothing":
            self.options = {"label_smoothing": 0.1}
        elif variant == "weight":
            self.options = {"weight": (self.uniform(v) + 0.5).to(self.dtype)}
        elif variant == "ignore_index":
            target = target.masked_fill(self.uniform(n) < 0.3, -100)
        elif variant == "probabilities":
            target = torch.randn((n, v), generator=self.generator).softmax(1).to(self.dtype)
        elif variant == "reduction_none":
            self.options, self.cotangent = {"reduction": "none"}, self.uniform(n).to(self.dtype)
        elif variant == "token_weight":
            self.options = {"token_weight": self.uniform(n) + 0.5}
        self.options |= OWN_OPTIONS.get(variant, {})
        self.leaves, self.arguments, self.copied = (logits,), (target,), (logits.contiguous(),)
        forward_only = variant == "forward_only"
        self.parts = "output" if forward_only else "both"
        self.bounds = ("read",) if forward_only else ("scale", "copy")
        # Liger overwrites the logits; quack is given no option here.
        self.gpu_peers = ("liger", "quack") if variant in ("default", *INPLACE) else ()

    def minimal_bytes(self) -> int:
        """Where the gradient is not made in forward, backward reads the logits again."""
        times = {"forward_only": -1, "reduction_none": 1, "inplace_backward": 1}.get(self.case.variant, 0)
        return super().minimal_bytes() + times * self.leaves[0].nbytes

    def forward(self, provider: str) -> Callable[..., Tensor]:
        if provider == "liger":
            return imported("liger_kernel.transformers", "LigerCrossEntropyLoss")()
        if provider == "quack":
            return partial(imported("quack.cross_entropy", "cross_entropy"), reduction="mean")
        if provider == "ours" and self.case.variant in INPLACE:
            return partial(functional.cross_entropy, inplace=INPLACE[self.case.variant])
        return partial(functional.cross_entropy if provider == "ours" else composed, **self.options)

    def build(self, name: str) -> Call:
        # From the second call on, the logits of these hold a gradient. That takes the same time.
        if name == "liger" or (name == "ours" and self.case.variant in INPLACE):
            return self._over_logits(self.forward(name))
        return super().build(name)

    def call(self, forward: Callable[..., Tensor]) -> Call:
        if self.case.variant == "forward_only":
            logits, target = *self.leaves, *self.arguments
            return lambda: (forward(logits, target),)
        return super().call(forward)

    def _over_logits(self, forward: Callable[..., Tensor]) -> Call:
        """A loss that writes over logits which another layer made and nothing else needs."""
        logits, target = *self.leaves, *self.arguments
        memory = logits.clone().untyped_storage()
        leaf = logits.new_zeros(()).expand(logits.shape).requires_grad_()  # their shape, and memory for one element

        gradients = gradients_with(None)

        def call() -> tuple[Tensor, Tensor]:
            loss = forward(_Produced.apply(leaf, memory), target)
            return loss, gradients(loss, [leaf])[0]

        return call

    def bound(self, name: str) -> Callable[[], Any]:
        if name == "read":
            return self.leaves[0].sum
        other = self.leaves[0].clone()
        return lambda: other.mul_(1.0)

    def check(self, result: Sequence[Tensor]) -> None:
        """The loss as a whole; of large logits, rows of the gradient."""
        loss, *gradient = result
        logits, target = *self.leaves, *self.arguments
        n, v = logits.shape
        rows, shares = spread_rows(n, v, self.device), self._shares()
        with torch.no_grad():
            if self.cotangent is None:
                blocks = torch.arange(n, device=self.device).split(max(1, CHECKED_ELEMENTS // v))
                exact = torch.cat([self._losses(logits[block].double(), block) for block in blocks])
                assert_close(loss, self.forward("eager")(logits, target), exact.sum() / shares.sum(), "loss")
            else:
                losses = [self._losses(logits[rows].to(dtype), rows) for dtype in (self.dtype, torch.float64)]
                assert_close(loss[rows], *losses, "loss")
        if not gradient:
            return
        assert gradient[0].shape == logits.shape, f"gradient: shape {tuple(gradient[0].shape)}"
        expected = []
        for dtype in (self.dtype, torch.float64):
            leaf = logits[rows].to(dtype).requires_grad_()
            # A mean is a sum of the losses that each have the cotangent 1 / (sum of all shares).
            cotangent = torch.ones_like(rows, dtype=torch.float64) / shares.sum()
            cotangent = cotangent if self.cotangent is None else self.cotangent[rows]
            expected.append(torch.autograd.grad(self._losses(leaf, rows), leaf, cotangent.to(dtype))[0])
        assert_close(gradient[0][rows], *expected, "gradient")

    def _losses(self, logits: Tensor, rows: Tensor) -> Tensor:
        """The loss of each of these rows, in the dtype of their logits."""
        target = self.arguments[0][rows]
        options = {**self.options, "reduction": "none"}
        if "weight" in options:
            options["weight"] = options["weight"].to(logits.dtype)
        if "token_weight" in options:
            options["token_weight"] = options["token_weight"][rows].to(logits.dtype)
        target = target.to(logits.dtype) if target.is_floating_point() else target
        return composed(logits, target, **options)

    def _shares(self) -> Tensor:
        """(N): the weight of each row in a mean."""
        (target,) = self.arguments
        if "token_weight" in self.options:
            return self.options["token_weight"].double()
        if target.is_floating_point():
            return target.new_ones(len(target), dtype=torch.float64)
        valid, weight = target != -100, self.options.get("weight")
        return valid.double() if weight is None else weight.double()[torch.where(valid, target, 0)] * valid

    def jax_forward(self, jax: Any) -> Callable[..., Any]:
        jnp, variant = jax.numpy, self.case.variant
        if variant in OWN_OPTIONS or variant == "token_weight":
            raise Unavailable("its user composes this option")
        weight = to_jax(jax, self.options["weight"]) if "weight" in self.options else None
        smoothing = self.options.get("label_smoothing", 0.0)

        def forward(logits: Any, target: Any) -> Any:
            if variant == "probabilities":
                return -(target * jax.nn.log_softmax(logits)).sum(-1).mean()
            valid = target != -100
            index = jnp.where(valid, target, 0)
            lse = jax.nn.logsumexp(logits, axis=-1)
            loss = lse - jnp.take_along_axis(logits, index[:, None], axis=-1)[:, 0]
            if smoothing:
                loss = (1 - smoothing) * loss + smoothing * (lse - logits.mean(-1))
            if variant == "reduction_none":
                return loss
            if variant not in ("weight", "ignore_index"):
                return loss.mean()
            share = jnp.where(valid, jnp.ones_like(lse) if weight is None else weight[index], 0)
            return (loss * share).sum() / share.sum()

        return forward


def composed(
    logits: Tensor,
    target: Tensor,
    *,
    lse_square_scale: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
    token_weight: Tensor | None = None,
    reduction: str = "mean",
    **options: Any,
) -> Tensor:
    """F.cross_entropy, and around it what it lacks."""
    if logit_scale != 1:
        logits = logits * logit_scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if not lse_square_scale and token_weight is None:
        return F.cross_entropy(logits, target, reduction=reduction, **options)
    losses = F.cross_entropy(logits, target, reduction="none", **options)
    if lse_square_scale:
        losses = losses + lse_square_scale * logits.logsumexp(-1).square()
    total = len(losses) if token_weight is None else token_weight.sum()
    losses = losses if token_weight is None else losses * token_weight.to(losses.dtype)
    return losses if reduction == "none" else (losses.sum() / total).to(losses.dtype)


class _Produced(torch.autograd.Function):
    """Stands for the layer that made the logits: a new tensor over existing memory, without a copy either way."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, memory: torch.UntypedStorage) -> Tensor:
        return leaf.new_empty(0).set_(memory, 0, leaf.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
