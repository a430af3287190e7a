"""Counts of n-grams in plain numpy: one np.unique for each length, of (number of the shorter gram, token)."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np

# (parent, token, count): the fields of `charlm.ngrams.NgramLevel`
Level: TypeAlias = tuple[np.ndarray, np.ndarray, np.ndarray]
# (count, ngrams): the fields of `charlm.ngrams.Spectrum`
Counts: TypeAlias = tuple[np.ndarray, np.ndarray]


def count_ngrams(tokens: np.ndarray, max_length: int, starts: int, boundary: int | None) -> list[Level]:
    """The n-grams of each length; the arguments are those of `charlm.ngrams.count_ngrams`, checked."""
    levels = []
    start = np.arange(starts)  # (N,) of each window that is long enough
    rank = np.zeros(starts, np.int64)  # (N,) of its n-gram among those of this length
    tokens_below = int(tokens.max(initial=0)) + 1
    for length in range(1, max_length + 1):
        goes_on = start + length <= len(tokens)
        if boundary is not None and length >= 3:
            goes_on &= tokens[start + length - 2] != boundary
        start, rank = start[goes_on], rank[goes_on]
        pairs = rank * tokens_below + tokens[start + length - 1]
        distinct, rank, count = np.unique(pairs, return_inverse=True, return_counts=True)
        parent, token = np.divmod(distinct, tokens_below)
        levels.append((parent, token.astype(np.int32), count.astype(np.int64)))
    return levels


def count_spectra(tokens: np.ndarray, max_length: int) -> tuple[list[Counts], list[Counts]]:
    """The spectra of n-grams and contexts; the arguments are those of `charlm.ngrams.count_spectra`, checked."""
    levels = count_ngrams(tokens, max_length, len(tokens), None)
    shorter = [1, *(len(token) for _, token, _ in levels)]
    followed = [
        np.bincount(parent, weights=count, minlength=size).astype(np.int64)
        for (parent, _, count), size in zip(levels, shorter, strict=False)
    ]
    return [_spectrum(count) for _, _, count in levels], [_spectrum(count[count > 0]) for count in followed]


def _spectrum(count: np.ndarray) -> Counts:
    distinct, ngrams = np.unique(count, return_counts=True)
    return distinct.astype(np.int64), ngrams.astype(np.int64)
