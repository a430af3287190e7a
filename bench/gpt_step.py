"""A training step of a GPT: how much of what its embeddings and its loss cost do our ops save?

Three models of the same blocks, by the configuration that nanoGPT gives for a CPU:

    ours      charlm.lm.models.GPT: our embedding, the head and its loss in one op
    torch     the same in torch's own ops: nn.Embedding, linear, cross_entropy
    without   neither embeddings nor loss: the blocks begin at a tensor that stands still, and backward begins at a
              gradient of the logits that stands still; what is left of the head is torch's three products

A step: rows drawn, forward, backward, AdamW; float32. What embeddings and loss cost is less than two runs of one step
differ by. So both ends are timed without the blocks as well: rows embedded, and backward from a gradient that stands
still; head and loss, forward and backward, from hidden states that do; in "without" the head's products alone. The
share that ours removes of what torch's cost is that of these times, (torch - ours) / (torch - without): above 1 where
our products of the head are faster than torch's (csrc/cpu/gemm.h).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.clock import QUICK, Budget, Clock, Timing
from bench.measure import WrongResult
from bench.units import duration
from charlm.lm.models import GPT
from charlm.lm.models.gpt import Packed

BATCH, T, LAYERS, HEADS, D = 12, 64, 4, 4, 128
VOCABULARIES = (65, 222, 444)  # tiny Shakespeare; the range of Python's own source files, by version
TOKENS = 1 << 16  # of the text that rows are drawn from
BUDGET = Budget(20.0, 60)
GOAL = 0.7  # of the share
MOST_ERROR = 1e-4  # of a gradient, between torch's step and ours, in the norm


class TorchGPT(GPT):
    """The same model in torch's own ops."""

    def __init__(self, vocab_size: int, **options: Any) -> None:
        super().__init__(vocab_size, T, **options)
        for name in ("embedding", "position"):
            ours = getattr(self, name)
            setattr(self, name, nn.Embedding(ours.num_embeddings, ours.embedding_dim))

    def embed(self, idx: Tensor, start: int = 0, packed: Packed | None = None) -> Tensor:
        return super().embed(idx.long(), start, packed)

    def loss_of(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        logits = nn.functional.linear(hidden, self.embedding.weight)
        return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction=reduction)


def measure(quick: bool) -> list[dict[str, Any]]:
    """For each V: the median seconds of the three steps, of their ends alone, and the share of the ends' time."""
    clock, budget = Clock(), QUICK if quick else BUDGET
    points = []
    for vocabulary in VOCABULARIES[:1] if quick else VOCABULARIES:
        steps, ends = (
            {name: Timing.of(times).median for name, times in clock.rounds(calls, budget).items()}
            for calls in _calls(vocabulary)
        )
        points.append({"vocabulary": vocabulary, "seconds": steps, "ends": ends, "share": share(ends)})
    return points


def share(seconds: dict[str, float]) -> float:
    """Of the time that embeddings and loss take in torch, what ours saves."""
    return (seconds["torch"] - seconds["ours"]) / (seconds["torch"] - seconds["without"])


Calls = dict[str, Callable[[], Any]]


def _calls(vocabulary: int) -> tuple[Calls, Calls]:
    """The steps, and their ends."""
    options = {"n_layer": LAYERS, "n_head": HEADS, "n_embd": D}
    torch.manual_seed(0)
    ours, reference, bare = (
        GPT(vocabulary, T, **options),
        TorchGPT(vocabulary, **options),
        GPT(vocabulary, T, **options),
    )
    for model in (reference, bare):
        model.load_state_dict(ours.state_dict())
    text = torch.randint(vocabulary, (TOKENS,)).to(torch.uint8 if vocabulary <= 256 else torch.int16)
    idx, targets = _rows(text, torch.Generator().manual_seed(0))
    _check(ours, reference, idx, targets)

    begin, gradient = torch.randn(BATCH, T, D), torch.randn(BATCH, T, vocabulary)
    hidden = torch.randn(BATCH, T, D, requires_grad=True)

    def backward_without(idx: Tensor, targets: Tensor) -> None:
        x = begin
        for block in bare.blocks:
            x = block(x)
        nn.functional.linear(bare.norm(x), bare.embedding.weight).backward(gradient)

    def head_alone() -> None:
        nn.functional.linear(hidden, bare.embedding.weight).backward(gradient)

    steps = {
        "ours": _step(ours, lambda idx, targets: ours.loss(idx, targets).backward(), text),
        "torch": _step(reference, lambda idx, targets: reference.loss(idx, targets).backward(), text),
        "without": _step(bare, backward_without, text),
    }
    ends = {
        "ours": _ends(ours, idx, targets, hidden, begin),
        "torch": _ends(reference, idx, targets, hidden, begin),
        "without": _without_gradients(head_alone, [hidden, bare.embedding.weight]),
    }
    return steps, ends


def _ends(model: GPT, idx: Tensor, targets: Tensor, hidden: Tensor, gradient: Tensor) -> Callable[[], None]:
    """What lies before the blocks and behind the norm, forward and, at once as in a step, backward; gradient: of the
    embedded rows."""

    def both() -> None:
        torch.autograd.backward((model.embed(idx), model.loss_of(hidden, targets)), (gradient, None))

    return _without_gradients(both, [hidden, model.embedding.weight, model.position.weight])


def _without_gradients(call: Callable[[], None], tensors: list[Tensor]) -> Callable[[], None]:
    """`call` after the gradients are dropped, as in a step."""

    def begin_anew() -> None:
        for tensor in tensors:
            tensor.grad = None
        call()

    return begin_anew


def _rows(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BATCH rows of text and what stands behind each token, (BATCH, T) both."""
    starts = torch.randint(len(text) - T, (BATCH,), generator=generator)
    return text[:-1].unfold(0, T, 1).index_select(0, starts), text[1:].unfold(0, T, 1).index_select(0, starts)


def _step(model: GPT, backward: Callable[[Tensor, Tensor], None], text: Tensor) -> Callable[[], None]:
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        backward(*_rows(text, generator))
        optimizer.step()

    return step


def _check(ours: GPT, reference: GPT, idx: Tensor, targets: Tensor) -> None:
    """The first step's loss and gradients are torch's."""
    results = []
    for model in (ours, reference):
        loss = model.loss(idx, targets)
        results.append({"loss": loss.detach(), **dict(zip(_names(model), _gradients(loss, model), strict=True))})
    for name, expected in results[1].items():
        error = ((results[0][name] - expected).norm() / expected.norm()).item()
        if not error <= MOST_ERROR:
            raise WrongResult(f"V {ours.vocab_size}: WRONG: {name}: relative error {error:.1e}")


def _names(model: GPT) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _gradients(loss: Tensor, model: GPT) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, list(model.parameters()))


def summary(points: list[dict[str, Any]]) -> str:
    """A table in Markdown."""
    lines = [
        "| V | step: torch | without embeddings and loss | ours | torch / without | torch / ours "
        "| both ends alone: torch | the head's products | ours | share removed |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for point in points:
        torchs, without, ours = (point["seconds"][name] for name in ("torch", "without", "ours"))
        ends = " | ".join(duration(point["ends"][name]) for name in ("torch", "without", "ours"))
        lines.append(
            f"| {point['vocabulary']} | {duration(torchs)} | {duration(without)} | {duration(ours)} "
            f"| {torchs / without:.2f} | {torchs / ours:.2f} | {ends} | {point['share']:.0%} |"
        )
    return "\n".join(lines)
