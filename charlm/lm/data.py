"""A text file becomes items, a vocabulary and a split; what is predicted of it stands in `examples`.

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

import codecs
import hashlib
import io
import itertools
import random
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import BinaryIO

from torch import Tensor

from charlm.lm.encodings import advice, conversion, wide_encoding
from charlm.lm.errors import UserError
from charlm.lm.examples import (
    Examples,
    Sequences,
    in_windows,
    line_examples,
    line_sequences,
    text_examples,
    text_sequences,
    text_windows,
)
from charlm.lm.vocabulary import Vocabulary

SPLITS = ("train", "dev", "test")
WHOLE = "all"  # the one split of a text that is not split
FORMATS = ("line", "text")
STDIN = Path("-")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# What still counts as one item a line: short lines of few words, hardly an empty one.
ITEM_CHARACTERS = 64
ITEM_WORDS = 4.0
EMPTY_LINES = 0.02


# ---- reading


def read_text(path: Path | None) -> str:
    """The text of a UTF-8 file, newlines as "\\n"; None reads the names that ship with charlm, "-" standard input.

    Raises:
        UserError: the file cannot be read, or is not UTF-8 (the text names the byte offset, what the file looks like
                   and the command that converts it).
    """
    if path is None:
        return decode_text(resources.files("charlm.data").joinpath("names.txt").read_bytes(), data_name(path))
    with opened(path) as file:
        return decode_text(file.read(), data_name(path))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """The bytes at `path`, of standard input for "-"; an OSError inside is a UserError that names the data."""
    try:
        if path == STDIN:
            if sys.stdin is None:  # closed as the process began
                raise UserError("standard input is closed: give a file")
            yield sys.stdin.buffer
        else:
            with path.open("rb") as file:
                yield file
    except OSError as error:
        raise UserError(f"cannot read {data_name(path)}: {error.strerror}") from error


def data_name(path: Path | None) -> str:
    """What a person calls the data at `path`."""
    if path is None:
        return "names.txt"
    return "standard input" if path == STDIN else str(path)


def decode_text(raw: bytes, name: str) -> str:
    """The text of UTF-8 bytes, without a byte order mark, newlines as "\\n"; UserError as `read_text`."""
    offset = len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0
    try:
        text = raw[offset:].decode("utf-8")
    except UnicodeDecodeError as error:
        at = offset + error.start
        raise UserError(
            f"{name} is not UTF-8: byte 0x{raw[at]:02x} at offset {at} ({error.reason}){advice(raw, at, name)}"
        ) from error
    encoding = wide_encoding(raw)
    if encoding is not None:
        raise UserError(
            f"{name} looks like {encoding}, not UTF-8: every second byte is NUL; {conversion(encoding, name)}"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode_blocks(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    """`decode_text` of bytes that come in blocks, cut anywhere: what is held does not grow with them."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    newlines = io.IncrementalNewlineDecoder(None, translate=True)
    read = 0  # bytes in front of the block and of what the decoder kept of the one before
    for block in itertools.chain(blocks, [b""]):
        if read == 0 and wide_encoding(block) is not None:
            decode_text(block, name)  # raises: what says so is its head
        kept = decoder.getstate()[0]
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raw, at = error.object, error.start
            raise UserError(
                f"{name} is not UTF-8: byte 0x{raw[at]:02x} at offset {read - len(kept) + at} ({error.reason})"
                f"{advice(raw, at, name)}"
            ) from error
        if read == 0:
            text = text.removeprefix(BYTE_ORDER_MARK.decode())
        read += len(block)
        yield newlines.decode(text, final=not block)


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


# ---- corpus


def split_bounds(count: int) -> tuple[int, int]:
    """Where train and dev end: int(.8 n) and int(.9 n), moved only to leave every split at least one item."""
    train_end = min(int(0.8 * count), count - 2)
    dev_end = min(max(int(0.9 * count), train_end + 1), count - 1)
    return train_end, dev_end


@dataclass(frozen=True)
class Corpus:
    """A corpus, split. `parts[split]` is a list of items (line) or one run of text (text).

    The splits are SPLITS in their order, or WHOLE alone.

    digest is a sha256 over format and splits: two corpora with one digest ask for the same predictions.
    """

    format: str
    vocabulary: Vocabulary
    parts: dict[str, list[str]]
    digest: str
    duplicates_removed: int = 0

    def examples(self, split: str, block_size: int) -> Examples:
        """Every prediction of `split`, from the last `block_size` tokens each, on the CPU."""
        if self.format == "line":
            return line_examples(self.parts[split], self.vocabulary, block_size)
        return text_examples(*self._stream(split, block_size), block_size, self.vocabulary.pad_token)

    def sequences(self, split: str, block_size: int) -> Sequences:
        """The predictions of `split` at every position, to train on: each item, or each run of `block_size`."""
        if self.format == "line":
            return line_sequences(self.parts[split], self.vocabulary, block_size)
        return text_sequences(*self._stream(split, block_size), block_size, self.vocabulary.pad_token)

    def windows(self, split: str, block_size: int) -> Sequences:
        """The predictions of running text at every position of windows side by side, on the CPU."""
        return text_windows(*self._stream(split, block_size), block_size, self.vocabulary.pad_token)

    def examples_in_windows(self, split: str, block_size: int) -> Examples:
        """The predictions of `windows`, one a row: contexts that do not reach beyond their window."""
        return in_windows(self.examples(split, block_size), self.vocabulary.pad_token)

    def _stream(self, split: str, block_size: int) -> tuple[Tensor, int]:
        """The tokens of `split` with up to `block_size` before it, and where it begins in them."""
        names = list(self.parts)  # in the order of the text
        index = names.index(split)
        start = sum(len(self.parts[name][0]) for name in names[:index])
        before = max(0, start - block_size)
        text = "".join(self.parts[name][0] for name in names[: index + 1])
        return self.vocabulary.encode(text[before:]), start - before

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


def whole_corpus(text: str, vocabulary: Vocabulary, name: str = "the input") -> Corpus:
    """All of `text` as one split, WHOLE, for a model of `vocabulary`, in its format.

    Raises:
        UserError: an empty text.
    """
    if vocabulary.separator:
        parts = {WHOLE: [item for line in text.split("\n") if (item := line.strip())]}
    else:
        parts = {WHOLE: [text] if text else []}
    if not parts[WHOLE]:
        raise UserError(f"{name} is empty")
    format = "line" if vocabulary.separator else "text"
    return Corpus(format, vocabulary, parts, _digest(format, parts))


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
    for split, part in parts.items():
        body = "\n".join(part).encode()
        digest.update(f"\n{split} {len(part)} {len(body)}\n".encode())
        digest.update(body)
    return digest.hexdigest()


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def read_corpus(path: Path | None, *, format: str | None = None, seed: int = 42, dedup: bool = False) -> Corpus:
    """`build_corpus` of the file at `path`; None reads the names that ship with charlm."""
    return build_corpus(read_text(path), format=format, seed=seed, dedup=dedup, name=data_name(path))
