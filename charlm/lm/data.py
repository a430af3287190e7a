"""Reads a text file, builds its vocabulary and splits it.

There are two formats:

    line   One item per line, such as a name, word or place. Items are stripped and empty lines are dropped. Each item
           is modelled on its own: the separator, token 0, precedes it and must be predicted after it. The separator is
           not a character of the data. It is printed as ".", and a full stop in the data has a token of its own.
    text   Running text. Every character is a token, including the newline, and there is no separator. The split is
           contiguous: the first 80 % of the characters are train, the next 10 % dev, the last 10 % test. Every
           character of a split is predicted from the characters before it, including those of the preceding split. The
           context of the first characters is filled with newlines.

Files are UTF-8, with or without a byte order mark; "\\r\\n" and "\\r" are read as "\\n".
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import random
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from charlm import _ext
from charlm._errors import UserError
from charlm.lm.corpus import Corpus
from charlm.lm.examples import item_stream
from charlm.lm.stream import Stream
from charlm.lm.vocabulary import Vocabulary

SPLITS = ("train", "dev", "test")
WHOLE = "all"  # the only split of a text that is not divided
FORMATS = ("line", "text")
STDIN = Path("-")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"

# `guess_format` takes a file for items if nearly all lines are short and of few words, and hardly any are empty.
ITEM_CHARACTERS = 64
ITEM_WORDS = 4.0
EMPTY_LINES = 0.02

WIDE_ENCODING_MARKS = {  # byte order marks; UTF-32 comes first because its marks begin with those of UTF-16
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
INSPECTED_BYTES = 4096  # of the beginning of a file, to recognize its encoding
MIN_NUL_SHARE = 0.7  # share of NULs at every second byte that identifies UTF-16 without a byte order mark


# ---- reading


def read_text(path: Path | None, column: str = "text") -> str:
    """Reads a file, with newlines as "\\n"; None reads the names shipped with charlm, "-" standard input.

    The name of the file says what it is: UTF-8 text, or compressed, or documents with a `column`, see `sources`.

    Raises:
        UserError: The file cannot be read, or is not UTF-8. The message names the byte offset, the encoding that the
            file seems to have, and the command that converts it.
    """
    if path is None:
        return decode_text(resources.files("charlm.data").joinpath("names.txt").read_bytes(), data_name(path))
    from charlm.lm.sources import reads_as, text_of

    if any(reads_as(path)):
        return b"".join(text_of([path], column)).decode()
    with opened(path) as file:
        return decode_text(file.read(), data_name(path))


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` for reading bytes, "-" being standard input; an OSError inside becomes a UserError."""
    try:
        if path == STDIN:
            if sys.stdin is None:  # closed when the process started
                raise UserError("standard input is closed: give a file")
            yield sys.stdin.buffer
        else:
            with path.open("rb") as file:
                yield file
    except OSError as error:
        raise UserError(f"cannot read {data_name(path)}: {error.strerror}") from error


def data_name(path: Path | None) -> str:
    """What messages call the data at `path`."""
    if path is None:
        return "names.txt"
    return "standard input" if path == STDIN else str(path)


def decode_text(raw: bytes, name: str) -> str:
    """Decodes UTF-8, drops a byte order mark and converts newlines to "\\n"; raises UserError as `read_text` does."""
    offset = len(BYTE_ORDER_MARK) if raw.startswith(BYTE_ORDER_MARK) else 0
    try:
        text = raw[offset:].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _not_utf8(name, raw, offset + error.start, offset + error.start, error.reason) from error
    encoding = wide_encoding(raw)
    if encoding is not None:
        raise UserError(
            f"{name} looks like {encoding}, not UTF-8: every second byte is NUL; {_conversion(encoding, name)}"
        )
    return text.replace("\r\n", "\n").replace("\r", "\n")


def decode_blocks(blocks: Iterable[bytes], name: str) -> Iterator[str]:
    """`decode_text` for a stream of blocks, split at any byte, in constant memory."""
    return map(bytes.decode, utf8_blocks(blocks, name))


def utf8_blocks(blocks: Iterable[bytes], name: str) -> Iterator[bytes]:
    """As `decode_blocks`, but the text stays UTF-8: pieces of whole, valid characters."""
    rest, read = b"", 0  # the bytes that belong to the next piece, and the number of those read
    for block in itertools.chain(blocks, [b""]):
        if read == 0 and wide_encoding(block) is not None:
            decode_text(block, name)  # raises the error that names the encoding
        data, is_last = rest + block, not block
        valid = _valid_utf8(data)
        try:
            codecs.utf_8_decode(data[valid:], "strict", is_last)  # nothing, or the beginning of a character
        except UnicodeDecodeError as error:
            raise _not_utf8(name, data, valid, read - len(rest) + valid, error.reason) from error
        if data.endswith(b"\r", 0, valid) and not is_last:  # a newline may follow
            valid -= 1
        piece, rest = (data, b"") if valid == len(data) else (data[:valid], data[valid:])
        if read == 0:
            piece = piece.removeprefix(BYTE_ORDER_MARK)
        read += len(block)
        yield piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n") if b"\r" in piece else piece


