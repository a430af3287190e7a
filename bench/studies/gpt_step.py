"""A training step of a GPT: how much of the time of its embeddings and its loss do charlm's ops save?

    python -m bench.studies.gpt_step [--json FILE]

bench/NOTES.md holds the recorded table. Three models of the same blocks, by nanoGPT's configuration for a CPU:

    ours      charlm.lm.models.GPT: charlm's embedding, the head and its loss in one op
    torch     the same in torch's own ops: nn.Embedding, linear, cross_entropy
    without   neither embeddings nor loss: the blocks begin at a fixed tensor, and backward begins at a fixed gradient
              of the logits; what remains of the head is torch's three products

A step: rows drawn, forward, backward, AdamW; float32. Embeddings and loss cost less than two runs of one step differ
by. So both ends are timed without the blocks as well: rows embedded, and backward from a fixed gradient; head and loss,
forward and backward, from fixed hidden states; in "without", the head's products alone. The share that charlm removes
is taken from these times: (torch - ours) / (torch - without). It is above 1 where charlm's products of the head are
faster than torch's (csrc/cpu/gemm/gemm.h).
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bench import record
from bench.report import duration
from bench.timer import Budget, Timer, Timing, WrongResult, exit_codes
from charlm.lm.models import GPT

BATCH, T, LAYERS, HEADS, D = 12, 64, 4, 4, 128
VOCABULARIES = (65, 222, 444)  # tiny Shakespeare; the range of Python's own source files, by version
TOKENS = 1 << 16  # of the text that rows are drawn from
BUDGET = Budget(20.0, 60)
MOST_ERROR = 1e-4  # of a gradient, between torch's step and charlm's, in the norm


class TorchGPT(GPT):
    """The same model in torch's own ops."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        for name in ("embedding", "position"):
            ours = getattr(self, name)
            setattr(self, name, nn.Embedding(ours.num_embeddings, ours.embedding_dim))

    def embed(self, idx: Tensor, *args: Any) -> Tensor:
        return super().embed(idx.long(), *args)

    def loss_of(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        logits = nn.functional.linear(hidden, self.embedding.weight)
        return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten().long(), reduction=reduction)


def measure() -> list[dict[str, Any]]:
    """For each V: the median seconds of the three steps, of their ends alone, and the share of the ends' time."""
    timer, points = Timer(), []
    for vocabulary in VOCABULARIES:
        steps, ends = (
            {name: Timing.of(times).median for name, times in timer.rounds(calls, BUDGET).items()}
            for calls in _calls(vocabulary)
        )
        points.append({"vocabulary": vocabulary, "seconds": steps, "ends": ends, "share": share(ends)})
    return points


def share(seconds: dict[str, float]) -> float:
    """Of the time that embeddings and loss take in torch, what charlm saves."""
    return (seconds["torch"] - seconds["ours"]) / (seconds["torch"] - seconds["without"])


def _calls(vocabulary: int) -> tuple[dict[str, Callable[[], None]], ...]:
    """The steps, and their ends."""
    torch.manual_seed(0)
    classes = {"ours": GPT, "torch": TorchGPT, "without": GPT}
    models = {name: of(vocabulary, T, n_layer=LAYERS, n_head=HEADS, n_embd=D) for name, of in classes.items()}
    for model in models.values():
        model.load_state_dict(models["ours"].state_dict())
    text = torch.randint(vocabulary, (TOKENS,)).to(torch.uint8 if vocabulary <= 256 else torch.int16)
    idx, targets = _rows(text, torch.Generator().manual_seed(0))
    _check(models["ours"], models["torch"], idx, targets)
    begin, gradient = torch.randn(BATCH, T, D), torch.randn(BATCH, T, vocabulary)
    hidden = torch.randn(BATCH, T, D, requires_grad=True)

    def backward(name: str, idx: Tensor, targets: Tensor) -> None:
        model = models[name]
        if name != "without":
            model.loss(idx, targets).backward()
            return
        x = begin
        for block in model.blocks:
            x = block(x)
        nn.functional.linear(model.norm(x), model.embedding.weight).backward(gradient)

    def ends(name: str) -> None:
        """The parts before the blocks and behind the norm: forward, then one backward, as in a step."""
        model = models[name]
        for tensor in (hidden, model.embedding.weight, model.position.weight):
            tensor.grad = None
        if name == "without":
            nn.functional.linear(hidden, model.embedding.weight).backward(gradient)
        else:
            torch.autograd.backward((model.embed(idx), model.loss_of(hidden, targets)), (begin, None))

    return (
        {name: _step(model, lambda *rows, name=name: backward(name, *rows), text) for name, model in models.items()},
        {name: lambda name=name: ends(name) for name in models},
    )


def _rows(text: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """BATCH rows of text and the token that follows each token, (BATCH, T) both."""
    starts = torch.randint(len(text) - T, (BATCH,), generator=generator)
    return text[:-1].unfold(0, T, 1).index_select(0, starts), text[1:].unfold(0, T, 1).index_select(0, starts)


def _step(model: GPT, backward: Callable[..., None], text: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        optimizer.zero_grad()
        backward(*_rows(text, generator))
        optimizer.step()

    return step


def _check(ours: GPT, reference: GPT, idx: Tensor, targets: Tensor) -> None:
    """The first step's loss and gradients are torch's."""
    results = []
    for model in (ours, reference):
        loss = model.loss(idx, targets)
        results.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    names = ["loss", *(name for name, _ in ours.named_parameters())]
    for name, found, expected in zip(names, *results, strict=True):
        error = ((found - expected).norm() / expected.norm()).item()
        if not error <= MOST_ERROR:
            raise WrongResult(f"V {ours.vocab_size}: WRONG: {name}: relative error {error:.1e}")


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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.studies.gpt_step", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    given = parser.parse_args(arguments)
    with exit_codes():
        points = measure()
    if given.json is not None:
        record.write(given.json, {"schema": record.SCHEMA, "header": record.header(), "gpt_step": points})
    print(summary(points))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
