"""Several models on one split: the mean loss of each, and how far chance may have moved it.

The mean μ = Σ s_u / Σ n_u is a ratio of sums over independent units u, with s_u the nats of a unit's n_u tokens.
Its standard error, by linearisation (Cochran 1977, Sampling Techniques, 2.11 and 6.4), over m units:

    SE(μ) = sqrt( m / (m - 1) · Σ (s_u - μ n_u)² ) / Σ n_u

The units are the items in line format; in running text, whose neighbouring characters are surprising together,
blocks of BLOCK characters. Over single tokens it would come out too small.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from charlm.lm.data import Corpus
from charlm.lm.evaluate import Evaluation, fitted_baselines, predictions, surprisals
from charlm.lm.models import LanguageModel

BLOCK = 256  # characters of running text that count as one observation


@dataclass(frozen=True)
class Comparison:
    """One row of the table.

    name:           what the model is called: its folder, or the baseline's name.
    type:           a key of `charlm.lm.models.MODELS`, or `Config.label`: "mlp + 6-gram".
    evaluation:     the mean loss on the split.
    standard_error: of the mean, in nats; NaN where the split has fewer than two units.
    parameters:     numbers that an optimizer sets; 0 for a model that counts.
    seconds:        that the evaluation took on this machine now, data in memory; the training is not in it.
    """

    name: str
    type: str
    evaluation: Evaluation
    standard_error: float
    parameters: int
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """One entry of `charlm compare --json`; a number that JSON cannot hold is null."""
        loss = {key: value for key, value in self.evaluation.to_json().items() if key not in ("split", "tokens")}
        error = self.standard_error if math.isfinite(self.standard_error) else None
        return {
            "name": self.name,
            "type": self.type,
            **loss,
            "standard_error": error,
            "parameters": self.parameters,
            "evaluation_seconds": self.seconds,
        }


def measure(
    name: str, type: str, model: LanguageModel, corpus: Corpus, split: str, device: torch.device | str = "cpu"
) -> Comparison:
    """Evaluates `model`, in evaluation mode and on `device`, on all of `split`."""
    asked = predictions(model, corpus, split).to(device)
    start = time.perf_counter()
    nats = surprisals(model, asked).double().cpu()  # (N,)
    seconds = time.perf_counter() - start
    units = _units(corpus, split, len(nats))
    evaluation = Evaluation(split, asked.protocol, nats.mean().item(), len(nats))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Comparison(name, type, evaluation, standard_error(nats, units), parameters, seconds)


def measure_baselines(corpus: Corpus, split: str, add_k: float = 1.0) -> list[Comparison]:
    """The count models whose tables fit, fitted on train, from uniform to bigram."""
    return [measure(name, name, model, corpus, split) for name, model in fitted_baselines(corpus, add_k)]


def standard_error(nats: Tensor, units: Tensor) -> float:
    """Of the mean of `nats` (N,) float64, where `units` (N,) numbers the unit of each token from 0 on."""
    count = int(units[-1].item()) + 1 if len(units) else 0
    if count < 2:
        return math.nan
    deviation = torch.zeros(count, dtype=torch.float64).index_add_(0, units, nats - nats.mean())  # s_u - μ n_u
    return math.sqrt(count / (count - 1) * deviation.square().sum().item()) / len(nats)


def units_of(format: str) -> str:
    """What the standard error counts as independent, in words."""
    return "items" if format == "line" else f"blocks of {BLOCK} characters"


def _units(corpus: Corpus, split: str, tokens: int) -> Tensor:
    """The number of the unit that each token of `split` belongs to: (tokens,) int64."""
    if corpus.format == "line":
        lengths = torch.tensor([len(item) + 1 for item in corpus.parts[split]])
        return torch.arange(len(lengths)).repeat_interleave(lengths)
    return torch.arange(tokens) // BLOCK
