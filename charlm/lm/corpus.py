"""A corpus and its splits, as training and evaluation see it; its tokens are in memory or in shards on a disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from charlm.lm.examples import (
    Examples,
    Sequences,
    in_windows,
    item_examples,
    item_sequences,
    text_examples,
    text_sequences,
    text_windows,
)
from charlm.lm.stream import Stream
from charlm.lm.vocabulary import Vocabulary


@dataclass(frozen=True)
class Corpus(ABC):
    """A corpus and its splits.

    Attributes:
        format: "line" or "text".
        vocabulary: The characters and their tokens.
        digest: A sha256 of format and splits; corpora of the same digest have the same examples.
        duplicates_removed: The number of items that deduplication dropped.
    """

    format: str
    vocabulary: Vocabulary
    digest: str
    duplicates_removed: int
    is_mapped: ClassVar[bool] = False  # whether the tokens are in files, of which the system holds what is used

    @property
    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """The number of items, or of characters of running text, of each split."""

    @abstractmethod
    def stream(self, split: str, block_size: int) -> Stream:
        """The tokens of `split`; in running text also up to `block_size` tokens before it."""

    @abstractmethod
    def longest_item(self, split: str) -> int:
        """The number of characters of the longest item of `split`, or of all of running text."""

    @abstractmethod
    def known(self, split: str) -> Tensor:
        """Mask of the predictions of `split` whose character is in the vocabulary: (tokens,) bool."""

    @abstractmethod
    def overlap(self) -> int | None:
        """The number of dev items that also occur in train; None for running text."""

    @abstractmethod
    def splits_containing(self, items: list[str]) -> list[list[str]]:
        """The splits that contain each of `items`."""

    def tokens(self, split: str) -> int:
        """The number of predictions of `split`."""
        return len(self.stream(split, 0))

    def examples(self, split: str, block_size: int) -> Examples:
        """Every prediction of `split`, each from up to `block_size` tokens before it."""
        make = item_examples if self.format == "line" else text_examples
        return make(self.stream(split, block_size), block_size)

    def sequences(self, split: str, block_size: int) -> Sequences:
        """Training sequences with a prediction at every position: the items, or every run of `block_size` tokens."""
        make = item_sequences if self.format == "line" else text_sequences
        return make(self.stream(split, block_size), block_size)

    def windows(self, split: str, block_size: int, before: int = 0) -> Sequences:
        """Consecutive windows of running text with a prediction at every position; `before` as in `text_windows`."""
        return text_windows(self.stream(split, max(block_size, before + 1)), block_size, before)

    def examples_in_windows(self, split: str, block_size: int) -> Examples:
        """The predictions of `windows`, one per row; no context reaches beyond its window."""
        return in_windows(self.examples(split, block_size))
