"""linear_cross_entropy: the loss and the gradients of input and weight. Shape: (N, D, V).

Variants: "default"; "large_budget" and "small_budget", with a memory_budget of 5 GiB and of 480 MB.

The lower bound "gemms" is the three matrix products alone, of logits that exist already: x Wᵀ, g W and gᵀ x. On a CPU
without instructions for a half type, torch's products in it take a hundred times as long as in float32: there the bound
multiplies in float32, and no peer takes part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers import Call, Unavailable, Workload, imported
from charlm import functional

BUDGETS = {"large_budget": 5 << 30, "small_budget": 480_000_000}
CHECKED_LOGITS = 1 << 25  # of float64, 256 MB: rows are checked in blocks of so many


class LinearCrossEntropy(Workload):
    """input: (N, D). weight: (V, D). target: (N)."""

    labels = ("loss", "input.grad", "weight.grad")
    gpu_peers = ("liger", "cce")
    bounds = ("gemms",)

    def make(self, n: int, d: int, v: int) -> None:
        self.leaves = (self.normal(n, d), self.normal(v, d, scale=2 * d**-0.5))
        self.arguments = (self.integers(v, n),)

    def elements(self) -> int:
        return super().elements() + len(self.leaves[0]) * len(self.leaves[1])

    def multiplies_natively(self) -> bool:
        """Whether the device has instructions for products of the dtype: on a CPU, as torch's oneDNN sees it."""
        if self.device == "cpu" and self.dtype == torch.bfloat16:
            return torch.ops.mkldnn._is_mkldnn_bf16_supported()
        return self.device != "cpu" or self.dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()

    def build(self, name: str) -> Call:
        if name not in ("ours", "gemms") and not self.multiplies_natively():
            raise Unavailable(f"products of {self.case.dtype} without instructions for them take minutes")
        return super().build(name)

    def forward(self, provider: str) -> Callable[..., Tensor]:
        if provider == "ours" and self.case.variant in BUDGETS:
            return partial(functional.linear_cross_entropy, memory_budget=BUDGETS[self.case.variant])
        if provider == "ours":
            return functional.linear_cross_entropy
        if provider == "cce":
            return imported("cut_cross_entropy", "linear_cross_entropy")
        if provider == "liger":
            loss = imported("liger_kernel.transformers", "LigerFusedLinearCrossEntropyLoss")()
            return lambda x, weight, target: loss(weight, x, target)
        if hasattr(F, "linear_cross_entropy"):
            return F.linear_cross_entropy
        return lambda x, weight, target: F.cross_entropy(F.linear(x, weight), target)

    def jax_forward(self, jax: Any) -> Callable[..., Any]:
        def forward(x: Any, weight: Any, target: Any) -> Any:
            logits = x @ weight.T
            picked = jax.numpy.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
            return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()

        return forward

    def bound(self, name: str) -> Callable[[], Any]:
        x, weight = (t if self.multiplies_natively() else t.float() for t in self.leaves)
        logits = x @ weight.t()
        return lambda: (torch.mm(x, weight.t()), torch.mm(logits, weight), torch.mm(logits.t(), x))

    def check(self, result: Sequence[Tensor]) -> None:
        n, v = (len(t) for t in self.leaves)
        if n * v <= CHECKED_LOGITS and self.multiplies_natively():
            super().check(result)
        else:
            self._check_in_blocks([t.detach() for t in result], max(1, CHECKED_LOGITS // v))

    def _check_in_blocks(self, result: list[Tensor], rows: int) -> None:
        """Against float64, in blocks of rows. torch's error is not known here: ours is bounded by the dtype's."""
        loss, grad_input, grad_weight = result
        (x, weight), (target,) = self.leaves, self.arguments
        n, wide_weight = len(x), weight.double()
        exact_loss, exact_weight, exact_input = 0.0, torch.zeros_like(wide_weight), torch.zeros_like(x).double()
        for start in range(0, n, rows):
            block = slice(start, start + rows)
            logits = x[block].double() @ wide_weight.t()
            exact_loss += F.cross_entropy(logits, target[block], reduction="sum").item() / n
            logits = logits.softmax(-1)
            logits[torch.arange(len(logits), device=logits.device), target[block]] -= 1
            exact_input[block] = logits @ wide_weight / n
            exact_weight += logits.t() @ x[block].double() / n
        eps = torch.finfo(loss.dtype).eps
        assert abs(loss.item() - exact_loss) <= 4 * eps * abs(exact_loss), "loss differs from float64"
        for label, gradient, exact in zip(
            self.labels[1:], (grad_input, grad_weight), (exact_input, exact_weight), strict=True
        ):
            ulps = ((gradient - exact).abs().max() / exact.abs().max()).item() / eps
            assert ulps <= 32, f"{label}: {ulps:.1f} ulps of its largest element"
