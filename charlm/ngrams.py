"""Counts of the n-grams of a text, natively, for all lengths up to a longest one at once.

For "abab" and max_length 2::

    a 2, b 2
    ab 2, ba 1

The n-grams of all lengths form a trie: an n-gram is a shorter n-gram and one more token. `count_ngrams` returns the
trie level by level. `count_spectra` returns only how many n-grams there are of each count, which is enough for an
entropy and takes little memory for a text of any size.

An n-gram is sorted as 64-bit words, with log2(V + 1) bits, rounded up, for each token of V distinct ones: 100 MB of
text at length 6 take a few seconds on two cores, in one word or in two. Memory is a copy of the tokens (1 byte each for
up to 255 distinct tokens, 2 bytes up to 65,535, else 4), at most 256 MiB for sorting, and the result. The counting uses
`torch.get_num_threads()` threads; results do not depend on them. With CHARLM_BACKEND=reference numpy counts, slowly and
in memory that is a multiple of the text.

`memory` bounds what the counting allocates, in bytes. The tokens are not copied, so that they may be a memory-mapped
file that is larger than memory. Sorted runs of n-grams are written to `directory` and merged, and the result is a list
of memory-mapped files there. All files are without a name from the beginning: their space is free again when the
counting fails or is interrupted, when the process dies, or when the arrays of the result are deleted.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor

from charlm import _ext
from charlm.reference import ngrams as reference

MAX_LENGTH = 1000  # of an n-gram; a window of this many tokens is kept in memory while it is sorted
BUFFER_BYTES = 256 * 2**20
LEAST_MEMORY = 16 * 2**20  # beside the table of tokens, 8 bytes for each value up to the largest token

Tokens = str | bytes | np.ndarray | Tensor

__all__ = ["NgramLevel", "Spectrum", "as_tokens", "count_ngrams", "count_spectra"]


class NgramLevel(NamedTuple):
    """The n-grams of one length, sorted by their tokens.

    Attributes:
        parent: (D,) int64, the index of the n-gram without its last token in the level of the length below; 0 at
            length 1.
        token: (D,) int32, the last token.
        count: (D,) int64, the number of occurrences.
    """

    parent: np.ndarray
    token: np.ndarray
    count: np.ndarray


class Spectrum(NamedTuple):
    """The counts of counts of n-grams: `ngrams[i]` distinct n-grams occur `count[i]` times each.

    Attributes:
        count: (D,) int64, strictly increasing.
        ngrams: (D,) int64.
    """

    count: np.ndarray
    ngrams: np.ndarray


def as_tokens(text: Tokens) -> np.ndarray:
    """The tokens of a text as an array.

    Args:
        text: a str (its code points), bytes (their values), or a one-dimensional array or CPU tensor of any integer
            dtype.

    Returns:
        (N,) uint8, uint16 or uint32. An array of one of these or of int8, int16 or int32 is not copied.

    Raises:
        TypeError: another type, or tokens that are not integers.
        ValueError: more than one dimension, or a token below 0 or above 4294967295; the text names it and its position.
    """
    if isinstance(text, str):
        ascii = text.isascii()  # one byte a token instead of four
        raw = text.encode("ascii" if ascii else "utf-32-le", "surrogatepass")
        return np.frombuffer(raw, np.uint8 if ascii else np.dtype("<u4"))
    if isinstance(text, bytes):
        return np.frombuffer(text, np.uint8)
    if not isinstance(text, np.ndarray | Tensor):
        raise TypeError(f"expected a str, bytes, an array or a tensor of tokens, but got {type(text).__name__}")
    tokens = text.detach().numpy() if isinstance(text, Tensor) else text
    if tokens.dtype.kind not in "iu":
        raise TypeError(f"expected tokens of an integer dtype, but got {tokens.dtype}")
    if tokens.ndim != 1:
        raise ValueError(f"expected tokens of one dimension, but got shape {tokens.shape}")
    if tokens.strides[0] % tokens.itemsize or not tokens.flags.aligned:  # a field of a structured array
        tokens = tokens.copy()
    if tokens.dtype in (np.uint8, np.uint16, np.uint32):
        return tokens
    if tokens.dtype in (np.int8, np.int16, np.int32) and tokens.min(initial=0) >= 0:
        return tokens.view(f"u{tokens.itemsize}")
    for bad in (tokens < 0, tokens > np.iinfo(np.uint32).max):
        if bad.any():
            position = int(bad.argmax())
            raise ValueError(f"token {tokens[position]} at position {position} is not in [0, 4294967295]")
    return np.ascontiguousarray(tokens, np.uint32)


def count_ngrams(
    text: Tokens,
    max_length: int,
    *,
    starts: int | None = None,
    boundary: int | None = None,
    memory: int | None = None,
    directory: str | Path | None = None,
) -> list[NgramLevel]:
    """The n-grams of `text` of lengths 1 to `max_length`, and the number of their occurrences.

    Args:
        text: N tokens, as `as_tokens` takes them, each below 2³¹.
        max_length: the longest length, 1 to 1000.
        starts: count the n-grams that begin at one of the first `starts` tokens; None is all of them.
        boundary: a token that ends an n-gram: behind the first position it occurs only as the last token.
        memory: the largest number of bytes to allocate, for counting on disk; None counts in memory. A str, and tokens
            that `as_tokens` copies, are converted in memory first.
        directory: the folder of the temporary files of counting on disk; None is `tempfile.gettempdir()`.

    Returns:
        A list with one `NgramLevel` for each length; for lengths beyond the text it is empty. If `memory` is given, the
        arrays are memory-mapped temporary files.

    Raises:
        TypeError, ValueError: as in `as_tokens`; a `max_length` or `starts` out of range, or too little `memory`.
        OSError: a temporary file cannot be written; with errno ENOSPC, `directory` is full, or free space is less than
            the first run makes likely.

    Example:
        >>> singles, pairs = charlm.ngrams.count_ngrams("abab", 2)
        >>> [chr(token) for token in singles.token], singles.count.tolist()
        (['a', 'b'], [2, 2])
        >>> pairs.parent.tolist(), [chr(token) for token in pairs.token], pairs.count.tolist()
        ([0, 1], ['b', 'a'], [2, 1])
    """
    tokens = as_tokens(text)
    starts = len(tokens) if starts is None else starts
    if not 0 <= starts <= len(tokens):
        raise ValueError(f"starts is {starts}, but must be at least 0 and at most {len(tokens)}, the number of tokens")
    if tokens.dtype == np.uint32 and tokens.max(initial=0) > np.iinfo(np.int32).max:
        position = int(tokens.argmax())
        raise ValueError(f"token {tokens[position]} at position {position} is above 2147483647")
    max_length = _checked_length(max_length)
    return _count_ngrams(tokens, max_length, starts, boundary, *_room(memory, directory, tokens))


def count_spectra(
    text: Tokens, max_length: int, *, memory: int | None = None, directory: str | Path | None = None
) -> tuple[list[Spectrum], list[Spectrum]]:
    """The number of n-grams of each count, for lengths 1 to `max_length`.

    Args:
        text: N tokens, as `as_tokens` takes them.
        max_length: the longest length, 1 to 1000.
        memory: as in `count_ngrams`.
        directory: as in `count_ngrams`.

    Returns:
        (ngrams, contexts): a list with a `Spectrum` for each length 1, 2, ..., and one with a `Spectrum` for each
        length 0, 1, .... A context is an n-gram that is followed by another token; the last n-gram of the text is none.

    Raises:
        TypeError, ValueError: as in `as_tokens`; a `max_length` out of range, or too little `memory`.
        OSError: as in `count_ngrams`.

    Example:
        >>> ngrams, contexts = charlm.ngrams.count_spectra("abab", 2)
        >>> ngrams[1]  # one pair occurs once, one twice
        Spectrum(count=array([1, 2]), ngrams=array([1, 1]))
    """
    tokens, max_length = as_tokens(text), _checked_length(max_length)
    return _count_spectra(tokens, max_length, *_room(memory, directory, tokens))


def _checked_length(max_length: int) -> int:
    if not 1 <= max_length <= MAX_LENGTH:
        raise ValueError(f"max_length is {max_length}, but must be at least 1 and at most {MAX_LENGTH}")
    return max_length


def _room(memory: int | None, directory: str | Path | None, tokens: np.ndarray) -> tuple[int, str | Path | None]:
    """The bytes to count in, and the folder of counting on disk; None without `memory`, which counts in memory."""
    if memory is None:
        return BUFFER_BYTES, None
    if _ext._C is None:
        raise ValueError("memory cannot be bounded with CHARLM_BACKEND=reference, which counts in memory")
    top = int(tokens.max(initial=0)) if tokens.dtype == np.uint32 else np.iinfo(tokens.dtype).max
    if top >= _ext._C.max_ngram_tokens:
        raise ValueError(f"memory can be bounded for tokens below {_ext._C.max_ngram_tokens}, but one is {top}")
    least = LEAST_MEMORY + 8 * (top + 1)
    if memory < least:
        raise ValueError(f"memory is {memory} bytes, but must be at least {least} for these tokens")
    return memory, directory or tempfile.gettempdir()


# `directory` selects counting on disk, in `buffer_bytes`.


def _count_ngrams(
    tokens: np.ndarray,
    max_length: int,
    starts: int,
    boundary: int | None,
    buffer_bytes: int,
    directory: str | Path | None = None,
) -> list[NgramLevel]:
    if _ext._C is None:
        return [NgramLevel(*level) for level in reference.count_ngrams(tokens, max_length, starts, boundary)]
    small, distinct = _small_tokens(tokens)
    if distinct is not None and boundary is not None:
        boundary = int(np.searchsorted(distinct, boundary)) if boundary in distinct else None
    bound = -1 if boundary is None else boundary
    arguments = small, max_length, starts, bound, torch.get_num_threads(), buffer_bytes
    if directory is None:
        levels = _ext._C.count_ngrams(*arguments, [], None, [])
    else:
        with _temporary_files(directory, 2 + 3 * max_length) as (first, second, *columns):
            run_files, level_files = [first.fileno(), second.fileno()], [file.fileno() for file in columns]
            _ext._C.count_ngrams(*arguments, run_files, partial(_check_space, directory), level_files)
            dtypes = [np.int64, np.int32, np.int64] * max_length
            arrays = [_mapped(file, dtype) for file, dtype in zip(columns, dtypes, strict=True)]
        levels = zip(arrays[::3], arrays[1::3], arrays[2::3], strict=True)
    if distinct is not None:
        levels = [(parent, distinct[token].astype(np.int32), count) for parent, token, count in levels]
    return [NgramLevel(*level) for level in levels]


def _count_spectra(
    tokens: np.ndarray, max_length: int, buffer_bytes: int, directory: str | Path | None = None
) -> tuple[list[Spectrum], list[Spectrum]]:
    if _ext._C is None:
        ngrams, contexts = reference.count_spectra(tokens, max_length)
    else:
        small, _ = _small_tokens(tokens)
        with contextlib.nullcontext([]) if directory is None else _temporary_files(directory, 2) as files:
            run_files, check_space = [file.fileno() for file in files], partial(_check_space, directory)
            ngrams, contexts = _ext._C.count_spectra(
                small, max_length, torch.get_num_threads(), buffer_bytes, run_files, check_space
            )
    return [Spectrum(*each) for each in ngrams], [Spectrum(*each) for each in contexts]


@contextlib.contextmanager
def _temporary_files(directory: str | Path, number: int) -> Iterator[list[IO[bytes]]]:
    """Open files without a name in `directory`; an OSError that is raised inside names it."""
    with contextlib.ExitStack() as stack:
        try:
            yield [stack.enter_context(tempfile.TemporaryFile(dir=directory, buffering=0)) for _ in range(number)]
        except OSError as error:
            if error.filename is not None or error.errno is None:
                raise
            raise OSError(error.errno, f"counting n-grams on disk: {error.strerror}", str(directory)) from None


def _check_space(directory: str | Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        message = f"counting n-grams needs about {needed:,} bytes on disk, of which {free:,} are free"
        raise OSError(errno.ENOSPC, message, str(directory))


def _mapped(file: IO[bytes], dtype: type) -> np.ndarray:
    if file.seek(0, 2) == 0:
        return np.empty(0, dtype)
    return np.memmap(file, dtype, "r+")


def _small_tokens(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Tokens below the kernels' limit, in the same order, and the original of each (None: they are the originals)."""
    if tokens.dtype != np.uint32 or tokens.max(initial=0) < _ext._C.max_ngram_tokens:
        return tokens, None
    distinct, ranks = np.unique(tokens, return_inverse=True)
    return ranks.astype(np.uint32), distinct
