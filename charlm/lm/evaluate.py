"""The exact loss of a model on a whole split, and the table that puts it beside the baselines."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from charlm.lm.data import Corpus, Examples
from charlm.lm.models import COUNT_MODELS, LanguageModel

CHUNK = 8192  # rows at a time: the logits of a chunk stay in cache for most vocabularies


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on a split.

    nats:   mean surprisal of a token, -log p, every token weighing the same.
    tokens: how many were predicted. In line format an item of n characters makes n + 1: the end is predicted
            too, and stands for the newline of the file; so nats per token is nats per character of the file.
    """

    split: str
    nats: float
    tokens: int

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf

    def to_json(self) -> dict[str, str | int | float | None]:
        """The fixed form of `charlm eval --json`; a number that JSON cannot hold is null."""
        numbers = {"nats": self.nats, "bits_per_char": self.bits_per_char, "perplexity": self.perplexity}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {"split": self.split, **finite, "tokens": self.tokens}


@torch.no_grad()
def evaluate(model: LanguageModel, examples: Examples, split: str) -> Evaluation:
    """The mean loss over all of `examples`, exact: summed in double, the model in evaluation mode."""
    training = model.training
    model.eval()
    total = torch.zeros((), dtype=torch.float64, device=examples.targets.device)
    for contexts, targets in examples.chunks(CHUNK):
        total += surprisal(model, contexts, targets).sum(dtype=torch.float64)
    model.train(training)
    return Evaluation(split, total.item() / len(examples), len(examples))


def surprisal(model: LanguageModel, contexts: Tensor, targets: Tensor) -> Tensor:
    """-log p of each target: contexts (N, T), targets (N,) → (N,) nats."""
    return model.loss(contexts, targets, reduction="none")


def baselines(corpus: Corpus, split: str = "dev", add_k: float = 1.0) -> dict[str, Evaluation]:
    """The count models whose tables fit, fitted on train and evaluated on `split`, from uniform to bigram."""
    train, held_out = (corpus.examples(name, block_size=1) for name in ("train", split))
    table = {}
    for name, kind in COUNT_MODELS.items():
        if not kind.fits(len(corpus.vocabulary)):
            continue
        model = kind(len(corpus.vocabulary), pad_token=corpus.vocabulary.pad_token, add_k=add_k)
        model.fit(train)
        table[name] = evaluate(model, held_out, split)
    return table
