"""The exact loss of a model on a whole split, and the table that puts it beside the baselines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from charlm.lm.data import Corpus
from charlm.lm.errors import UserError
from charlm.lm.examples import Examples, Sequences, is_asked
from charlm.lm.models import COUNT_MODELS, LanguageModel
from charlm.lm.vocabulary import UNKNOWN

CHUNK = 8192  # predictions at a time: the logits of a chunk stay in cache for most vocabularies


@dataclass(frozen=True)
class Evaluation:
    """A model's loss on a split.

    protocol: a key of PROTOCOLS, what a prediction could see of the tokens before it.
    nats:   mean surprisal of a token, -log p, every token weighing the same.
    tokens: how many were predicted. In line format an item of n characters makes n + 1: the end is predicted
            too, and stands for the newline of the file; so nats per token is nats per character of the file.
    """

    split: str
    protocol: str
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
        return {"split": self.split, "protocol": self.protocol, **finite, "tokens": self.tokens}


def predictions(model: LanguageModel, corpus: Corpus, split: str, protocol: str | None = None) -> Examples | Sequences:
    """What `split` asks of `model`, every token once, in the order of the file.

    Args:
        protocol: for running text "sliding", from the last block_size tokens each, or "fixed", within windows of
            block_size side by side, as nanoGPT has it; None is the one that costs the model one pass over the text.
            Items have one protocol only.

    Raises:
        UserError: an unknown protocol, or one for items.
    """
    if corpus.format == "line":
        if protocol not in (None, "items"):
            raise UserError(f"protocol {protocol!r} is for running text: items are predicted each on its own")
        if model.predicts_every_position:
            return corpus.sequences(split, model.block_size)
        return corpus.examples(split, model.block_size)
    protocol = protocol or ("fixed" if model.predicts_every_position else "sliding")
    if protocol == "sliding":
        return corpus.examples(split, model.block_size)
    if protocol != "fixed":
        raise UserError(f"unknown protocol {protocol!r} of running text: it is fixed or sliding")
    if model.predicts_every_position:
        return corpus.windows(split, model.block_size)
    return corpus.examples_in_windows(split, model.block_size)


@torch.no_grad()
def surprisals(model: LanguageModel, asked: Examples | Sequences) -> Tensor:
    """-log p of each predicted token, (tokens,) nats in the order of `asked`; the model in evaluation mode."""
    training = model.training
    model.eval()
    rows = max(1, CHUNK // model.block_size) if model.predicts_every_position else CHUNK
    parts = []
    for idx, targets in asked.chunks(rows):
        losses = model.loss(idx, targets, reduction="none")
        parts.append(losses[is_asked(targets)] if isinstance(asked, Sequences) else losses)
    model.train(training)
    return torch.cat(parts)


def evaluate(model: LanguageModel, asked: Examples | Sequences, split: str) -> Evaluation:
    """The mean loss over all that is `asked`, exact: summed in double, the model in evaluation mode."""
    nats = surprisals(model, asked).sum(dtype=torch.float64).item() / asked.tokens
    return Evaluation(split, asked.protocol, nats, asked.tokens)


def evaluate_on(
    model: LanguageModel,
    corpus: Corpus,
    split: str,
    protocol: str | None = None,
    unknown: str = "error",
    device: torch.device | str = "cpu",
) -> tuple[Evaluation, int]:
    """The mean loss on a split, and how many of its characters are unknown, which are an "error" or an "escape".

    Escapes cost what the head of `charlm.lm.character_model` derives.

    Raises:
        UserError: an unknown character; a `protocol` or `unknown` that does not exist.
    """
    if unknown not in UNKNOWN:
        raise UserError(f"unknown is {unknown!r}, but must be {' or '.join(UNKNOWN)}")
    escapes = unknown == "escape"
    vocabulary = replace(corpus.vocabulary, escapes=escapes)
    asked = predictions(model, replace(corpus, vocabulary=vocabulary), split, protocol).to(device)
    if not escapes:
        return evaluate(model, asked, split), 0
    end = "\n" if corpus.format == "line" else ""
    escaped = ~vocabulary.known("".join(f"{part}{end}" for part in corpus.parts[split]))
    if end:  # is predicted too, and always known
        lengths = torch.tensor([len(item) + 1 for item in corpus.parts[split]])
        escaped[lengths.cumsum(0) - 1] = False
    nats = vocabulary.with_escapes(surprisals(model, asked).double().cpu(), escaped)
    return Evaluation(split, asked.protocol, nats.mean().item(), len(nats)), int(escaped.sum().item())


def fitted_baselines(corpus: Corpus, add_k: float = 1.0) -> Iterator[tuple[str, LanguageModel]]:
    """The count models whose tables fit, by name, fitted on train, from uniform to bigram; one at a time."""
    train, vocabulary = corpus.examples("train", block_size=1), corpus.vocabulary
    for name, kind in COUNT_MODELS.items():
        if kind.fits(len(vocabulary)):
            model = kind(len(vocabulary), pad_token=vocabulary.pad_token, add_k=add_k).eval()
            model.fit(train)
            yield name, model


def baselines(corpus: Corpus, split: str = "dev", add_k: float = 1.0) -> dict[str, Evaluation]:
    """`fitted_baselines`, evaluated on `split`."""
    held_out = corpus.examples(split, block_size=1)
    return {name: evaluate(model, held_out, split) for name, model in fitted_baselines(corpus, add_k)}
