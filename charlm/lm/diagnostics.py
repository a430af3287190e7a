"""diagnostics.jsonl: what happens inside a network while it is trained, as in part 3 of makemore; for `charlm report`.

One JSON object per recorded step:

    {"step": 400,
     "activations": {"tanh": {"mean": 0.01, "std": 0.7, "bound": 1.0, "counts": [512, …], "saturated": 0.03}},
     "gradients": {"hidden.weight": {"mean": 1e-6, "std": 0.002, "bound": 0.008, "counts": [3, …]}},
     "updates": {"hidden.weight": 0.0011}}

counts      The histogram in BINS equal bins from -bound to bound, of which the outer ones hold what is beyond.
activations Of the tanh layers, of the states of a recurrent network, or of the GELU layers of a GPT, before the step,
            for some rows of train, in evaluation mode: without dropout, and with the running statistics of batch norm.
            saturated is the share of |h| > 0.97, not for a GPT.
gradients   Of each parameter, before clipping.
updates     std(update) / std(weight) of each weight matrix.

Of a larger tensor, SAMPLED elements at equal distances are measured. A record only reads: the losses of a run are bit
for bit those of a run without records. About RECORDS steps at equal distances are recorded, and fewer where the records
would take more than SHARE of the time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from charlm.lm.config import Config
from charlm.lm.examples import Examples, Sequences
from charlm.lm.metrics import StepLog
from charlm.lm.models import GPT, LanguageModel, Mixture
from charlm.lm.models.dropout import Dropout
from charlm.lm.models.recurrent import Recurrent

DIAGNOSTICS = "diagnostics.jsonl"
RECORDS = 100
SHARE = 0.02
BINS = 41
DEVIATIONS = 4.0  # standard deviations from 0 to the end of a histogram, except of tanh, which ends at 1
SAMPLED = 1 << 14
POSITIONS = 256  # whose activations are recorded, of a GPT eight times as many
SATURATED = 0.97  # as in makemore


class Diagnostics(StepLog):
    """The log of a run in DIR/diagnostics.jsonl. Only one process of a run writes it."""

    def __init__(self, directory: Path, step: int) -> None:
        super().__init__(directory / DIAGNOSTICS, step)

    def watching(
        self, model: LanguageModel, train: Examples | Sequences, config: Config
    ) -> Callable[[int], AbstractContextManager[None]]:
        """Returns the context of the update of the optimizer in a step, 1, 2, …, which records it if it is due."""
        network = model.network if isinstance(model, Mixture) else model
        count = 8 * POSITIONS // config.block_size if model.predicts_every_position else POSITIONS
        rows = torch.arange(max(1, min(count, config.batch_size, len(train)))) * len(train)
        idx = train.select(rows // len(rows))[0]
        interval = -(-config.max_steps // RECORDS)
        began, spent, last = time.perf_counter(), 0.0, 0.0  # seconds: all records, the last one

        @contextmanager
        def recording(step: int) -> Iterator[None]:
            nonlocal spent, last
            is_due = step % interval == 0 or step == 1
            if not is_due or spent + last > SHARE * (time.perf_counter() - began):
                yield
                return
            start = time.perf_counter()
            entry: dict[str, Any] = {"step": step, "activations": activations(network, idx)}
            given = {name: p for name, p in network.named_parameters() if p.grad is not None}
            entry["gradients"] = {name: histogram(p.grad) for name, p in given.items() if p.grad is not None}
            before = {name: sampled(p).clone() for name, p in given.items() if p.dim() > 1}
            last = time.perf_counter() - start
            yield
            start = time.perf_counter()
            ratios = {name: ((sampled(given[name]) - old).std() / old.std()).item() for name, old in before.items()}
            self.append({**entry, "updates": {name: finite(ratio) for name, ratio in ratios.items()}})
            last += time.perf_counter() - start
            spent += last

        return recording


@torch.no_grad()
def activations(network: LanguageModel, idx: Tensor) -> dict[str, dict[str, Any]]:
    """The histograms of the activations of `network` for idx (B, T), by layer."""
    found: dict[str, dict[str, Any]] = {}

    def look(name: str, bound: float | None, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found[name] = histogram(inputs[0], bound)
        if bound is not None:
            found[name]["saturated"] = finite((inputs[0].abs() > SATURATED).float().mean().item())

    watched: list[tuple[str, nn.Module, float | None]]
    if isinstance(network, GPT):
        blocks = range(len(network.blocks))
        watched = [(f"gelu {n + 1}", network.get_submodule(f"blocks.{n}.contract"), None) for n in blocks]
    else:  # dropout follows each tanh or state, also where its probability is 0
        dropouts = [module for module in network.modules() if isinstance(module, Dropout)]
        kind = "state" if isinstance(network, Recurrent) else "tanh"
        watched = [(f"{kind} {number}", module, 1.0) for number, module in enumerate(dropouts, 1)]
    hooks = [module.register_forward_pre_hook(partial(look, name, bound)) for name, module, bound in watched]
    was_training = network.training
    try:
        network.eval()(idx)
    finally:
        network.train(was_training)
        for handle in hooks:
            handle.remove()
    return found


@torch.no_grad()
def histogram(values: Tensor, bound: float | None = None) -> dict[str, Any]:
    """The entry of a tensor; without `bound` its histogram ends at DEVIATIONS standard deviations."""
    values = sampled(values).float()
    std, mean = (number.item() for number in torch.std_mean(values, correction=0))
    bound = bound or DEVIATIONS * std or 1.0
    counts: list[float] = []
    if finite(bound) is not None:
        counts = torch.histc(values.clamp(-bound, bound), BINS, -bound, bound).tolist()
    return {"mean": finite(mean), "std": finite(std), "bound": finite(bound), "counts": [int(n) for n in counts]}


def sampled(values: Tensor) -> Tensor:
    """At most 2 SAMPLED of the elements, at an odd distance so that they are of all columns of a matrix: a view."""
    return values.detach().flatten()[:: values.numel() // SAMPLED | 1]


def finite(value: float) -> float | None:
    """`value` with four digits; None for what JSON does not have."""
    return float(f"{value:.4g}") if abs(value) < float("inf") else None
