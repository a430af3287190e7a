"""embedding and its gradient, apart; and embedding_linear with tanh, forward and backward together."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.providers import CHECKED_ELEMENTS, Call, Workload, assert_close, compiled, spread_rows
from charlm import functional

HUGE_PAGES_FROM = 4 << 20  # bytes of an output


class Embedding(Workload):
    """The forward. weight: (V, D). index: (N), of the dtype that the variant names. Shape: (N, V, D)."""

    labels = ("output",)
    parts = "output"
    bounds = ("fresh_copy",)

    def make(self, n: int, v: int, d: int) -> None:
        index = self.integers(v, n).to(getattr(torch, self.case.variant))
        self.leaves, self.arguments = (self.normal(v, d),), (index,)
        self.copied = (torch.zeros((n, d), dtype=self.dtype),)

    def elements(self) -> int:
        return self.leaves[0].numel() + self.copied[0].numel()

    def minimal_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.leaves, *self.arguments, *self.copied))

    def forward(self, provider: str) -> Callable[..., Tensor]:
        if provider == "ours":
            return lambda weight, index: functional.embedding(index, weight)
        # torch takes no index of one byte: its user widens them.
        if self.case.variant == "uint8":
            return lambda weight, index: F.embedding(index.to(torch.int64), weight)
        return lambda weight, index: F.embedding(index, weight)

    def jax_forward(self, jax: Any) -> Callable[..., Any]:
        return lambda weight, index: weight[index]

    def call(self, forward: Callable[..., Tensor]) -> Call:
        weight, index = *self.leaves, *self.arguments
        return lambda: (forward(weight, index),)

    def bound(self, name: str) -> Callable[[], Any]:
        return lambda: fresh_like(self.copied[0]).copy_(self.copied[0])

    def check(self, result: Sequence[Tensor]) -> None:
        (output,), (weight,), (index,) = result, self.leaves, self.arguments
        n, d = len(index), weight.size(1)
        assert output.shape == (n, d), f"output: shape {tuple(output.shape)}"
        rows = spread_rows(n, d, self.device)
        baseline, exact = (F.embedding(index[rows].long(), w) for w in (weight, weight.double()))
        assert_close(output[rows], baseline, exact, "output")


class EmbeddingBackward(Workload):
    """The gradient of the weight alone. weight: (V, D). index: (N). cotangent: (N, D). Shape: (N, V, D)."""

    labels = ("gradient of the weight",)
    parts = "gradients"
    peers = ("eager", "eager_index", "compile")
    bounds = ("read_write",)
    gpu_bounds = ("read",)

    def make(self, n: int, v: int, d: int) -> None:
        index = self.integers(v, n)
        self.leaves, self.arguments, self.cotangent = (self.normal(v, d),), (index,), self.normal(n, d)
        self.copied = (self.cotangent,)

    def minimal_bytes(self) -> int:
        return sum(t.nbytes for t in (*self.leaves, *self.arguments, *self.copied))

    def build(self, name: str) -> Call:
        if name != "compile":
            return super().build(name)
        (weight,), (index,), gradient = self.leaves, self.arguments, self.cotangent
        backward, n_rows = torch.ops.aten.embedding_dense_backward.default, len(weight)
        backward_of = compiled(lambda gradient, index: backward(gradient, index, n_rows, -1, False))
        return lambda: (backward_of(gradient, index),)

    def forward(self, provider: str) -> Callable[..., Tensor]:
        op = functional.embedding if provider == "ours" else F.embedding
        return lambda weight, index: weight[index] if provider == "eager_index" else op(index, weight)

    def call(self, forward: Callable[..., Tensor]) -> Call:
        weight, cotangent = self.leaves[0].detach().requires_grad_(), self.cotangent
        output = forward(weight, *self.arguments)
        return lambda: torch.autograd.grad(output, weight, cotangent, retain_graph=True)

    def jax_forward(self, jax: Any) -> Callable[..., Any]:
        return lambda weight, index: weight[index]

    def bound(self, name: str) -> Callable[[], Any]:
        if name == "read":
            return self.cotangent.sum
        written = torch.empty_like(self.leaves[0])
        return lambda: (self.cotangent.sum(), written.fill_(0.0))

    def check(self, result: Sequence[Tensor]) -> None:
        (weight,), (index,), cotangent = self.leaves, self.arguments, self.cotangent
        (baseline,) = self.build("eager")()
        exact = torch.zeros_like(weight, dtype=torch.float64)
        block = max(1, CHECKED_ELEMENTS // weight.size(1))
        for some, gradient in zip(index.split(block), cotangent.split(block), strict=True):
            exact.index_add_(0, some, gradient.double())
        assert_close(*result, baseline, exact, *self.labels)


class EmbeddingLinear(Workload):
    """embedding (V, D), linear (H, T * D) and bias (H); index: (N, T); cotangent: (N, H). Shape: (N, T, D, H, V)."""

    labels = ("output", "embedding_weight", "linear_weight", "linear_bias")
    peers = ("eager", "eager_index", "compile")

    def make(self, n: int, t: int, d: int, h: int, v: int) -> None:
        self.arguments = (self.integers(v, n, t),)
        self.leaves = (
            self.normal(v, d),
            self.normal(h, t * d, scale=0.5 * (t * d) ** -0.5),
            self.normal(h, scale=0.1),
        )
        self.cotangent = self.normal(n, h)

    def elements(self) -> int:
        return super().elements() + self.arguments[0].numel() * self.leaves[0].size(1)

    def forward(self, provider: str) -> Callable[..., Tensor]:
        def ours(embedding: Tensor, linear: Tensor, bias: Tensor, index: Tensor) -> Tensor:
            return functional.embedding_linear(index, embedding, linear, bias, activation="tanh")

        def by_torch(embedding: Tensor, linear: Tensor, bias: Tensor, index: Tensor) -> Tensor:
            rows = embedding[index] if provider == "eager_index" else F.embedding(index, embedding)
            return torch.tanh(F.linear(rows.flatten(-2), linear, bias))

        return ours if provider == "ours" else by_torch

    def jax_forward(self, jax: Any) -> Callable[..., Any]:
        def forward(embedding: Any, linear: Any, bias: Any, index: Any) -> Any:
            return jax.numpy.tanh(embedding[index].reshape(len(index), -1) @ linear.T + bias)

        return forward


def fresh_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor whose memory is new, and in huge pages from 4 MiB on, as that of charlm's outputs."""
    fresh = torch.empty_like(tensor)
    if sys.platform == "linux" and hasattr(mmap, "MADV_HUGEPAGE") and fresh.nbytes >= HUGE_PAGES_FROM:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (fresh.data_ptr() + fresh.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        madvise(start, length, mmap.MADV_HUGEPAGE)  # where it is refused, pages stay small
    return fresh
