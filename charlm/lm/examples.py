"""Training and evaluation examples of a split: one prediction per row, or a prediction at every position.

    Examples    "ab" with block_size 3: (..., a), (..a, b), (.ab, .)    for models of a window: n-gram, MLP, WaveNet
    Sequences   "ab": . a b → a b .                                     for models of every position: GPT

Both predict every token of a split exactly once, in the order of the file. The exception is `text_sequences`, whose
rows overlap on purpose.

Neither holds its rows: it holds the tokens of the split once, in memory or mapped from a file, and gathers the rows
that are asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from charlm._errors import UserError
from charlm.lm.stream import Stream
from charlm.lm.vocabulary import SEPARATOR, Vocabulary

IGNORED = -100  # target of a position without a prediction: cross_entropy's ignore_index
BLOCK = 256  # characters of running text that count as one observation
SAMPLE_SEED = 0  # of the sample of a split
COUNTED_ROWS = 1 << 20  # rows whose predictions are counted at a time

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


Rows = TypeVar("Rows", bound="Predictions")


@dataclass(frozen=True)
class Predictions:
    """Rows of predictions of the tokens of a stream.

    Attributes:
        stream: The tokens of the split.
        block_size: The largest number of tokens before a prediction that it may use.
        protocol: A key of PROTOCOLS.
        index: The numbers of the rows among those of the split; a range, or (N,) int64 on the CPU.
    """

    stream: Stream
    block_size: int
    protocol: str
    index: range | Tensor

    def __len__(self) -> int:
        return len(self.index)

    def to(self: Rows, device: torch.device | str) -> Rows:
        """The same rows, whose tensors are made on `device`."""
        return replace(self, stream=self.stream.to(device))

    def slice(self: Rows, start: int, stop: int) -> Rows:
        """The rows [start, stop)."""
        return replace(self, index=self.index[start:stop])

    def take(self: Rows, rows: Tensor) -> Rows:
        """The given rows, (M,) int64 on the CPU, in their order."""
        return replace(self, index=self._numbers(rows))

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(inputs, targets) in order, at most `size` rows at a time."""
        for start in range(0, len(self), size):
            inputs, targets, _ = self.select(torch.arange(start, min(start + size, len(self))))
            yield inputs, targets

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """(inputs, targets, number of predictions) of `rows`, (B,) int64 on the CPU."""
        raise NotImplementedError

    def count(self, rows: Tensor) -> Tensor:
        """The number of predictions of each of `rows`, (B,) int64 on the CPU."""
        raise NotImplementedError

    @property
    def tokens(self) -> int:
        """The number of predictions."""
        raise NotImplementedError

    @property
    def n_units(self) -> int:
        """The number of independent units of all rows of the split: items, or blocks of BLOCK characters or more."""
        raise NotImplementedError

    def unit_rows(self, units: Tensor) -> tuple[Tensor, Tensor]:
        """The first row of each of `units` of the split, and the row behind its last: two of (U,) int64."""
        raise NotImplementedError

    def row_units(self, rows: Tensor) -> Tensor:
        """The unit of each of `rows`, (B,) int64 on the CPU."""
        raise NotImplementedError

    def _numbers(self, rows: Tensor) -> Tensor:
        """The numbers among the rows of the split of `rows`."""
        if isinstance(self.index, range):
            return rows + self.index.start if self.index.start else rows
        return self.index[rows]


