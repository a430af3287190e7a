"""The providers of a case: charlm, its peers and the machine's lower bounds, each as a call without arguments.

`Workload` is what a case gives to all of them: its tensors, what each provider computes with them, and the check. The
classes of bench/ops fill it in. A provider that cannot take part raises `Unavailable`, or an error of its own.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, worth_compiling
from charlm import testing

# With more threads, inductor starts a pool of processes that compete for the cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

Call = Callable[[], tuple[Tensor, ...]]
CHECKED_ROWS = 128
CHECKED_ELEMENTS = 1 << 22  # of float64, at a time; up to here more rows than CHECKED_ROWS are checked


class Unavailable(RuntimeError):
    """A provider that cannot take part here; the text says why."""


class Workload:
    """An op at one size: tensors that every provider shares, and what each provider does with them.

    A provider computes `forward(*leaves, *arguments)` and the gradients of the leaves. Its result is both, or what
    `parts` says; `labels` names each tensor of it.
    """

    peers: tuple[str, ...] = ("eager", "compile")
    gpu_peers: tuple[str, ...] = ()
    compiled_peers: tuple[str, ...] = ()  # those that compile for each shape
    bounds: tuple[str, ...] = ()
    gpu_bounds: tuple[str, ...] = ()  # beside "copy", where something is copied
    parts = "both"  # or "output", "gradients"
    labels: tuple[str, ...]
    leaves: tuple[Tensor, ...]  # tensors that get a gradient
    arguments: tuple[Tensor, ...] = ()  # the other tensors of a call, such as indices
    cotangent: Tensor | None = None  # the gradient of the output; None for a scalar loss
    copied: tuple[Tensor, ...] = ()  # what the lower bound "copy" copies

    def __init__(self, case: Case, device: str = "cpu") -> None:
        """The same values each time. On the device "meta" it has shapes and no memory."""
        self.case, self.device, self.dtype = case, device, getattr(torch, case.dtype)
        self.generator = None if device == "meta" else torch.Generator(device).manual_seed(0)
        with torch.device(device):
            self.make(*case.shape)

    def make(self, *shape: int) -> None:
        raise NotImplementedError

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator).mul_(scale).to(self.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def integers(self, most: int, *shape: int) -> Tensor:
        return torch.randint(most, shape, generator=self.generator)

    def forward(self, provider: str) -> Callable[..., Tensor]:
        """The output as a function of the leaves and the arguments, for "ours" and every peer but JAX."""
        raise NotImplementedError

    def jax_forward(self, jax: Any) -> Callable[..., Any]:
        raise NotImplementedError

    def bound(self, name: str) -> Callable[[], Any]:
        raise NotImplementedError

    def elements(self) -> int:
        """Numbers in the tensors of one provider, for an estimate of memory."""
        return sum(t.numel() for t in (*self.leaves, *self._cotangents()))

    def minimal_bytes(self) -> int:
        """Bytes that any implementation moves: each input is read once, each output and gradient written once."""
        read_and_written = sum(t.nbytes for t in (*self.leaves, *self._cotangents()))
        return 2 * read_and_written + sum(t.nbytes for t in self.arguments)

    def checked_rows(self) -> Tensor | None:
        """Rows of every tensor that the check looks at; None: the check is of whole tensors."""
        return None

    def providers(self) -> list[str]:
        """In the order of their samples."""
        if self.device == "cuda":
            peers = [*self.peers, *self.gpu_peers]
            if not worth_compiling(self.case):
                peers = [name for name in peers if name not in ("compile", *self.compiled_peers)]
            bounds = ("copy", *self.gpu_bounds) if self.copied else self.bounds
            return ["ours", *peers, *bounds]
        return ["ours", *self.peers, "jax", *self.bounds]

    def build(self, name: str) -> Call:
        if name == "jax":
            return self.jax_call()
        if name == "copy":
            pairs = [(torch.empty_like(tensor), tensor) for tensor in self.copied]
            return lambda: tuple(target.copy_(source) for target, source in pairs)
        if name in (*self.bounds, *self.gpu_bounds):
            return self.bound(name)
        return self.call(compiled(self.forward("eager")) if name == "compile" else self.forward(name))

    def call(self, forward: Callable[..., Tensor]) -> Call:
        """The output and the gradients of the leaves."""
        leaves = [t.detach().requires_grad_() for t in self.leaves]  # the same memory
        arguments, gradients = self.arguments, gradients_with(self.cotangent)

        def call() -> tuple[Tensor, ...]:
            output = forward(*leaves, *arguments)
            return output, *gradients(output, leaves)

        return call

    def jax_call(self) -> Call:
        """`jit` of the forward and its vector-Jacobian product. JAX returns early, so the call waits for results."""
        jax = load_jax()
        forward, parts = self.jax_forward(jax), self.parts
        leaves, arguments, cotangents = (
            tuple(to_jax(jax, t) for t in tensors) for tensors in (self.leaves, self.arguments, self._cotangents())
        )

        def step(leaves: Any, arguments: Any, cotangents: Any) -> Any:
            if parts == "output":
                return forward(*leaves, *arguments)
            output, backward = jax.vjp(lambda *leaves: forward(*leaves, *arguments), *leaves)
            gradients = backward(cotangents[0] if cotangents else jax.numpy.ones_like(output))
            return gradients if parts == "gradients" else (output, gradients)

        jitted = jax.jit(step)
        return lambda: jax.block_until_ready(jitted(leaves, arguments, cotangents))

    def check(self, result: Sequence[Tensor]) -> None:
        """AssertionError where a result is further from float64 than torch's, by the rule of charlm/testing."""
        rows = self.checked_rows()
        baseline, exact = (self.evaluate(dtype, rows) for dtype in (self.dtype, torch.float64))
        for label, part, of_torch, right in zip(self.labels, result, baseline, exact, strict=True):
            assert_close(part.detach() if rows is None else part.detach()[rows], of_torch, right, label)

    def evaluate(self, dtype: torch.dtype, rows: Tensor | None) -> tuple[Tensor, ...]:
        """The result by torch's own ops, computed in `dtype`."""

        def cast(tensor: Tensor) -> Tensor:
            tensor = tensor.detach() if rows is None else tensor.detach()[rows]
            return tensor.to(dtype) if tensor.is_floating_point() else tensor

        leaves = [cast(t).requires_grad_() for t in self.leaves]
        output = self.forward("eager")(*leaves, *map(cast, self.arguments))
        return output.detach(), *torch.autograd.grad(output, leaves, [cast(t) for t in self._cotangents()] or None)

    def _cotangents(self) -> tuple[Tensor, ...]:
        return () if self.cotangent is None else (self.cotangent,)


