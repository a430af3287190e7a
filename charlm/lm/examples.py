"""Training and evaluation examples of a split: one prediction per row, or a prediction at every position.

    Examples    "ab" with block_size 3: (..., a), (..a, b), (.ab, .)    for models of a window: n-gram, MLP, WaveNet
    Sequences   "ab": . a b → a b .                                     for models of every position: GPT

Both predict every token of a split exactly once, in the order of the file. The exception is `text_sequences`, whose
rows overlap on purpose.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from charlm._errors import UserError
from charlm.lm.vocabulary import SEPARATOR, Vocabulary

IGNORED = -100  # target of a position without a prediction: cross_entropy's ignore_index

# The context that a prediction may use.
PROTOCOLS = {
    "items": "each item on its own",
    "sliding": "sliding full context",
    "fixed": "fixed windows",
}


def resolve_protocol(protocol: str | None, format: str, default: str) -> str:
    """The evaluation protocol of data in `format`; `default` is the one for running text where `protocol` is None.

    Raises:
        UserError: The protocol does not exist, or does not apply to `format`.
    """
    if format == "line":
        if protocol not in (None, "items"):
            raise UserError(f"protocol {protocol!r} is for running text: each item is predicted on its own")
        return "items"
    if protocol not in (None, "sliding", "fixed"):
        raise UserError(f"unknown protocol {protocol!r} of running text: it must be fixed or sliding")
    return protocol or default


@dataclass(frozen=True)
class Examples:
    """One prediction per row.

    Attributes:
        contexts: (N, block_size) uint8 or int32, the tokens before the target, the nearest one last.
        targets: (N,) of the same dtype, the token to predict.
        protocol: A key of PROTOCOLS.
    """

    contexts: Tensor
    targets: Tensor
    protocol: str

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def tokens(self) -> int:
        """The number of predictions."""
        return len(self.targets)

    def to(self, device: torch.device | str) -> Examples:
        return replace(self, contexts=self.contexts.to(device), targets=self.targets.to(device))

    def slice(self, start: int, stop: int) -> Examples:
        """Rows start, …, stop - 1."""
        return replace(self, contexts=self.contexts[start:stop], targets=self.targets[start:stop])

    def count(self, rows: Tensor) -> Tensor:
        """The number of predictions of each of `rows`: (B,) int64 → (B,) int64 on the CPU."""
        return torch.ones_like(rows)

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """(contexts, targets, number of predictions) of `rows`, (B,) int64 on the CPU."""
        rows = rows.to(self.targets.device)
        return self.contexts.index_select(0, rows), self.targets.index_select(0, rows), len(rows)

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(contexts, targets) in order, at most `size` rows at a time."""
        yield from zip(self.contexts.split(size), self.targets.split(size), strict=True)