@dataclass(frozen=True)
class Examples(Predictions):
    """One prediction per row: (contexts, targets), (B, block_size) and (B,) uint8 or int32, the nearest token last."""

    @property
    def tokens(self) -> int:
        return len(self.index)

    @property
    def contexts(self) -> Tensor:
        """The contexts of all rows: (N, block_size)."""
        return self.select(torch.arange(len(self)))[0]

    @property
    def targets(self) -> Tensor:
        """The targets of all rows: (N,); for consecutive rows a view of the stream where its dtype allows it."""
        if isinstance(self.index, range):
            start = self.stream.start
            return self.stream.part(start + self.index.start, start + self.index.stop)
        return self.select(torch.arange(len(self)))[1]

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """(contexts, targets, number of predictions) of `rows`, (B,) int64 on the CPU."""
        numbers = self._numbers(rows)
        at = numbers + self.stream.start if self.stream.start else numbers
        contexts, targets = self.stream.examples(at, self.block_size, by_item=self.protocol == "items")
        if self.protocol == "fixed":  # the first prediction of a window has one token of context
            seen = (numbers % self.block_size + 1)[:, None]
            hidden = torch.arange(self.block_size) < self.block_size - seen  # (B, T)
            contexts = contexts.masked_fill(hidden.to(contexts.device), self.stream.pad_token)
        return contexts, targets, len(rows)

    def count(self, rows: Tensor) -> Tensor:
        return torch.ones(len(rows), dtype=torch.int64)

    @property
    def n_units(self) -> int:
        return self.stream.n_items if self.protocol == "items" else -(-len(self.stream) // BLOCK)

    def unit_rows(self, units: Tensor) -> tuple[Tensor, Tensor]:
        if self.protocol == "items":
            starts, ends = self.stream.items(units)
            return starts - self.stream.start, ends - self.stream.start
        return units * BLOCK, ((units + 1) * BLOCK).clamp(max=len(self.stream))

    def row_units(self, rows: Tensor) -> Tensor:
        numbers = self._numbers(rows)
        return self.stream.item_of(numbers + self.stream.start) if self.protocol == "items" else numbers // BLOCK


@dataclass(frozen=True)
class Sequences(Predictions):
    """A prediction at every position of a row: (idx, targets), (B, T) each, cropped to the longest row.

    The target of a position is the next token, or IGNORED behind the end of a row or where another row predicts it; it
    has a signed dtype where any position may be ignored.

    Attributes:
        layout: "runs", "windows" or "every", as made by `item_sequences`, `text_windows` and `text_sequences`.
        long: For "runs" of more than block_size tokens: their numbers and the number of further rows before each, two
            of (L,) int64.
        before: For "windows": the number of tokens before each row that idx has as additional first columns.
    """

    layout: str
    long: tuple[Tensor, Tensor] | None = None
    before: int = 0

    @property
    def tokens(self) -> int:
        if isinstance(self.index, range):
            if self.layout == "every":
                return len(self.index) * min(self.block_size, len(self.stream))
            if not len(self.index):
                return 0
            ends = torch.tensor([self.index.stop - 1, self.index.start])
            first, width, further = self._geometry(ends)
            first = torch.where(further, first + width - 1, first)  # of the tokens that the rows predict
            return int((first[0] + self._counts(width, further)[0] - first[1]).item())
        return sum(int(self.count(part).sum().item()) for part in torch.arange(len(self)).split(COUNTED_ROWS))

    @property
    def idx(self) -> Tensor:
        """The inputs of all rows: (N, T)."""
        return self.select(torch.arange(len(self)))[0]

    @property
    def targets(self) -> Tensor:
        """The targets of all rows: (N, T)."""
        return self.select(torch.arange(len(self)))[1]

    @property
    def lengths(self) -> Tensor:
        """(N,) int64: every column from `lengths[i]` on is ignored in row i."""
        return self._geometry(self._numbers(torch.arange(len(self))))[1]

    @property
    def counts(self) -> Tensor:
        """(N,) int64: the number of predictions of each row."""
        return self.count(torch.arange(len(self)))

    def select(self, rows: Tensor) -> tuple[Tensor, Tensor, int]:
        """(idx, targets, number of predictions) of `rows`, (B,) int64 on the CPU, cropped to the longest of them.

        idx (B, before + T), targets (B, T).
        """
        first, width, further = self._geometry(self._numbers(rows))
        columns = int(width.max().item())
        idx = self.stream.windows(first - 1 - self.before, self.before + columns)
        targets = self.stream.windows(first, columns)
        if self.layout == "every":
            return idx, targets, len(rows) * columns
        column = torch.arange(columns)
        outside = column >= width[:, None]
        padded = outside
        if self.layout == "runs":
            padded = outside | ((column == 0) & ~further[:, None])
            outside = outside | (further[:, None] & (column < width[:, None] - 1))
        padded = torch.nn.functional.pad(padded, (self.before, 0))
        idx = idx.masked_fill(padded.to(idx.device), self.stream.pad_token)
        signed = torch.int16 if targets.dtype == torch.uint8 else torch.int32
        targets = targets.to(signed).masked_fill(outside.to(targets.device), IGNORED)
        return idx, targets, int(self._counts(width, further).sum().item())

    def count(self, rows: Tensor) -> Tensor:
        _, width, further = self._geometry(self._numbers(rows))
        return self._counts(width, further)

    @property
    def n_units(self) -> int:
        if self.layout == "runs":
            return self.stream.n_items
        return -(-len(self.stream) // (self._unit * self.block_size))

    def unit_rows(self, units: Tensor) -> tuple[Tensor, Tensor]:
        if self.layout != "runs":
            rows = -(-len(self.stream) // self.block_size)
            return units * self._unit, ((units + 1) * self._unit).clamp(max=rows)
        assert self.long is not None
        return tuple(item + self._further_rows(item) for item in (units, units + 1))

    def row_units(self, rows: Tensor) -> Tensor:
        numbers = self._numbers(rows)
        return self._item_and_shift(numbers)[0] if self.layout == "runs" else numbers // self._unit

    @property
    def _unit(self) -> int:
        """The number of windows of a unit, BLOCK characters or more."""
        return -(-BLOCK // self.block_size)

    def _further_rows(self, items: Tensor) -> Tensor:
        """The number of further rows of all items before each of `items`."""
        assert self.long is not None
        long, before = self.long
        return before[torch.searchsorted(long, items)]

    @staticmethod
    def _counts(width: Tensor, further: Tensor) -> Tensor:
        return torch.where(further, 1, width)

    def _geometry(self, numbers: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Where rows lie: three of (B,).

        The index in the stream of the target in column 0; the number of columns; and whether only the last of these is
        predicted, because a row before it predicts the others.
        """
        start, size = self.stream.start, self.block_size
        if self.layout == "every":
            return numbers + start, torch.full_like(numbers, min(size, len(self.stream))), numbers < 0
        if self.layout == "windows":
            first = numbers * size
            return first + start, (len(self.stream) - first).clamp(max=size), numbers < 0
        item, shift = self._item_and_shift(numbers)
        begin, end = self.stream.items(item)
        return begin + shift, (end - begin).clamp(max=size), shift > 0

    def _item_and_shift(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """The run of each row of "runs", and the number of that run's rows before it: two of (B,)."""
        assert self.long is not None
        long, before = self.long  # before has one entry more, the number of all further rows
        if not len(long):
            return numbers, torch.zeros_like(numbers)
        # The first row of long[i] is row long[i] + before[i]. Of the last one at or before a row: the row belongs to
        # it, or to an item behind it.
        last = torch.searchsorted(long + before[:-1], numbers, right=True) - 1
        owner = torch.where(last >= 0, long[last.clamp(min=0)], -1)
        item = torch.maximum(owner, numbers - before[last + 1])
        return item, torch.where(item == owner, numbers - before[last.clamp(min=0)] - owner, 0)


def is_target(targets: Tensor) -> Tensor:
    """Mask of the targets that are not IGNORED: bool, of the same shape."""
    return targets.long() != IGNORED  # in a dtype of one byte -100 and token 156 are equal


def sample_rows(predictions: Rows, tokens: int) -> Rows:
    """About `tokens` predictions of all those of a split, which are returned as they are if they are not more.

    The sample consists of whole units, drawn without replacement. It is a function of the split alone, so that losses
    on it can be compared.
    """
    total = predictions.tokens
    if total <= tokens:
        return predictions
    count = max(2, round(tokens * predictions.n_units / total))
    generator = torch.Generator().manual_seed(SAMPLE_SEED)
    drawn = torch.randint(predictions.n_units, (2 * count,), generator=generator).unique()
    units = drawn[torch.randperm(len(drawn), generator=generator)[:count]].sort()[0]
    first, end = predictions.unit_rows(units)
    size = end - first
    row = torch.arange(int(size.sum().item())) - (size.cumsum(0) - size).repeat_interleave(size)
    return predictions.take(first.repeat_interleave(size) + row)


# ---- line format


def line_examples(items: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Examples:
    """One example per character and one per separator that ends an item; no context reaches beyond its item."""
    return item_examples(item_stream(items, vocabulary), block_size)


def line_sequences(items: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Sequences:
    """One row per item, . a b → a b ., split as in `item_sequences` if it is longer than `block_size`."""
    return item_sequences(item_stream(items, vocabulary), block_size)


def item_examples(stream: Stream, block_size: int) -> Examples:
    """`line_examples` of a stream of items."""
    return Examples(stream, block_size, "items", range(len(stream)))


def item_sequences(stream: Stream, block_size: int) -> Sequences:
    """One row per item of a stream. Each begins after a padding token and sees no other item.

    One of more than `block_size` tokens takes further rows: each predicts one token from the `block_size` before it.
    """
    long = stream.items_longer_than(block_size)
    begin, end = stream.items(long)
    before = torch.zeros(len(long) + 1, dtype=torch.int64)
    torch.cumsum(end - begin - block_size, 0, out=before[1:])
    n_rows = stream.n_items + int(before[-1].item())
    return Sequences(stream, block_size, "items", range(n_rows), "runs", (long, before))


def item_stream(items: Sequence[str], vocabulary: Vocabulary) -> Stream:
    """The tokens of all items, with a separator after each item."""
    characters = vocabulary.encode("".join(items), "the items")
    ends = torch.from_numpy(np.cumsum([len(item) + 1 for item in items], dtype=np.int64))
    targets = torch.full((int(ends[-1].item()) if len(items) else 0,), SEPARATOR, dtype=characters.dtype)
    is_character = torch.ones(len(targets), dtype=torch.bool)
    is_character[ends - 1] = False
    targets[is_character] = characters
    return Stream(targets, SEPARATOR, ends=ends, separators_end_items=not vocabulary.escapes)


# ---- running text


def text_examples(stream: Stream, block_size: int) -> Examples:
    """One example per token of the split; its context is the `block_size` tokens before it."""
    return Examples(stream, block_size, "sliding", range(len(stream)))


def in_windows(examples: Examples) -> Examples:
    """`text_examples` restricted to windows of block_size predictions, which do not see the text before them.

    As in `text_windows`, the first prediction of a window has one token of context.
    """
    return replace(examples, protocol="fixed")


def text_sequences(stream: Stream, block_size: int) -> Sequences:
    """One row of `block_size` predictions per position, for training. Rows overlap.

    A text of fewer than `block_size` tokens is a single, shorter row.
    """
    rows = len(stream) - min(block_size, len(stream)) + 1
    return Sequences(stream, block_size, "fixed", range(rows), "every")


def text_windows(stream: Stream, block_size: int, before: int = 0) -> Sequences:
    """Consecutive rows of `block_size` predictions, as nanoGPT evaluates. The last row may be shorter.

    `before` is that of `Sequences`; the stream must hold as many tokens before the split.
    """
    return Sequences(stream, block_size, "fixed", range(-(-len(stream) // block_size)), "windows", before=before)
