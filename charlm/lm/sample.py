"""Samples from a model, as text, and where they stand in the data."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from charlm.lm.config import check_numbers
from charlm.lm.data import SPLITS, Corpus
from charlm.lm.errors import UserError
from charlm.lm.memory import machine_bytes, readable
from charlm.lm.models import LanguageModel
from charlm.lm.models.base import check_sampling
from charlm.lm.vocabulary import Vocabulary

MAX_NEW_TOKENS = {"line": 100, "text": 500}


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample.

    num_samples, prompt, max_new_tokens (None: 100 for an item, 500 for running text), temperature (0: the
    most probable token), top_k, top_p: as `LanguageModel.generate`. seed: of the draws; equal seeds give
    equal samples.

    Raises:
        UserError: an option that no distribution follows from.
    """

    num_samples: int = 20
    prompt: str = ""
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 1337

    def __post_init__(self) -> None:
        check_numbers(vars(self))
        for name in ("num_samples", "max_new_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}, but must be at least 1")
        try:
            check_sampling(self.temperature, self.top_k, self.top_p)
        except ValueError as error:
            raise UserError(str(error)) from error


def sample(
    model: LanguageModel, vocabulary: Vocabulary, options: SamplingOptions, device: torch.device | str = "cpu"
) -> list[str]:
    """`options.num_samples` texts, each beginning with the prompt; an item ends before its separator.

    Raises:
        UserError: a character of the prompt is not in the vocabulary.
    """
    start = vocabulary.encode(options.prompt, "the prompt").long().to(device)
    max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS["line" if vocabulary.separator else "text"]
    _check_fits(options.num_samples, len(start) + max_new_tokens, len(vocabulary), torch.device(device))
    tokens = model.generate(
        start.expand(options.num_samples, -1),
        max_new_tokens,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop_token=vocabulary.stop_token,
        generator=torch.Generator().manual_seed(options.seed),
    )
    return [vocabulary.decode(_before_stop(row, vocabulary.stop_token)) for row in tokens.tolist()]


def _check_fits(num_samples: int, length: int, vocab_size: int, device: torch.device) -> None:
    """Raises UserError where the samples may take more memory than there is: their tokens, and logits of a step."""
    needed = num_samples * (2 * 8 * length + 3 * 4 * vocab_size)
    if needed > machine_bytes(device):
        raise UserError(
            f"{num_samples:,} samples of up to {length:,} characters may take {readable(needed)} of memory, and "
            f"{device.type} has {readable(machine_bytes(device))}: draw fewer at a time, with another seed each"
        )


def _before_stop(row: list[int], stop_token: int | None) -> list[int]:
    return row[: row.index(stop_token)] if stop_token in row else row


def standing(samples: list[str], corpus: Corpus) -> list[str]:
    """For each sampled item the splits it stands in, as "train" or "train, dev"; "new" if in none."""
    items = {split: set(corpus.parts[split]) for split in SPLITS}
    return [", ".join(split for split in SPLITS if text in items[split]) or "new" for text in samples]
