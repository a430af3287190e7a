"""The contenders of a case: ours, torch eager, torch.compile, JAX and the machine's floors.

Each is made once, by `build`, and is then a call without arguments. Ours and torch's return what the check compares:
(loss, gradient of the logits), the loss alone without a gradient, an embedding's output, or its weight's gradient.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import jax_peer
from bench.cases import Case
from bench.inputs import CrossEntropyInputs, EmbeddingInputs
from bench.jax_runtime import Unavailable
from bench.layers import LAYERS
from bench.pages import fresh_like
from charlm import functional

# With more, inductor starts a pool of processes that share our cores.
os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")

Call = Callable[[], Any]
PEERS = ("eager", "eager_index", "compile", "jax")
INPLACE = {"inplace_forward": "forward", "inplace_backward": "backward"}


def names(case: Case) -> list[str]:
    """In the order of their samples; a contender that only a goal needs takes part only with that goal."""
    if case.op in LAYERS:
        return LAYERS[case.op].names(case)
    figures = {goal.figure for goal in case.goals}
    peers = ["eager", "compile", "jax"]
    if case.op == "embedding":
        floors = ["fresh_copy"]
    elif case.op == "embedding_backward":
        peers.insert(1, "eager_index")
        floors = ["read_write"]
    else:
        floors = ["read"] if case.variant == "forward_only" else ["scale", "copy"]
    extra = ["noop"] * ("noop" in figures)
    extra += [f"ours_{figure}" for figure in ("float32", "int64") if figure in figures]
    extra += ["ours_1_thread", "scale_1_thread"] * ("threads" in figures and torch.get_num_threads() == 2)
    return ["ours", *peers, *floors, *extra]


def build(name: str, case: Case, inputs: CrossEntropyInputs | EmbeddingInputs) -> Call:
    """The call. Unavailable, or whatever the contender itself raises, where it cannot take part."""
    if case.op in LAYERS:
        return LAYERS[case.op].build(name, case, inputs)
    if name == "jax":
        return jax_peer.contender(case, inputs)
    if name.endswith("_1_thread"):
        return _on_one_thread(build(name.removesuffix("_1_thread"), case, inputs))
    if case.op == "cross_entropy":
        return _cross_entropy(name, case, inputs)
    return (_embedding if case.op == "embedding" else _embedding_backward)(name, inputs)


def _cross_entropy(name: str, case: Case, inputs: CrossEntropyInputs) -> Call:
    logits = inputs.logits
    if name in ("scale", "copy"):
        other = logits.clone()
        return (lambda: other.mul_(1.0)) if name == "scale" else (lambda: other.copy_(logits))
    if name == "read":
        return logits.sum
    if name == "noop":
        return _with_gradient(_load_noop(), inputs, logits)
    if name == "ours_float32":
        return _with_gradient(_loss(functional.cross_entropy, inputs), inputs, logits.float())
    if name == "ours" and case.variant in INPLACE:
        return over_logits(_loss(functional.cross_entropy, inputs, inplace=INPLACE[case.variant]), inputs)
    loss = _loss(functional.cross_entropy if name == "ours" else F.cross_entropy, inputs)
    if name == "compile":
        loss = _compiled(loss)
    if case.variant == "forward_only":
        return lambda: loss(logits)
    return _with_gradient(loss, inputs, logits)


def _loss(op: Callable[..., Tensor], inputs: CrossEntropyInputs, **more: Any) -> Callable[[Tensor], Tensor]:
    target, options = inputs.target, {**inputs.options, **more}
    return lambda logits: op(logits, target, **options)


def _with_gradient(loss_of: Callable[[Tensor], Tensor], inputs: CrossEntropyInputs, logits: Tensor) -> Call:
    leaf = logits.detach().requires_grad_()  # the same memory
    cotangent = inputs.cotangent

    def call() -> tuple[Tensor, Tensor]:
        loss = loss_of(leaf)
        return loss, torch.autograd.grad(loss, leaf, cotangent)[0]

    return call


class _Produced(torch.autograd.Function):
    """Stands for the layer that made the logits: a tensor of its own over memory that is there, no copy either way."""

    @staticmethod
    def forward(ctx: Any, leaf: Tensor, memory: torch.UntypedStorage) -> Tensor:
        return leaf.new_empty(0).set_(memory, 0, leaf.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def over_logits(loss_of: Callable[[Tensor], Tensor], inputs: CrossEntropyInputs) -> Call:
    """A loss that writes over its logits, which nobody else needs: from the second call on they hold a gradient."""
    memory = inputs.logits.clone().untyped_storage()
    # The shape of the logits, and memory for one element.
    leaf = inputs.logits.new_zeros(()).expand(inputs.logits.shape).requires_grad_()

    def call() -> tuple[Tensor, Tensor]:
        loss = loss_of(_Produced.apply(leaf, memory))
        return loss, torch.autograd.grad(loss, leaf)[0]

    return call


def _embedding(name: str, inputs: EmbeddingInputs) -> Call:
    index, weight = inputs.index, inputs.weight
    if name == "fresh_copy":
        output = functional.embedding(index, weight)
        return lambda: fresh_like(output).copy_(output)
    if name == "ours_int64":
        index = index.to(torch.int64)
    if name.startswith("ours"):
        return lambda: functional.embedding(index, weight)
    # torch takes no index of one byte: its user widens them.
    look_up = (lambda: F.embedding(index.to(torch.int64), weight)) if index.dtype == torch.uint8 else None
    look_up = look_up or (lambda: F.embedding(index, weight))
    return _compiled(look_up) if name == "compile" else look_up


def _embedding_backward(name: str, inputs: EmbeddingInputs) -> Call:
    index, gradient = inputs.index, inputs.gradient
    if name == "read_write":
        written = torch.empty_like(inputs.weight)
        return lambda: (gradient.sum(), written.fill_(0.0))
    if name == "compile":
        backward, n_rows = torch.ops.aten.embedding_dense_backward.default, len(inputs.weight)
        compiled = _compiled(lambda gradient, index: backward(gradient, index, n_rows, -1, False))
        return lambda: compiled(gradient, index)
    weight = inputs.weight.detach().requires_grad_()
    if name == "eager_index":
        output = weight[index]
    else:
        output = (functional.embedding if name == "ours" else F.embedding)(index, weight)
    return lambda: torch.autograd.grad(output, weight, gradient, retain_graph=True)[0]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    torch.compiler.reset()  # each case is compiled for its own shape, and counts towards no limit
    return torch.compile(function, dynamic=False, fullgraph=True)


def _on_one_thread(call: Call) -> Call:
    def on_one_thread() -> Any:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            return call()
        finally:
            torch.set_num_threads(threads)

    return on_one_thread


def _load_noop() -> Callable[[Tensor], Tensor]:
    """bench/noop.cpp, compiled on first use and kept by torch."""
    from torch.utils.cpp_extension import load

    # An environment that was not activated has ninja only beside its python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    source = Path(__file__).with_name("noop.cpp")
    found, os.environ["PATH"] = os.environ.get("PATH", ""), path
    try:
        return load("charlm_bench_noop", [str(source)], extra_cflags=["-O3"]).noop
    except (OSError, RuntimeError) as error:
        raise Unavailable(f"noop.cpp cannot be compiled: {str(error).splitlines()[0]}") from error
    finally:
        os.environ["PATH"] = found
