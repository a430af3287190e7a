"""embedding_linear with tanh, forward and the gradients of its three parameters. Shape: (N, T, D, H, V)."""

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
RESULTS = ("output", "embedding_weight", "linear_weight", "linear_bias")


@dataclass(frozen=True)
class Inputs:
    """index: (N, T). embedding: (V, D). linear: (H, T * D). bias: (H). cotangent: (N, H), the output's gradient."""

    index: Tensor
    embedding: Tensor
    linear: Tensor
    bias: Tensor
    cotangent: Tensor

    def parameters(self, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        """As leaves; over the same memory where the dtype is theirs."""
        tensors = (self.embedding, self.linear, self.bias)
        return tuple(t.detach().to(dtype or t.dtype).requires_grad_() for t in tensors)


def make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    n, t, d, h, v = case.shape
    dtype = getattr(torch, case.dtype)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return Inputs(
        torch.randint(v, (n, t), generator=generator),
        normal(v, d).to(dtype),
        normal(h, t * d).mul_(0.5 * (t * d) ** -0.5).to(dtype),
        normal(h).div_(10).to(dtype),
        normal(n, h).to(dtype),
    )


def names(case: Case) -> list[str]:
    return ["ours", "eager", "eager_index", "compile", "jax"]


def build(name: str, case: Case, inputs: Inputs) -> Call:
    if name == "jax":
        return _jax(inputs)
    op = {"ours": _ours, "eager_index": _by_index}.get(name, _eager)
    if name == "compile":
        torch.compiler.reset()
        op = torch.compile(op, dynamic=False, fullgraph=True)
    parameters = inputs.parameters()

    def call() -> tuple[Tensor, ...]:
        output = op(inputs.index, *parameters)
        return output, *torch.autograd.grad(output, parameters, inputs.cotangent)

    return call


def _ours(index: Tensor, embedding: Tensor, linear: Tensor, bias: Tensor) -> Tensor:
    return functional.embedding_linear(index, embedding, linear, bias, activation="tanh")


def _eager(index: Tensor, embedding: Tensor, linear: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(F.linear(F.embedding(index, embedding).flatten(-2), linear, bias))


def _by_index(index: Tensor, embedding: Tensor, linear: Tensor, bias: Tensor) -> Tensor:
    return torch.tanh(F.linear(embedding[index].flatten(-2), linear, bias))


def _jax(inputs: Inputs) -> Call:
    jax = jax_runtime.load()

    def output(parameters: tuple[Any, ...], index: Any) -> Any:
        embedding, linear, bias = parameters
        return jax.numpy.tanh(embedding[index].reshape(len(index), -1) @ linear.T + bias)

    def step(parameters: tuple[Any, ...], index: Any, cotangent: Any) -> Any:
        result, backward = jax.vjp(lambda p: output(p, index), parameters)
        return result, *backward(cotangent)

    tensors = (inputs.embedding, inputs.linear, inputs.bias)
    parameters = tuple(jax_runtime.array(jax, t) for t in tensors)
    index, cotangent = jax_runtime.array(jax, inputs.index.to(torch.int32)), jax_runtime.array(jax, inputs.cotangent)
    compiled = jax.jit(step)
    return lambda: jax.block_until_ready(compiled(parameters, index, cotangent))


def check(inputs: Inputs, result: tuple[Tensor, ...]) -> None:
    def evaluate(dtype: torch.dtype) -> dict[str, Tensor]:
        parameters = inputs.parameters(dtype)
        output = _eager(inputs.index, *parameters)
        grads = torch.autograd.grad(output, parameters, inputs.cotangent.to(dtype))
        return dict(zip(RESULTS, (output.detach(), *grads), strict=True))

    results = dict(zip(RESULTS, (t.detach() for t in result), strict=True))
    assert_as_close_as_torch(results, evaluate, inputs.embedding.dtype)


def elements(case: Case) -> int:
    n, t, d, h, _ = case.shape
    return n * (t * d + h) + _parameters(case)


def _parameters(case: Case) -> int:
    _, t, d, h, v = case.shape
    return v * d + h * t * d + h


def minimal_bytes(case: Case) -> int:
    n, t, _, h, _ = case.shape
    size = torch.finfo(getattr(torch, case.dtype)).bits // 8
    return 8 * n * t + size * (2 * n * h + 2 * _parameters(case))  # the output, its gradient, parameters and theirs


def output_bytes(case: Case) -> int:
    n, _, _, h, _ = case.shape
    return torch.finfo(getattr(torch, case.dtype)).bits // 8 * (n * h + _parameters(case))