def _valid_utf8(data: bytes) -> int:
    """The number of bytes before the first that is no part of a whole, valid character."""
    if _ext._C is not None:
        return _ext._C.valid_utf8(data)
    try:
        return codecs.utf_8_decode(data, "strict", False)[1]
    except UnicodeDecodeError as error:
        return error.start


def wide_encoding(raw: bytes) -> str | None:
    """Recognizes an encoding of two or four bytes per character in `raw`; None if there is none.

    UTF-16 of ASCII letters without a byte order mark is valid UTF-8, with a NUL at every second byte.
    """
    for mark, name in WIDE_ENCODING_MARKS.items():
        if raw.startswith(mark):
            return name
    head = raw[: min(len(raw), INSPECTED_BYTES) // 2 * 2]
    if len(head) < 4:
        return None
    even, odd = (head[start::2].count(0) / (len(head) // 2) for start in (0, 1))
    if odd >= MIN_NUL_SHARE and even < 1 - MIN_NUL_SHARE:
        return "UTF-16LE"
    return "UTF-16BE" if even >= MIN_NUL_SHARE and odd < 1 - MIN_NUL_SHARE else None


def _not_utf8(name: str, raw: bytes, at: int, offset: int, reason: str) -> UserError:
    """The error for data whose byte raw[at], at `offset` in the file, is not UTF-8, with a remedy if one is known."""
    encoding = wide_encoding(raw)
    if encoding is None and 0 in raw[:INSPECTED_BYTES]:
        advice = "it looks like a binary file"
    elif encoding is None and _is_truncated_character(raw[at:]):
        advice = "it seems to be cut off inside a character"
    elif encoding is None:
        advice = f"it may be ISO-8859-1 or Windows-1252: {_conversion('WINDOWS-1252', name)}"
    else:
        advice = f"it looks like {encoding}: {_conversion(encoding, name)}"
    return UserError(f"{name} is not UTF-8: byte 0x{raw[at]:02x} at offset {offset} ({reason}); {advice}")


def _is_truncated_character(end: bytes) -> bool:
    """Whether `end` is an incomplete UTF-8 character and nothing else."""
    try:
        return codecs.getincrementaldecoder("utf-8")().decode(end) == ""
    except UnicodeDecodeError:
        return False


def _conversion(encoding: str, name: str) -> str:
    """The command that converts the file called `name` to UTF-8."""
    source = "" if name == "standard input" else f" {shlex.quote(name)}"
    return f"`iconv -f {encoding} -t UTF-8{source} > utf8.txt` converts it"


def guess_format(text: str) -> str:
    """ "line" if nearly all lines are short and of few words, and hardly any are empty; otherwise "text"."""
    lines = text.strip("\n").split("\n")
    items = [stripped for line in lines if (stripped := line.strip())]
    short = sum(len(item) <= ITEM_CHARACTERS for item in items)
    enough = int(ITEM_WORDS * len(items))  # a single item of more words decides, and it may have 10⁸
    words = sum(len(item.split(maxsplit=enough)) for item in items)
    return "line" if is_of_items(len(lines), len(items), short, words) else "text"


def is_of_items(lines: int, items: int, short_items: int, words: int) -> bool:
    """Whether a text is one of items, by the numbers of its lines, of those that are not empty, and of their words."""
    if not items or items < (1 - EMPTY_LINES) * lines:
        return False
    return short_items / items >= 0.95 and words / items <= ITEM_WORDS


def split_items(text: str) -> list[str]:
    """The items of a text in line format: its lines, stripped, without empty ones."""
    return [item for line in text.split("\n") if (item := line.strip())]


# ---- corpus


def split_bounds(count: int) -> tuple[int, int]:
    """The ends of train and dev: int(.8 n) and int(.9 n), adjusted so that every split has at least one item."""
    train_end = min(int(0.8 * count), count - 2)
    dev_end = min(max(int(0.9 * count), train_end + 1), count - 1)
    return train_end, dev_end


@dataclass(frozen=True)
class TextCorpus(Corpus):
    """A corpus in memory.

    Attributes:
        parts: The splits by name, SPLITS in their order or WHOLE alone. A split is a list of items in line format, and
            a list of one string in running text.
    """

    parts: dict[str, list[str]]

    @property
    def sizes(self) -> dict[str, int]:
        return {name: len(part if self.format == "line" else part[0]) for name, part in self.parts.items()}

    def stream(self, split: str, block_size: int) -> Stream:
        if self.format == "line":
            return item_stream(self.parts[split], self.vocabulary)
        names = list(self.parts)  # in the order of the text
        index = names.index(split)
        start = sum(len(self.parts[name][0]) for name in names[:index])
        before = max(0, start - block_size)
        text = "".join(self.parts[name][0] for name in names[: index + 1])
        return Stream(self.vocabulary.encode(text[before:]), self.vocabulary.pad_token, start - before)

    def tokens(self, split: str) -> int:
        return sum(map(len, self.parts[split])) + (self.sizes[split] if self.format == "line" else 0)

    def longest_item(self, split: str) -> int:
        return max(map(len, self.parts[split]))

    def known(self, split: str) -> Tensor:
        end = "\n" if self.format == "line" else ""
        known = self.vocabulary.known("".join(f"{part}{end}" for part in self.parts[split]))
        if end:  # the end of an item is predicted too, and is always known
            lengths = torch.tensor([len(item) + 1 for item in self.parts[split]])
            known[lengths.cumsum(0) - 1] = True
        return known

    def overlap(self) -> int | None:
        if self.format != "line":
            return None
        train = set(self.parts["train"])
        return sum(item in train for item in self.parts["dev"])

    def splits_containing(self, items: list[str]) -> list[list[str]]:
        known = {split: set(part) for split, part in self.parts.items()}
        return [[split for split in self.parts if item in known[split]] for item in items]


def build_corpus(
    text: str, *, format: str | None = None, seed: int = 42, dedup: bool = False, name: str = "the input"
) -> TextCorpus:
    """Splits `text` 80/10/10.

    Args:
        text: The data, with newlines as "\\n".
        format: "line" or "text"; None guesses.
        seed: Items are shuffled once by `random.Random(seed)`; 42 gives makemore's split of makemore's file. Running
            text is not shuffled.
        dedup: Keep only the first of equal items, before the shuffle.
        name: What error messages call the data.

    Raises:
        UserError: The text is empty, has fewer than three items or characters, is running text and `dedup` is set, or
            the format is unknown.
    """
    if not text or text.isspace():
        raise UserError(f"{name} is empty")
    format = format or guess_format(text)
    if format not in FORMATS:
        raise UserError(f"unknown format {format!r}: it must be one of {', '.join(FORMATS)}")
    is_line = format == "line"
    if dedup and not is_line:
        raise UserError(f"{name} is running text, which has no items to deduplicate; --format line reads it as items")
    items = split_items(text) if is_line else text  # of running text, the characters
    found = len(items)
    if dedup:
        items = list(dict.fromkeys(items))
    if len(items) < len(SPLITS):
        noun = "item" if is_line else "character"
        raise UserError(f"{name} has {plural(len(items), noun)}, but train, dev and test need one each")
    if is_line:
        text = "".join(items)
        random.Random(seed).shuffle(items)
    train_end, dev_end = split_bounds(len(items))
    pieces = (items[:train_end], items[train_end:dev_end], items[dev_end:])
    parts = {split: piece if is_line else [piece] for split, piece in zip(SPLITS, pieces, strict=True)}
    vocabulary = Vocabulary.of(text, separator=is_line)
    return TextCorpus(format, vocabulary, _digest(format, parts), found - len(items), parts)


def whole_corpus(text: str, vocabulary: Vocabulary, name: str = "the input") -> TextCorpus:
    """All of `text` as a single split, WHOLE, in the format of `vocabulary`.

    Raises:
        UserError: The text is empty.
    """
    format = "line" if vocabulary.separator else "text"
    parts = {WHOLE: split_items(text) if format == "line" else [text]}
    if not any(parts[WHOLE]):
        raise UserError(f"{name} is empty")
    return TextCorpus(format, vocabulary, _digest(format, parts), 0, parts)


def _digest(format: str, parts: dict[str, list[str]]) -> str:
    digest = hashlib.sha256(format.encode())
    for split, part in parts.items():
        body = "\n".join(part).encode()
        digest.update(f"\n{split} {len(part)} {len(body)}\n".encode())
        digest.update(body)
    return digest.hexdigest()


def plural(count: int, noun: str) -> str:
    """A number and its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def read_corpus(
    path: Path | None, *, format: str | None = None, seed: int = 42, dedup: bool = False, column: str = "text"
) -> TextCorpus:
    """`build_corpus` for what `read_text` reads."""
    return build_corpus(read_text(path, column), format=format, seed=seed, dedup=dedup, name=data_name(path))
