"""linear_cross_entropy, the loss and the gradients of input and weight. Shape: (N, D, V).

The floor "gemms" is its three matrix products alone, of logits that are there: x Wᵀ, g W and gᵀ x. For half types on a
machine without instructions for them torch's own products take a hundred times as long as in float32, and are no floor:
there they are float32's, and torch's op does not take part.
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
from bench.jax_runtime import Unavailable
from bench.layers.compare import assert_as_close_as_torch
from charlm import functional

Call = Callable[[], Any]
CHECKED_LOGITS = 1 << 25  # of float64, 256 MB: beyond, rows of the check are fewer


@dataclass(frozen=True)
class Inputs:
    """input: (N, D). weight: (V, D). target: (N)."""

    input: Tensor
    weight: Tensor
    target: Tensor


def make_inputs(case: Case, generator: torch.Generator) -> Inputs:
    n, d, v = case.shape
    dtype = getattr(torch, case.dtype)
    return Inputs(
        torch.randn((n, d), generator=generator).to(dtype),
        torch.randn((v, d), generator=generator).mul_(2 * d**-0.5).to(dtype),
        torch.randint(v, (n,), generator=generator),
    )


def names(case: Case) -> list[str]:
    return ["ours", "eager", "compile", "jax", "gemms"]


def multiplies_natively(tensor: Tensor) -> bool:
    """Whether its device has instructions for products of its dtype: of a CPU, as torch's oneDNN sees it."""
    if tensor.device.type != "cpu":
        return True
    if tensor.dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return tensor.dtype != torch.float16 or torch.ops.mkldnn._is_mkldnn_fp16_supported()


def build(name: str, case: Case, inputs: Inputs) -> Call:
    native = multiplies_natively(inputs.input)
    if name == "gemms":
        return _gemms(inputs, inputs.input.dtype if native else torch.float32)
    if name != "ours" and not native:
        raise Unavailable(f"products of {case.dtype} without instructions for them take minutes")
    if name == "jax":
        return _jax(inputs)
    op = functional.linear_cross_entropy if name == "ours" else _eager
    if name == "compile":
        torch.compiler.reset()
        op = torch.compile(op, dynamic=False, fullgraph=True)
    parameters = (inputs.input.detach().requires_grad_(), inputs.weight.detach().requires_grad_())

    def call() -> tuple[Tensor, ...]:
        loss = op(*parameters, inputs.target)
        return loss, *torch.autograd.grad(loss, parameters)

    return call


def _eager(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    if hasattr(F, "linear_cross_entropy"):
        return F.linear_cross_entropy(input, weight, target)
    return F.cross_entropy(F.linear(input, weight), target)


def _gemms(inputs: Inputs, dtype: torch.dtype) -> Call:
    x, weight = inputs.input.to(dtype), inputs.weight.to(dtype)
    logits = x @ weight.t()
    return lambda: (torch.mm(x, weight.t()), torch.mm(logits, weight), torch.mm(logits.t(), x))


def _jax(inputs: Inputs) -> Call:
    jax = jax_runtime.load()

    def loss(parameters: tuple[Any, ...], target: Any) -> Any:
        logits = parameters[0] @ parameters[1].T
        picked = jax.numpy.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        return (jax.nn.logsumexp(logits, axis=-1) - picked).mean()

    parameters = tuple(jax_runtime.array(jax, t) for t in (inputs.input, inputs.weight))
    target = jax_runtime.array(jax, inputs.target.to(torch.int32))
    compiled = jax.jit(jax.value_and_grad(loss))
    return lambda: jax.block_until_ready(compiled(parameters, target))


def check(inputs: Inputs, result: tuple[Tensor, ...]) -> None:
    """All of it where the logits of float64 are few; else the loss of a part of the rows, and their gradient."""
    loss, grad_input, grad_weight = (t.detach() for t in result)
    n, v = len(inputs.input), len(inputs.weight)
    rows = min(n, max(1, CHECKED_LOGITS // v))
    if rows < n or not multiplies_natively(inputs.input):
        _check_rows(inputs, loss, grad_input, grad_weight, rows)
        return

    def evaluate(dtype: torch.dtype) -> dict[str, Tensor]:
        parameters = [t.detach().to(dtype).requires_grad_() for t in (inputs.input, inputs.weight)]
        value = F.cross_entropy(F.linear(*parameters), inputs.target)
        grads = torch.autograd.grad(value, parameters)
        return {"loss": value.detach(), "input.grad": grads[0], "weight.grad": grads[1]}

    results = {"loss": loss, "input.grad": grad_input, "weight.grad": grad_weight}
    assert_as_close_as_torch(results, evaluate, inputs.input.dtype)


def _check_rows(inputs: Inputs, loss: Tensor, grad_input: Tensor, grad_weight: Tensor, rows: int) -> None:
    """Against float64, a block of rows at a time: torch's error is not known, so ours is bounded by the dtype's."""
    n = len(inputs.input)
    weight = inputs.weight.double()
    exact_loss, exact_weight = weight.new_zeros(()), torch.zeros_like(weight)
    worst, scale = 0.0, 0.0
    for x, target, grad in zip(
        inputs.input.split(rows), inputs.target.split(rows), grad_input.split(rows), strict=True
    ):
        wide = x.double()
        logits = wide @ weight.t()
        exact_loss += F.cross_entropy(logits, target, reduction="sum")
        logits = logits.softmax(-1)
        logits[torch.arange(len(target), device=target.device), target] -= 1
        exact = logits @ weight / n
        exact_weight += logits.t() @ wide / n
        worst, scale = max(worst, (grad - exact).abs().max().item()), max(scale, exact.abs().max().item())
    eps = torch.finfo(loss.dtype).eps
    assert abs(loss.double() - exact_loss / n) <= 4 * eps * abs(exact_loss / n), "loss differs from float64"
    assert worst <= 32 * eps * scale, f"input.grad: {worst / scale / eps:.1f} ulps of its largest element"
    worst, scale = (grad_weight - exact_weight).abs().max().item(), exact_weight.abs().max().item()
    assert worst <= 32 * eps * scale, f"weight.grad: {worst / scale / eps:.1f} ulps of its largest element"


def elements(case: Case) -> int:
    n, d, v = case.shape
    return n * v + n * d + v * d


def minimal_bytes(case: Case) -> int:
    n, d, v = case.shape
    return 8 * n + 2 * torch.finfo(getattr(torch, case.dtype)).bits // 8 * (n * d + v * d)


def output_bytes(case: Case) -> int:
    n, d, v = case.shape
    return torch.finfo(getattr(torch, case.dtype)).bits // 8 * (n * d + v * d)