@dataclass(frozen=True)
class Sequences:
    """A prediction at every position.

    Attributes:
        idx: (N, T) the input tokens.
        targets: (N, T) the next token of each position, or IGNORED; a signed dtype where any position is ignored.
        lengths: (N,) int64 on the CPU; every column from `lengths[i]` on is ignored in row i.
        counts: (N,) int64 on the CPU, the number of predictions of each row.
        protocol: A key of PROTOCOLS.
    """

    idx: Tensor
    targets: Tensor
    lengths: Tensor
    counts: Tensor
    protocol: str

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """The number of predictions."""
        return int(self.counts.sum().item())

    def to(self, device: torch.device | str) -> Sequences:
        return replace(self, idx=self.idx.to(device), targets=self.targets.to(device))

    def slice(self, start: int, stop: int) -> Sequences:
        """Rows start, …, stop - 1."""
        rows = slice(start, stop)
        return Sequences(self.idx[rows], self.targets[rows], self.lengths[rows], self.counts[rows], self.protocol)

    def count(self, rows: Tensor) -> Tensor:
        """The number of predictions of each of `rows`: (B,) int64 → (B,) int64 on the CPU."""
        return self.counts[rows]

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """(idx, targets, number of predictions) of `rows`, (B,) int64 on the CPU, cropped to the longest of them."""
        width = int(self.lengths[rows].max().item())
        count = int(self.counts[rows].sum().item())
        rows = rows.to(self.idx.device)
        return self.idx[:, :width].index_select(0, rows), self.targets[:, :width].index_select(0, rows), count

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(idx, targets) in order, at most `size` rows at a time."""
        for rows in torch.arange(len(self)).split(size):
            idx, targets, _ = self.select(rows)
            yield idx, targets


def is_target(targets: Tensor) -> Tensor:
    """Mask of the targets that are not IGNORED: bool, of the same shape."""
    return targets.long() != IGNORED  # in a dtype of one byte -100 and token 156 are equal


# ---- line format


def line_examples(items: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Examples:
    """One example per character and one per separator that ends an item; no context reaches beyond its item."""
    lengths = np.array([len(item) + 1 for item in items], dtype=np.int64)
    targets = _encode_items(items, vocabulary)
    ends = np.cumsum(lengths)
    total = len(targets)
    position = np.arange(total) - np.repeat(ends - lengths, lengths)  # (N,) position of each target in its item
    contexts = np.full((total, block_size), SEPARATOR, dtype=targets.dtype)
    for back in range(1, min(block_size, int(lengths.max(initial=0))) + 1):
        inside = np.flatnonzero(position >= back)
        contexts[inside, block_size - back] = targets[inside - back]
    return Examples(torch.from_numpy(contexts), torch.from_numpy(targets), "items")


def line_sequences(items: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Sequences:
    """One row per item, . a b → a b ., split as in `run_sequences` if it is longer than `block_size`."""
    lengths = np.array([len(item) + 1 for item in items], dtype=np.int64)
    return run_sequences(_encode_items(items, vocabulary), lengths, block_size, SEPARATOR, "items")


def run_sequences(tokens: np.ndarray, lengths: np.ndarray, block_size: int, pad_token: int, protocol: str) -> Sequences:
    """One row per run of tokens. Each run starts after a `pad_token` and sees no other run.

    A run of more than `block_size` tokens takes further rows: each predicts one token from the `block_size` before it.

    Args:
        tokens: The concatenated runs.
        lengths: (number of runs,) int64, each at least 1.
    """
    starts = np.cumsum(lengths) - lengths
    n_rows = 1 + np.maximum(lengths - block_size, 0)  # rows of each run
    run = np.repeat(np.arange(len(lengths)), n_rows)
    shift = np.arange(len(run)) - np.repeat(np.cumsum(n_rows) - n_rows, n_rows)  # 0 in the first row of a run
    width = np.minimum(lengths, block_size)[run]
    columns = np.arange(int(width.max(initial=0)))
    inside = columns < width[:, None]  # (N, T)
    counted = inside & ((shift[:, None] == 0) | (columns == width[:, None] - 1))
    at = np.where(inside, (starts[run] + shift)[:, None] + columns, 0)
    before = np.where((columns == 0) & (shift[:, None] == 0), pad_token, tokens[np.maximum(at - 1, 0)])
    signed = np.int16 if tokens.dtype == np.uint8 else np.int32
    targets = np.where(counted, tokens[at].astype(np.int32), IGNORED).astype(signed)
    idx = np.where(inside, before, pad_token).astype(tokens.dtype)
    return Sequences(*map(torch.from_numpy, (idx, targets, width, counted.sum(axis=1))), protocol)


def _encode_items(items: Sequence[str], vocabulary: Vocabulary) -> np.ndarray:
    """The tokens of all items, concatenated, with a separator after each item."""
    characters = vocabulary.encode("".join(items), "the items").numpy()
    ends = np.cumsum([len(item) + 1 for item in items], dtype=np.int64)
    targets = np.full(int(ends[-1]) if len(items) else 0, SEPARATOR, dtype=characters.dtype)
    is_character = np.ones(len(targets), dtype=bool)
    is_character[ends - 1] = False
    targets[is_character] = characters
    return targets


# ---- running text


def text_examples(stream: Tensor, start: int, block_size: int, pad_token: int) -> Examples:
    """One example per token of stream[start:]; contexts are views of one stream, padded with `pad_token` in front."""
    before = max(0, start - block_size)
    padding = torch.full((block_size - (start - before),), pad_token, dtype=stream.dtype)
    stream = torch.cat([padding, stream[before:]])  # (block_size + S - start,)
    return Examples(stream.unfold(0, block_size, 1)[: len(stream) - block_size], stream[block_size:], "sliding")


def in_windows(examples: Examples, pad_token: int) -> Examples:
    """`text_examples` restricted to windows of block_size predictions, which do not see the text before them.

    As in `text_windows`, the first prediction of a window has one token of context.
    """
    block_size = examples.contexts.shape[1]
    seen = torch.arange(len(examples)) % block_size + 1  # (N,) tokens of context
    hidden = torch.arange(block_size) < block_size - seen[:, None]  # (N, T)
    return Examples(examples.contexts.masked_fill(hidden, pad_token), examples.targets, "fixed")


def text_sequences(stream: Tensor, start: int, block_size: int, pad_token: int) -> Sequences:
    """One row of `block_size` predictions per position, for training. Rows overlap and are views of the stream.

    A text of fewer than `block_size` tokens is a single, shorter row.
    """
    stream = _with_token_before(stream, start, pad_token)
    width = min(block_size, len(stream) - 1)
    idx, targets = stream[:-1].unfold(0, width, 1), stream[1:].unfold(0, width, 1)
    full = torch.full((len(idx),), width)
    return Sequences(idx, targets, full, full, "fixed")


def text_windows(stream: Tensor, start: int, block_size: int, pad_token: int) -> Sequences:
    """Consecutive rows of `block_size` predictions, as nanoGPT evaluates. The last row may be shorter."""
    stream = _with_token_before(stream, start, pad_token)
    total = len(stream) - 1
    n_rows = -(-total // block_size)
    idx = torch.full((n_rows * block_size,), pad_token, dtype=stream.dtype)
    targets = torch.full(
        (n_rows * block_size,), IGNORED, dtype=torch.int16 if stream.dtype == torch.uint8 else torch.int32
    )
    idx[:total], targets[:total] = stream[:-1], stream[1:]
    counts = (total - torch.arange(n_rows) * block_size).clamp(max=block_size)
    return Sequences(idx.view(n_rows, -1), targets.view(n_rows, -1), counts, counts, "fixed")


def _with_token_before(stream: Tensor, start: int, pad_token: int) -> Tensor:
    """stream[start:] with one token in front: the one before it in the stream, or `pad_token` at the beginning."""
    first = stream[start - 1 : start] if start else torch.full((1,), pad_token, dtype=stream.dtype)
    return torch.cat([first, stream[start:]])
