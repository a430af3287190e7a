"""Samples texts from a model, and finds the splits of the data that contain them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from charlm._errors import UserError
from charlm.lm.config import check_numbers
from charlm.lm.corpus import Corpus
from charlm.lm.memory import format_bytes, machine_bytes
from charlm.lm.models import LanguageModel
from charlm.lm.models.base import check_sampling
from charlm.lm.vocabulary import Vocabulary

MAX_NEW_TOKENS = {"line": 100, "text": 500}


@dataclass(frozen=True)
class SamplingOptions:
    """Sampling options.

    Attributes:
        num_samples: Number of samples.
        prompt: The text that each sample begins with.
        max_new_tokens: Largest number of characters after the prompt; None is 100 for an item, 500 for running text.
        temperature: Divisor of the logits; 0 takes the most probable token.
        top_k: Sample among the k most probable tokens.
        top_p: Sample among the most probable tokens that together reach this probability.
        seed: Random seed; equal seeds give equal samples.

    Raises:
        UserError: An option is out of its range.
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
    """Samples `options.num_samples` texts that begin with the prompt; an item ends before its separator.

    Raises:
        UserError: A character of the prompt is not in the vocabulary, or the samples do not fit into memory.
    """
    tokens = model.generate(**_arguments(vocabulary, options, device))
    stop = vocabulary.stop_token
    return [vocabulary.decode(row[: row.index(stop)] if stop in row else row) for row in tokens.tolist()]


def stream(
    model: LanguageModel, vocabulary: Vocabulary, options: SamplingOptions, device: torch.device | str = "cpu"
) -> Iterator[str]:
    """Yields the characters after the prompt of one text, as `sample` with `num_samples` of 1 returns them in the end.

    Raises:
        UserError: A character of the prompt is not in the vocabulary.
    """
    itos, stop = vocabulary.itos, vocabulary.stop_token
    drawn = model.draw(**_arguments(vocabulary, replace(options, num_samples=1), device))
    return (itos[token.item()] for token in drawn if token.item() != stop)


def _arguments(vocabulary: Vocabulary, options: SamplingOptions, device: torch.device | str) -> dict[str, Any]:
    """The arguments of `LanguageModel.generate`; UserError as of `sample`."""
    start = vocabulary.encode(options.prompt, "the prompt").long().to(device)
    max_new_tokens = options.max_new_tokens or MAX_NEW_TOKENS["line" if vocabulary.separator else "text"]
    length, device = len(start) + max_new_tokens, torch.device(device)
    needed = options.num_samples * (2 * 8 * length + 3 * 4 * len(vocabulary))  # tokens, and the logits of one step
    if needed > machine_bytes(device):
        raise UserError(
            f"{options.num_samples:,} samples of up to {length:,} characters may take {format_bytes(needed)} of "
            f"memory, but {device.type} has {format_bytes(machine_bytes(device))}: draw fewer at a time, each with "
            "another seed"
        )
    return {
        "idx": start.expand(options.num_samples, -1),
        "max_new_tokens": max_new_tokens,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "stop_token": vocabulary.stop_token,
        "generator": torch.Generator().manual_seed(options.seed),
    }


def containing_splits(samples: list[str], corpus: Corpus) -> list[str]:
    """The splits that contain each sampled item, such as "train" or "train, dev"; "new" if none does."""
    return [", ".join(splits) or "new" for splits in corpus.splits_containing(samples)]
