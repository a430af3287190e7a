"""Counts of n-grams in plain numpy: one np.unique for each length, of (number of the shorter gram, token)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class NgramLevel(NamedTuple):
    """The n-grams of one length, sorted by their tokens.

    parent: (D,) int64, the place of the n-gram without its last token among those that are one token shorter; 0 at
            length 1.
    token:  (D,) int32, the last token.
    count:  (D,) int64, how often the n-gram occurs.
    """

    parent: np.ndarray
    token: np.ndarray
    count: np.ndarray


class Spectrum(NamedTuple):
    """How many n-grams there are of each count: `ngrams[i]` occur `count[i]` times; both int64, count rising."""

    count: np.ndarray
    ngrams: np.ndarray


def count_ngrams(tokens: np.ndarray, max_length: int, starts: int, boundary: int | None) -> list[NgramLevel]:
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
        levels.append(NgramLevel(parent, token.astype(np.int32), count.astype(np.int64)))
    return levels


def count_spectra(tokens: np.ndarray, max_length: int) -> tuple[list[Spectrum], list[Spectrum]]:
    """The spectra of n-grams and contexts; the arguments are those of `charlm.ngrams.count_spectra`, checked."""
    levels = count_ngrams(tokens, max_length, len(tokens), None)
    shorter = [1, *(len(level.token) for level in levels)]
    followed = [
        np.bincount(level.parent, weights=level.count, minlength=size).astype(np.int64)
        for level, size in zip(levels, shorter, strict=False)
    ]
    return [_spectrum(level.count) for level in levels], [_spectrum(count[count > 0]) for count in followed]


def _spectrum(count: np.ndarray) -> Spectrum:
    return Spectrum(*(array.astype(np.int64) for array in np.unique(count, return_counts=True)))
