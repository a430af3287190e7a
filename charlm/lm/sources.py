"""Reads text from files: plain, .gz, .zst, and the documents of tables, in pieces that fit into memory.

A text file is one document. A line of a .jsonl file is a document, the string at the key `column` of its object; so is
a row of a .parquet file, by the name of a column (needs pyarrow), and a row of a .csv or .tsv file (RFC 4180, with tabs
for .tsv), by a name in its first row; or by the number of the column, from 1, where the first row is data too. A number
is a name only where all of the first row are numbers.
Compressed .jsonl, .csv and .tsv files are read too.

    text_of      the text of several files, for `charlm prepare`
    Documents    an iterator over documents, which divides them among ranks and workers, and can be resumed
"""

from __future__ import annotations

import csv
import glob
import gzip
import json
import zlib
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, cast

from charlm._errors import UserError
from charlm._extras import require_packages
from charlm.lm.data import STDIN, data_name, decode_blocks, opened, plural, utf8_blocks

BLOCK_BYTES = 1 << 20  # read at a time
ZSTANDARD_BYTES = 1 << 12  # read at a time: zeros take a 32,000th of their size
PARQUET_ROWS = 1024  # read at a time
DEFAULT_COLUMN = "text"
COMPRESSIONS = (".gz", ".zst")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
DOCUMENTS = (".jsonl", ".parquet", *DELIMITERS)  # files of many documents
MOST_IN_FIELD = 1 << 27  # characters of a field of a .csv file; Python's own limit is 131,072
SHOWN = 200  # characters of the names of columns in an error


def find_inputs(patterns: Iterable[str]) -> list[Path]:
    """The files that `patterns` name, in order; a pattern is a path, a glob, or "-" for standard input.

    Raises:
        UserError: A file does not exist, a glob finds none, or "-" is not alone.
    """
    found: list[Path] = []
    for pattern in patterns:
        path = Path(pattern)
        if path == STDIN or path.exists():
            found.append(path)
            continue
        matches = sorted(Path(match) for match in glob.glob(pattern, recursive=True) if Path(match).is_file())
        if not matches:
            has_glob = any(character in pattern for character in "*?[")
            raise UserError(f"no file matches {pattern}" if has_glob else f"cannot read {pattern}: No such file")
        found += matches
    if STDIN in found and len(found) > 1:
        raise UserError("- reads standard input, and cannot be combined with other files")
    return found


def text_of(paths: Sequence[Path], column: str = DEFAULT_COLUMN, separator: str = "\n") -> Iterator[bytes]:
    """The text of all documents as UTF-8, in pieces of whole characters, with newlines as "\\n".

    Between two documents is `separator`, unless the first ends with it. It raises UserError as `pieces` does.
    """
    try:
        between = separator.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the document separator is not text: {error}") from error
    ends_with = True
    for path in paths:
        for piece, begins in pieces(path, column):
            if begins and not ends_with:
                yield between
            if piece:
                ends_with = piece.endswith(between)
                yield piece


def pieces(path: Path, column: str = DEFAULT_COLUMN) -> Iterator[tuple[bytes, bool]]:
    """The documents of one file in pieces of UTF-8, each with whether it is the first of its document.

    Raises:
        UserError: The file cannot be read, is not UTF-8 or not of the format that its name says, or has no such column;
            the message names the line of a .jsonl, .csv or .tsv file.
    """
    name, kind = data_name(path), _kind(path)
    with _blocks(path) as blocks:
        if kind not in DOCUMENTS:
            for number, part in enumerate(utf8_blocks(blocks, name)):
                yield part, number == 0
            return
        if kind == ".parquet":
            rows = _parquet_rows(path, column)
        elif kind == ".jsonl":
            rows = _json_rows(decode_blocks(blocks, name), name, column)
        else:
            rows = _csv_rows(decode_blocks(blocks, name), name, column, DELIMITERS[kind])
        for row in rows:
            yield row.encode(), True


def reads_as(path: Path) -> list[str]:
    """What the name of a file says of its content: the kind of its documents and its compression, "" for neither."""
    kind = _kind(path)
    return [kind if kind in DOCUMENTS else "", path.suffix if path.suffix in COMPRESSIONS else ""]


def check_column(given: Container[str], path: str | Path | None, name: str | None = None) -> None:
    """Raises UserError if a column is among the options `given`, and the data at `path` have none.

    `name` is what the error calls data that are not in a file.
    """
    path = None if path is None else Path(path)
    if "column" in given and (path is None or _kind(path) not in DOCUMENTS):
        raise UserError(
            f"--column chooses a column of a {', '.join(DOCUMENTS[:-1])} or {DOCUMENTS[-1]} file, and "
            f"{name or data_name(path)} is none: leave the option out"
        )


def _kind(path: Path) -> str:
    """The suffix of the name of `path`, without that of a compression."""
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


@contextmanager
def _blocks(path: Path) -> Iterator[Iterator[bytes]]:
    """The bytes of a file, decompressed, BLOCK_BYTES at a time."""
    damage: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile)
    with opened(path) as file:
        if path.suffix == ".zst":
            require_packages(str(path), "data", ["zstandard"])
            import zstandard

            damage = (*damage, zstandard.ZstdError)
            blocks = _zstandard_blocks(file)
        else:
            reader = cast("BinaryIO", gzip.GzipFile(fileobj=file)) if path.suffix == ".gz" else file
            blocks = iter(lambda: reader.read(BLOCK_BYTES), b"")
        try:
            yield blocks
        except damage as error:
            raise UserError(f"{path} is damaged or not a {path.suffix} file: {error}") from error


