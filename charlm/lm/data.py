"""A text file becomes items, a vocabulary, a split, and (context, target) examples.

Two formats:

    line   one item a line (names, words, places). Items are stripped, empty ones dropped, and each is
           modelled on its own: the separator, token 0, stands before it and must be predicted after it. The
           separator is no character of the data. It is printed ".", and a full stop in the data is a token
           of its own.
    text   running text. Every character is a token, the newline too, and there is no separator. The split is
           contiguous: the first 80 % of the characters train, the next 10 % are dev, the last 10 % test.
           Every character of a split is predicted, with the characters before it as context even where they
           lie in the split before; in front of the first character of all stand imagined newlines.

Files are UTF-8, with or without a byte order mark; "\\r\\n" and "\\r" are read as "\\n".
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from charlm.lm.errors import UserError

SPLITS = ("train", "dev", "test")
FORMATS = ("line", "text")
SEPARATOR = 0  # token of the separator in line format
SEPARATOR_GLYPH = "."  # how it is printed
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# What still counts as one item a line: short lines of few words, hardly an empty one.
ITEM_CHARACTERS = 64
ITEM_WORDS = 4.0
EMPTY_LINES = 0.02

ENCODED_AT_ONCE = 1 << 20  # characters: encoding takes 30 bytes for each, and a text may have 10⁹


# ---- reading


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file, newlines as "\\n"; None reads the names that ship with charlm.

    Raises:
        UserError: the file cannot be read, or is not UTF-8 (the text names the byte offset).
    """
    try:
        raw = resources.files("charlm.data").joinpath("names.txt").read_bytes() if path is None else path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    return decode_text(raw, str(path))