def gradients_with(cotangent: Tensor | None) -> Callable[..., tuple[Tensor, ...]]:
    """torch.autograd.grad with a cotangent. None: 1, made by the first call; loss.backward() fills one each time."""

    def gradients(output: Tensor, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        nonlocal cotangent
        cotangent = torch.ones_like(output) if cotangent is None else cotangent
        return torch.autograd.grad(output, inputs, cotangent)

    return gradients


def assert_close(actual: Tensor, baseline: Tensor, exact: Tensor, label: str) -> None:
    """Where torch's sum overflows its dtype and the exact result does not, ours has to be the exact result."""
    overflown = exact.isfinite() & ~baseline.isfinite()
    testing.assert_close_to_reference(actual, torch.where(overflown, exact.to(baseline.dtype), baseline), exact, label)


def spread_rows(n: int, row_length: int, device: str = "cpu") -> Tensor:
    """Indices of all rows, or of as many as the limits of the check allow, evenly from the first to the last."""
    most = max(CHECKED_ROWS, CHECKED_ELEMENTS // row_length)
    rows = torch.arange(n) if n <= most else torch.linspace(0, n - 1, most, dtype=torch.float64).long()
    return rows.to(device)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # each case is compiled for its own shape, and counts towards no limit
    return torch.compile(function, dynamic=False, fullgraph=True)


def imported(module: str, name: str) -> Any:
    """A function or class of a library that need not be installed."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise Unavailable(f"{module.partition('.')[0]} is not installed") from error


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load_jax() -> Any:
    """The module jax, on the CPU. XLA has as many threads as there are cores, so torch must have as many too."""
    if torch.get_num_threads() != cores():
        raise Unavailable(f"XLA uses {cores()} threads, not {torch.get_num_threads()}")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        import jax
    except ImportError as error:
        raise Unavailable("jax is not installed") from error
    jax.config.update("jax_enable_x64", True)  # else float64 becomes float32
    return jax


def to_jax(jax: Any, tensor: Tensor) -> Any:
    """A copy, because providers may write over their memory. Indices become int32, as JAX users have them."""
    tensor = tensor.detach()
    tensor = tensor if tensor.is_floating_point() or tensor.dtype == torch.uint8 else tensor.to(torch.int32)
    return jax.numpy.array(jax.numpy.from_dlpack(tensor), copy=True)
