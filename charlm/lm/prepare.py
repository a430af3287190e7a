"""Prepares a corpus that may be larger than memory: writes what `charlm.lm.shards` reads.

    1. scan      reads the text once: its format, vocabulary and size
    2. encode    reads it again and writes the tokens: running text in its order; items to a working file, from which
                 they are taken in the order of `random.Random(seed).shuffle`
    3. digest    reads the shards: the sha256 by which a checkpoint knows its data

Vocabulary, split, order and digest are those of `charlm.lm.data.build_corpus`. Memory does not depend on the size of
running text. Items take 4 bytes each, 8 from 2³² tokens on; their tokens are mapped, and the system may reclaim them.

All is written to a folder beside the target, which is renamed at the end. After a kill it stays, and the same call
keeps its finished shards; after an error it is removed.
"""

from __future__ import annotations

import glob
import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from charlm import _ext
from charlm._errors import UserError
from charlm.lm import shards
from charlm.lm.data import FORMATS, ITEM_CHARACTERS, SPLITS, is_of_items, plural, split_bounds
from charlm.lm.files import LOCK, locked, naming, write_atomically
from charlm.lm.memory import format_bytes
from charlm.lm.pipeline import Buffers, in_order
from charlm.lm.prepare_items import count_dev_items_in_train, index_dtype, spaces, write_items
from charlm.lm.shard_writer import Report, Scan, ShardWriter, Text, Work, changed
from charlm.lm.sources import text_of
from charlm.lm.vocabulary import CODE_POINTS, Vocabulary

OWN_FILES = re.compile(rf"{re.escape(shards.MANIFEST)}|(tokens|ends)-\d+\.bin")  # of a prepared corpus
SPARE_BYTES = 10 << 20  # bytes beyond the shards that must be free


@dataclass(frozen=True)
class Options:
    """The options of `build_corpus` that decide what is written; see there."""

    format: str | None = None
    seed: int = 42
    dedup: bool = False


def prepare(
    text: Text,
    directory: Path,
    options: Options,
    *,
    name: str = "the input",
    sources: list[dict[str, Any]] | None = None,
    overwrite: bool = False,
    report: Report = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Prepares a corpus in the new folder `directory`, and returns its manifest.

    `text` is called twice, and returns the text in pieces of UTF-8, each of whole characters, with newlines as "\\n".
    Errors call it `name`, and the manifest keeps `sources`: a call with others does not continue this one. With
    `overwrite` an existing prepared corpus is replaced, at the end.

    Raises:
        UserError: `build_corpus` would refuse the text, the folder exists or is being written, or the disk is too full.
        OSError: The folder cannot be written.
    """
    if _ext._C is None:
        raise UserError("preparing a corpus needs charlm's compiled module: unset CHARLM_BACKEND")
    directory = _own_path(directory)
    _check_target(directory, overwrite)
    folder = directory.with_name(f".{directory.name}.partial")
    with locked(folder, "is preparing this corpus in"):
        _check_target(directory, overwrite)  # another process may have finished it before the folder was locked
        work = Work(folder, {"sources": sources, **asdict(options), "shard_bytes": shards.SHARD_BYTES})
        try:
            with closing(work):
                work.load()
                manifest = _prepare(work, text, options, name, report)
            manifest |= {"sources": sources}
            manifest["checksum"] = shards.checksum(manifest)
            write_atomically(folder / shards.MANIFEST, json.dumps(manifest, indent=1).encode())
            arrays = filter(None, (manifest["tokens"], manifest["ends"]))  # running text has no ends
            _publish(folder, directory, {shard["file"] for array in arrays for shard in array["shards"]})
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    return manifest


def encoded(documents: Iterable[str], separator: str) -> Iterator[bytes]:
    """The documents as UTF-8, with `separator` before each whose predecessor does not end with it.

    Raises:
        TypeError: A document is not a str.
        UserError: A document has half a character.
    """
    end = separator
    for number, document in enumerate(documents):
        if not isinstance(document, str):
            hint = ": give one column, such as data['text']" if isinstance(document, Mapping) else ""
            raise TypeError(f"document {number} is of type {type(document).__name__}, but must be str{hint}")
        try:
            yield ("" if end.endswith(separator) else separator).encode() + document.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"document {number} is not text: {error}") from error
        end = document[-len(separator) :] if document else end


@contextmanager
def spooled(blocks: Iterable[bytes], target: Path) -> Iterator[tuple[Path, int, str]]:
    """The path of a copy of `blocks` in a file without a name beside `target`, its size in bytes and its sha256.

    An OSError of the copy names `target`.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=target.parent) as spool:
        content = hashlib.sha256()
        for block in blocks:
            content.update(block)
            with naming(target):
                spool.write(block)
        with naming(target):
            spool.flush()
        yield Path(f"/proc/self/fd/{spool.fileno()}"), spool.tell(), content.hexdigest()