def _zstandard_blocks(file: BinaryIO) -> Iterator[bytes]:
    """The content of all frames; EOFError if the last one is cut, which zstandard's own reader does not notice."""
    import zstandard

    frame, done, size = None, [], 0
    while data := file.read(ZSTANDARD_BYTES):
        while data:
            frame = frame or zstandard.ZstdDecompressor().decompressobj()
            done.append(frame.decompress(data))
            size += len(done[-1])
            data, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
        if size >= BLOCK_BYTES:
            yield b"".join(done)
            done, size = [], 0
    if frame is not None:
        raise EOFError("it ends within a frame")
    yield b"".join(done)


def _json_rows(text: Iterator[str], name: str, column: str) -> Iterator[str]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        where = f"line {number} of {name}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where} is not JSON: {error}") from error
        if not isinstance(row, dict) or column not in row:
            keys = ", ".join(map(str, row)) if isinstance(row, dict) else type(row).__name__
            raise UserError(f"{where} has no column {column!r} (it has: {keys}): choose one with --column")
        if not isinstance(row[column], str):
            raise UserError(f"column {column!r} in {where} is {type(row[column]).__name__}, not text")
        yield _plain(row[column], where)


def _csv_rows(text: Iterator[str], name: str, column: str, delimiter: str) -> Iterator[str]:
    csv.field_size_limit(max(csv.field_size_limit(), MOST_IN_FIELD))  # it is one number for the whole process
    rows = csv.reader((f"{line}\n" for line in _lines(text)), delimiter=delimiter, strict=True)
    index, width = -1, 0
    try:
        for row in filter(None, rows):
            if index < 0:
                width, numbers = len(row), [str(number + 1) for number in range(len(row))]
                if column not in row + numbers:
                    names = ", ".join(row)
                    shown = names if len(names) <= SHOWN else f"{names[:SHOWN]}…"
                    raise UserError(f"{name} has no column {column!r} (it has: {shown}): choose one with --column")
                # In a table without names, the first row may have the number as a value, such as that of a class.
                is_name = column in row and (column not in numbers or all(map(str.isdecimal, row)))
                index = (row if is_name else numbers).index(column)
                if is_name:
                    continue
            if len(row) != width:
                where = f"line {rows.line_num} of {name} has {plural(len(row), 'field')}, but the first row {width}"
                raise UserError(f"{where}: a field that contains a delimiter must be in double quotes")
            if row[index]:  # as a null of a .parquet file
                yield _plain(row[index], f"line {rows.line_num} of {name}")
    except csv.Error as error:
        raise UserError(f"line {rows.line_num} of {name} is not a row of a table: {error}") from error


def _plain(text: str, where: str) -> str:
    """`text` with newlines as "\\n"; UserError for half a character, as of a JSON string that was cut."""
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"{where} is not text: {error}") from error
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _lines(pieces: Iterator[str]) -> Iterator[str]:
    rest: list[str] = []
    for piece in pieces:
        first, *others = piece.split("\n")
        rest.append(first)
        for line in others:
            yield "".join(rest)
            rest = [line]
    yield "".join(rest)


def _parquet_rows(path: Path, column: str) -> Iterator[str]:
    require_packages(str(path), "data", ["pyarrow"])
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise UserError(f"{path} has no column {column!r} (it has: {', '.join(names)}): choose with --column")
            for batch in file.iter_batches(PARQUET_ROWS, columns=[column]):
                for value in batch.column(0).to_pylist():
                    if value is not None and not isinstance(value, str):
                        raise UserError(f"column {column!r} of {path} is {type(value).__name__}, not text")
                    if value is not None:
                        yield _plain(value, f"column {column!r} of {path}")
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is damaged or not a .parquet file: {error}") from error


class Documents:
    """An iterator over the documents of files; each belongs to one rank and worker.

    Args:
        paths: The files, as `find_inputs` returns them.
        column: The column of files of DOCUMENTS.
        part: The number of this reader, as rank × workers + worker.
        parts: The number of all readers. Reader `part` takes every `parts`-th document of each file.
        state: A `state` of an earlier reader of the same part, to go on behind its last document.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        column: str = DEFAULT_COLUMN,
        *,
        part: int = 0,
        parts: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        if not 0 <= part < parts:
            raise UserError(f"part is {part}, but must be at least 0 and below {parts}, the number of parts")
        self.paths = list(paths)
        self.column = column
        self.part = part
        self.parts = parts
        self._file, self._document = (state["file"], state["document"]) if state else (0, 0)

    @property
    def state(self) -> dict[str, int]:
        """The file and the number in it of the next document, for JSON."""
        return {"file": self._file, "document": self._document}

    def __iter__(self) -> Iterator[str]:
        for file in range(self._file, len(self.paths)):
            if file != self._file:
                self._file, self._document = file, 0
            first = self._document
            for number, text in enumerate(_whole(pieces(self.paths[file], self.column))):
                if number >= first and (number + file) % self.parts == self.part:
                    self._document = number + 1
                    yield text


def _whole(pieces: Iterator[tuple[bytes, bool]]) -> Iterator[str]:
    """The documents of which `pieces` are parts."""
    parts: list[bytes] = []
    for piece, begins in pieces:
        if begins and parts:
            yield b"".join(parts).decode()
            parts = []
        parts.append(piece)
    if parts:
        yield b"".join(parts).decode()