def decode_text(raw: bytes, name: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark, newlines as "\\n"; UserError as `read_text`."""
    offset = len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0
    try:
        text = raw[offset:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(f"{name} is not UTF-8: byte 0x{raw[at]:02x} at offset {at} ({error.reason})") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def guess_format(text: str) -> str:
    """ "line" if nearly every line is short, of few words, and hardly one is empty; else "text"."""
    lines = text.strip("\n").split("\n")
    items = [stripped for line in lines if (stripped := line.strip())]
    if not items or len(items) < (1 - EMPTY_LINES) * len(lines):
        return "text"
    short = sum(len(item) <= ITEM_CHARACTERS for item in items) / len(items)
    enough = int(ITEM_WORDS * len(items))  # words: one item that has more decides, and may have 10⁸
    words = sum(len(item.split(maxsplit=enough)) for item in items) / len(items)
    return "line" if short >= 0.95 and words <= ITEM_WORDS else "text"


# ---- vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a corpus, sorted by code point, and their tokens.

    With a separator the characters are tokens 1, 2, …; without one 0, 1, …. `chars` is all there is to save.
    """

    chars: str
    separator: bool
    stoi: dict[str, int] = field(init=False, repr=False, compare=False)
    _table: np.ndarray = field(init=False, repr=False, compare=False)  # (largest code point + 1,) token, or -1

    def __post_init__(self) -> None:
        first = int(self.separator)
        object.__setattr__(self, "stoi", {char: first + i for i, char in enumerate(self.chars)})
        table = np.full(ord(self.chars[-1]) + 1 if self.chars else 1, -1, dtype=np.int32)
        table[[ord(char) for char in self.chars]] = np.arange(first, first + len(self.chars))
        object.__setattr__(self, "_table", table)

    @classmethod
    def of(cls, text: str, *, separator: bool) -> Vocabulary:
        """The vocabulary of `text`; the newlines between items are no characters of theirs."""
        chars = set(text)
        return cls("".join(sorted(chars - {"\n"} if separator else chars)), separator)

    def __len__(self) -> int:
        return len(self.chars) + self.separator

    @property
    def itos(self) -> list[str]:
        """What each token is printed as."""
        return [SEPARATOR_GLYPH, *self.chars] if self.separator else list(self.chars)

    @property
    def pad_token(self) -> int:
        """What fills a context where nothing comes before: the separator, else the newline (else token 0)."""
        return SEPARATOR if self.separator else self.stoi.get("\n", 0)

    @property
    def stop_token(self) -> int | None:
        """The token that ends a sample; None in running text."""
        return SEPARATOR if self.separator else None

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that holds every token: tokens of most character models fit a byte."""
        return torch.uint8 if len(self) <= 256 else torch.int32

    def encode(self, text: str, what: str = "the text") -> Tensor:
        """The tokens of `text`, (len(text),) of `self.dtype`.

        Raises:
            UserError: a character is not in the vocabulary; the text names it and its position in `what`.
        """
        encoded = torch.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), ENCODED_AT_ONCE):
            tokens = self._lookup(text[start : start + ENCODED_AT_ONCE])
            if (tokens < 0).any():
                position = start + int((tokens < 0).argmax())
                raise UserError(
                    f"character {text[position]!r} at position {position} of {what} (the first is 0) "
                    "is not in the model's vocabulary"
                )
            encoded[start : start + len(tokens)] = torch.from_numpy(tokens)
        return encoded

    def _lookup(self, text: str) -> np.ndarray:
        """(len(text),) int32 tokens, -1 for an unknown character."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        known = points < len(self._table)
        return np.where(known, self._table[np.where(known, points, 0)], np.int32(-1))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; a separator is printed "."."""
        itos = self.itos
        return "".join(itos[token] for token in tokens)


# ---- examples


@dataclass(frozen=True)
class Examples:
    """Every prediction that a split asks for.

    contexts: (N, block_size) tokens before the target, the last one nearest; uint8 or int32.
    targets:  (N,) the token to predict; the same dtype.
    """

    contexts: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.targets)

    def to(self, device: torch.device | str) -> Examples:
        return Examples(self.contexts.to(device), self.targets.to(device))

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """(contexts, targets) in order, at most `size` at a time."""
        yield from zip(self.contexts.split(size), self.targets.split(size), strict=True)


def line_examples(items: Sequence[str], vocabulary: Vocabulary, block_size: int) -> Examples:
    """One example for each character of each item and one for the separator behind it; contexts stay in the
    item.

    "ab" with block_size 3 gives (..., a), (..a, b), (.ab, .).
    """
    lengths = np.array([len(item) + 1 for item in items], dtype=np.int64)
    characters = vocabulary.encode("".join(items), "the items").numpy()
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(items) else 0
    targets = np.full(total, SEPARATOR, dtype=characters.dtype)
    is_character = np.ones(total, dtype=bool)
    is_character[ends - 1] = False
    targets[is_character] = characters
    position = np.arange(total) - np.repeat(ends - lengths, lengths)  # (N,) of each target in its item
    contexts = np.full((total, block_size), SEPARATOR, dtype=characters.dtype)
    for back in range(1, min(block_size, int(lengths.max(initial=0))) + 1):
        inside = np.flatnonzero(position >= back)
        contexts[inside, block_size - back] = targets[inside - back]
    return Examples(torch.from_numpy(contexts), torch.from_numpy(targets))


def text_examples(text: str, start: int, stop: int, vocabulary: Vocabulary, block_size: int) -> Examples:
    """One example for each character of text[start:stop]; the contexts are views of one stream."""
    before = max(0, start - block_size)
    stream = vocabulary.encode(text[before:stop], "the text")
    missing = block_size - (start - before)
    padding = torch.full((missing,), vocabulary.pad_token, dtype=stream.dtype)
    stream = torch.cat([padding, stream])  # (block_size + stop - start,)
    contexts = stream.unfold(0, block_size, 1)[: stop - start]
    return Examples(contexts, stream[block_size:])


# ---- corpus


def split_bounds(count: int) -> tuple[int, int]:
    """Where train and dev end: int(.8 n) and int(.9 n), moved only to leave every split at least one item."""
    train_end = min(int(0.8 * count), count - 2)
    dev_end = min(max(int(0.9 * count), train_end + 1), count - 1)
    return train_end, dev_end


@dataclass(frozen=True)
class Corpus:
    """A corpus, split. `parts[split]` is a list of items (line) or one run of text (text).

    digest is a sha256 over format and splits: two corpora with one digest ask for the same predictions.
    """

    format: str
    vocabulary: Vocabulary
    parts: dict[str, list[str]]
    digest: str
    duplicates_removed: int = 0

    def examples(self, split: str, block_size: int) -> Examples:
        """Every example of `split`, on the CPU."""
        if self.format == "line":
            return line_examples(self.parts[split], self.vocabulary, block_size)
        lengths = [len(self.parts[name][0]) for name in SPLITS]
        index = SPLITS.index(split)
        start = sum(lengths[:index])
        text = "".join(self.parts[name][0] for name in SPLITS)
        return text_examples(text, start, start + lengths[index], self.vocabulary, block_size)

    def overlap(self) -> int | None:
        """How many items of dev stand in train as well; None for running text."""
        if self.format != "line":
            return None
        train = set(self.parts["train"])
        return sum(item in train for item in self.parts["dev"])


def build_corpus(
    text: str, *, format: str | None = None, seed: int = 42, dedup: bool = False, name: str = "the input"
) -> Corpus:
    """Reads `text` in `format` (guessed if None) and splits it 80/10/10.

    Items are shuffled once by `random.Random(seed)`: seed 42 gives makemore's split on makemore's file. With
    `dedup` only the first of equal items is kept, before the shuffle. Running text is split as it stands.

    Raises:
        UserError: an empty file, fewer than three items or characters, `dedup` on running text, an unknown
                   format.
    """
    if not text or text.isspace():
        raise UserError(f"{name} is empty")
    format = format or guess_format(text)
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: it is one of {', '.join(FORMATS)}")
    if format == "text":
        return _text_corpus(text, dedup, name)
    items = [item for line in text.split("\n") if (item := line.strip())]
    found = len(items)
    if dedup:
        items = list(dict.fromkeys(items))
    if len(items) < len(SPLITS):
        raise UserError(f"{name} has {_plural(len(items), 'item')}, but train, dev and test need one each")
    vocabulary = Vocabulary.of("".join(items), separator=True)
    random.Random(seed).shuffle(items)
    train_end, dev_end = split_bounds(len(items))
    parts = {"train": items[:train_end], "dev": items[train_end:dev_end], "test": items[dev_end:]}
    return Corpus("line", vocabulary, parts, _digest("line", parts), found - len(items))


def _text_corpus(text: str, dedup: bool, name: str) -> Corpus:
    if dedup:
        raise UserError(f"{name} is running text, which has no items to deduplicate (--format line makes it items)")
    if len(text) < len(SPLITS):
        raise UserError(f"{name} has {_plural(len(text), 'character')}, but train, dev and test need one each")
    train_end, dev_end = split_bounds(len(text))
    parts = {"train": [text[:train_end]], "dev": [text[train_end:dev_end]], "test": [text[dev_end:]]}
    return Corpus("text", Vocabulary.of(text, separator=False), parts, _digest("text", parts))


def _digest(format: str, parts: dict[str, list[str]]) -> str:
    digest = hashlib.sha256(format.encode())
    for split in SPLITS:
        body = "\n".join(parts[split]).encode()
        digest.update(f"\n{split} {len(parts[split])} {len(body)}\n".encode())
        digest.update(body)
    return digest.hexdigest()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def read_corpus(path: Path | None, *, format: str | None = None, seed: int = 42, dedup: bool = False) -> Corpus:
    """`build_corpus` of the file at `path`; None reads the names that ship with charlm."""
    name = "names.txt" if path is None else str(path)
    return build_corpus(read_text(path), format=format, seed=seed, dedup=dedup, name=name)