def prepare_documents(
    documents: Iterable[str], directory: Path, options: Options, *, separator: str = "\n", overwrite: bool = False
) -> dict[str, Any]:
    """`prepare` for documents that can be read only once: they are copied to a file without a name first."""
    directory = _own_path(directory)
    _check_target(directory, overwrite)
    with spooled(encoded(documents, separator), directory) as (path, _, sha256):
        sources = [{"documents": sha256}]
        return prepare(
            lambda: text_of([path]), directory, options, name="the data", sources=sources, overwrite=overwrite
        )


def identify(path: Path) -> dict[str, Any]:
    """What tells a file from another, or from an earlier state of it, for a manifest."""
    found = path.stat()
    return {
        "path": str(path.resolve()),
        "bytes": found.st_size,
        "modified": found.st_mtime_ns,
        "changed": found.st_ctime_ns,  # also where a copy kept the time of the original
        "inode": found.st_ino,
    }


def unchanged(
    paths: Sequence[Path], found: dict[Path, dict[str, Any]], column: str, separator: str = "\n"
) -> Iterator[bytes]:
    """`text_of` the files; UserError at its end unless those in `found` are still as `identify` found them."""
    yield from text_of(paths, column, separator)
    for path, before in found.items():
        if identify(path) != before:
            raise changed(str(path))


def _own_path(directory: Path) -> Path:
    """`directory` with a name of its own, which can be renamed: not a link, and not "."."""
    return directory.resolve() if directory.is_symlink() or not directory.name else directory


def _check_target(directory: Path, overwrite: bool) -> None:
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not directory.is_dir() or not (directory / shards.MANIFEST).exists():
        raise UserError(f"{directory} exists and is no prepared corpus: choose a new or empty folder with -o")
    if not overwrite:
        raise UserError(f"{directory} already contains a prepared corpus: add --overwrite to replace it")
    others = sorted(path.name for path in directory.iterdir() if not OWN_FILES.fullmatch(path.name))
    if others:
        raise UserError(f"{directory} contains more than a prepared corpus, such as {others[0]}: choose another folder")


def _publish(folder: Path, directory: Path, files: set[str]) -> None:
    """Removes what is not in the manifest from the working folder, and renames it to `directory`."""
    for path in folder.iterdir():
        if path.name not in {*files, shards.MANIFEST, LOCK}:
            path.unlink()
    if (directory / shards.MANIFEST).exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
        directory.rename(old / directory.name)
    folder.rename(directory)
    (directory / LOCK).unlink()  # not before: another process may not begin until the folder has its name
    for old in directory.parent.glob(f".{glob.escape(directory.name)}.old-*"):  # also of a call that was killed here
        shutil.rmtree(old, ignore_errors=True)


def _prepare(work: Work, text: Text, options: Options, name: str, report: Report) -> dict[str, Any]:
    if work.scan is None:
        work.scan = scan(text, options, name, report)
        work.save()
    found = work.scan
    vocabulary = Vocabulary(found.chars, separator=found.format == "line")
    dtype = "uint8" if len(vocabulary) <= 256 else "uint16" if len(vocabulary) <= 65536 else "uint32"
    _check_disk(work, found, np.dtype(dtype).itemsize)
    sizes: dict[str, int] = {}  # of the splits, in bytes, where they are known
    if found.format == "line":
        written = write_items(work, text, options, name, vocabulary, dtype, report)
    else:
        written, sizes = _write_text(work, text, name, vocabulary, dtype, report)
    digest = _digest(work, found.format, written, sizes, vocabulary, report)
    overlap = count_dev_items_in_train(work, written) if written["ends"] else None
    return {
        "format_version": shards.FORMAT_VERSION,
        "format": found.format,
        "vocabulary": {"chars": vocabulary.chars, "separator": vocabulary.separator},
        **written,
        "digest": digest,
        "dev_items_in_train": overlap,
        "split_seed": options.seed,
        "dedup": options.dedup,
    }


# ---- the first pass


def scan(text: Text, options: Options, name: str, report: Report) -> Scan:
    """Reads the text once; raises UserError where `build_corpus` would."""
    if options.format not in (None, *FORMATS):
        raise UserError(f"unknown format {options.format!r}: it must be one of {', '.join(FORMATS)}")
    seen, spaces_in_items = (np.zeros(CODE_POINTS, np.uint8) for _ in range(2))
    is_space = spaces()
    lines = _ext._C.Lines(is_space, ITEM_CHARACTERS)
    characters = 0

    def read() -> Iterator[bytes]:
        nonlocal characters
        for piece in text():
            characters += _ext._C.mark_characters(piece, seen)
            report("reading", characters, 0)
            yield piece
        yield b"\n"

    def mark(piece: bytes) -> None:
        if options.format != "text":
            lines.mark(piece, spaces_in_items)

    for _ in in_order(mark, read(), threads=1):
        pass
    chars = _characters(seen)
    if not chars or chars.isspace():
        raise UserError(f"{name} is empty")
    format = options.format or (
        "line" if is_of_items(lines.lines, lines.items, lines.short_items, lines.words) else "text"
    )
    if format == "line":
        seen[: len(is_space)] &= 1 - is_space
        return Scan("line", _characters(seen | spaces_in_items), lines.characters, lines.items)
    if options.dedup:
        raise UserError(f"{name} is running text, which has no items to deduplicate; --format line reads it as items")
    if characters < len(SPLITS):
        raise UserError(f"{name} has {plural(characters, 'character')}, but train, dev and test need one each")
    return Scan("text", chars, characters, 0)


def _characters(seen: np.ndarray) -> str:
    return "".join(map(chr, np.flatnonzero(seen).tolist()))


def _check_disk(work: Work, found: Scan, itemsize: int) -> None:
    """Raises UserError unless the shards, and the working files of items, fit onto the disk."""
    needed = found.characters * itemsize
    if found.format == "line":
        needed = 2 * (needed + found.items * itemsize) + found.items * index_dtype(found).itemsize
    needed -= sum(entry["bytes"] for entry in work.finished.values())
    free = shutil.disk_usage(work.directory).free
    if needed + SPARE_BYTES > free:
        raise UserError(
            f"preparing needs about {format_bytes(needed)} in {work.directory.parent}, but only {format_bytes(free)} "
            "are free: free some, or choose a folder on another disk"
        )


# ---- running text


def _write_text(
    work: Work, text: Text, name: str, vocabulary: Vocabulary, dtype: str, report: Report
) -> tuple[dict[str, Any], dict[str, int]]:
    """Writes the shards of running text; returns their part of the manifest, and the bytes of each split."""
    assert work.scan is not None
    writer, total, done = ShardWriter(work, "tokens", dtype), work.scan.characters, 0
    table, buffers = vocabulary.table, Buffers(dtype)
    bounds = [0, *split_bounds(total), total]
    sizes = dict.fromkeys(SPLITS, 0)

    def encode(piece: bytes) -> tuple[bytes, np.ndarray, int]:
        buffer = buffers.take(len(piece))
        return piece, buffer, _ext._C.encode_characters(piece, table, buffer)

    try:
        for piece, buffer, count in in_order(encode, text()):
            if count < 0:
                raise changed(name)
            for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False):
                sizes[split] += _bytes_of(piece, count, start - done, stop - done)
            writer.write(buffer[:count], partial(buffers.give_back, buffer))
            done += count
            report("encoding", done, total)
        if done != total:
            raise changed(name)
        written = writer.close()
    finally:
        writer.discard()
    splits = {
        split: {"start": start, "stop": stop, "first_item": 0, "last_item": 0, "longest_item": stop - start}
        for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False)
    }
    return {"tokens": written, "ends": None, "splits": splits, "duplicates_removed": 0}, sizes


def _bytes_of(piece: bytes, count: int, start: int, stop: int) -> int:
    """The bytes of piece[start:stop] in characters, of which it has `count`; the part may lie outside of it."""
    start, stop = max(start, 0), min(stop, count)
    if start == 0 and stop == count:
        return len(piece)
    return len(piece.decode()[start:stop].encode()) if start < stop else 0


# ---- the digest


def _digest(
    work: Work, format: str, written: dict[str, Any], sizes: dict[str, int], vocabulary: Vocabulary, report: Report
) -> str:
    """The digest of `charlm.lm.data`: of each split its size in items or strings, its size in bytes, and its text.

    Where `sizes` lacks that in bytes, it is found in a pass over the tokens.
    """
    encoded = [character.encode() for character in ("\n" if vocabulary.separator else "") + vocabulary.chars]
    widths = np.array([len(character) for character in encoded], np.uint8)
    characters = np.array([int.from_bytes(character, "little") for character in encoded], np.uint32)

    def decode(block: np.ndarray) -> tuple[np.ndarray, int]:
        text = np.empty(4 * len(block), np.uint8)
        return text[: _ext._C.decode_tokens(block, characters, widths, text)], len(block)

    digest = hashlib.sha256(format.encode())
    for split, part in written["splits"].items():
        count, done, stop = 1, part["start"], part["stop"]
        if vocabulary.separator:
            count, stop = part["last_item"] - part["first_item"], stop - 1  # without the end of the last item
        read = partial(work.read, written["tokens"], done, stop)
        size = sizes.get(split, stop - done)
        if split not in sizes and widths.max() > 1:
            size = sum(in_order(lambda block: _ext._C.utf8_size(block, widths), read()))
        digest.update(f"\n{split} {count} {size}\n".encode())
        for text, tokens in in_order(decode, read()):
            digest.update(text)
            done += tokens
            report("digesting", done, stop)
    return digest.hexdigest()
