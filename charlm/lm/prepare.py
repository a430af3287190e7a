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

import functools
import glob
import hashlib
import itertools
import json
import random
import re
import shutil
import tempfile
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from charlm import _ext
from charlm._errors import UserError
from charlm.lm import shards
from charlm.lm.data import FORMATS, ITEM_CHARACTERS, SPLITS, is_of_items, plural, split_bounds
from charlm.lm.files import LOCK, locked, naming, write_atomically
from charlm.lm.memory import format_bytes
from charlm.lm.shard_writer import Scan, ShardWriter, Work
from charlm.lm.sources import text_of
from charlm.lm.vocabulary import CODE_POINTS, SEPARATOR, Vocabulary

THREADS = 2  # beside that which writes; a third could not be fed by the one that reads
TABLE_BYTES = 128 << 20  # of the table in which equal items are found
WANTED_ITEMS, WANTED_BYTES = 12 << 20, 96 << 20  # most dev items, and bytes of these, in a table at a time
TAKEN_ITEMS, TAKEN_TOKENS = 1 << 18, 1 << 22  # most items, and tokens of items, put in order at a time
READ_TOKENS = 1 << 20  # of shards, at a time
PADDING = 8  # bytes behind the tokens of items, which are copied in words of 8 bytes
OWN_FILES = re.compile(rf"{re.escape(shards.MANIFEST)}|(tokens|ends)-\d+\.bin")  # of a prepared corpus
PRINTED_SPACE = 10 << 20  # bytes beyond the shards that must be free

Text = Callable[[], Iterator[bytes]]
Report = Callable[[str, int, int], None]  # stage, characters done, characters in total (0 in the first stage: unknown)


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
    """Prepares a corpus.

    Args:
        text: Returns the text in pieces of UTF-8, each of whole characters, with newlines as "\\n"; it is called twice.
        directory: The folder to create.
        options: The split and the format.
        name: What error messages call the text.
        sources: What the manifest says of the text. A call with other sources does not continue this one.
        overwrite: Whether an existing prepared corpus is replaced, at the end.
        report: Called with the progress.

    Returns:
        The manifest.

    Raises:
        UserError: `build_corpus` would refuse the text, the folder exists or is being written, or the disk is too full.
        OSError: The folder cannot be written.
    """
    if _ext._C is None:
        raise UserError("preparing a corpus needs charlm's compiled module: unset CHARLM_BACKEND")
    directory = _own_path(directory)
    _check_target(directory, overwrite)
    partial = directory.with_name(f".{directory.name}.partial")
    with locked(partial, "is preparing this corpus in"):
        _check_target(directory, overwrite)  # another process may have finished it before the folder was locked
        work = Work(partial, {"sources": sources, **asdict(options), "shard_bytes": shards.SHARD_BYTES})
        try:
            work.load()
            manifest = _prepare(work, text, options, name, report)
            manifest |= {"sources": sources}
            manifest["checksum"] = shards.checksum(manifest)
            write_atomically(partial / shards.MANIFEST, json.dumps(manifest, indent=1).encode())
            _publish(partial, directory, {entry["file"] for entry in _entries(manifest)})
        except Exception:
            work.close()
            shutil.rmtree(partial, ignore_errors=True)
            raise
        finally:
            work.close()
    return manifest


def prepare_documents(
    documents: Iterable[str], directory: Path, options: Options, *, separator: str = "\n", overwrite: bool = False
) -> dict[str, Any]:
    """`prepare` for documents that can be read only once: they are copied to a file without a name first."""
    directory = _own_path(directory)
    _check_target(directory, overwrite)
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory.parent) as spool:
        end, content = separator, hashlib.sha256()
        for number, document in enumerate(documents):
            if not isinstance(document, str):
                raise TypeError(f"expected documents of type str, but got {type(document).__name__}")
            try:
                written = ("" if end.endswith(separator) else separator).encode() + document.encode()
            except UnicodeEncodeError as error:
                raise UserError(f"document {number} is not text: {error}") from error
            content.update(written)
            with naming(directory):
                spool.write(written)
            end = document[-len(separator) :] if document else end
        with naming(directory):
            spool.flush()
        path = Path(f"/proc/self/fd/{spool.fileno()}")
        return prepare(
            lambda: text_of([path]),
            directory,
            options,
            name="the documents",
            sources=[{"documents": content.hexdigest()}],
            overwrite=overwrite,
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


def unchanged(text: Iterator[bytes], paths: list[Path], found: list[dict[str, Any]]) -> Iterator[bytes]:
    """`text` of the files `paths`; UserError at its end unless these are still as `identify` found them."""
    yield from text
    for path, before in zip(paths, found, strict=True):
        if identify(path) != before:
            raise UserError(f"{path} changed while it was read: prepare it again")


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


def _publish(partial: Path, directory: Path, files: set[str]) -> None:
    """Removes what is not in the manifest from the working folder, and renames it to `directory`."""
    for path in partial.iterdir():
        if path.name not in {*files, shards.MANIFEST, LOCK}:
            path.unlink()
    if (directory / shards.MANIFEST).exists():
        old = Path(tempfile.mkdtemp(prefix=f".{directory.name}.old-", dir=directory.parent))
        directory.rename(old / directory.name)
    partial.rename(directory)
    (directory / LOCK).unlink()  # not before: another process may not begin until the folder has its name
    for old in directory.parent.glob(f".{glob.escape(directory.name)}.old-*"):  # also of a call that was killed here
        shutil.rmtree(old, ignore_errors=True)


def _entries(manifest: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for array in ("tokens", "ends"):
        yield from (manifest[array] or {"shards": []})["shards"]


def _prepare(work: Work, text: Text, options: Options, name: str, report: Report) -> dict[str, Any]:
    if work.scan is None:
        work.scan = scan(text, options, name, report)
        work.save()
    found = work.scan
    vocabulary = Vocabulary(found.chars, separator=found.format == "line")
    dtype = "uint8" if len(vocabulary) <= 256 else "uint16" if len(vocabulary) <= 65536 else "uint32"
    _check_disk(work, found, np.dtype(dtype).itemsize)
    write = _write_items if found.format == "line" else _write_text
    written, bytes_of = write(work, text, options, name, vocabulary, dtype, report)
    digest = hashlib.sha256(found.format.encode())
    for split, part in written["splits"].items():
        read = functools.partial(_read, work, written["tokens"])
        _digest(digest, split, part, read, bytes_of.get(split), vocabulary, report)
    overlap = _overlap(work, written) if written["ends"] else None
    return {
        "format_version": shards.FORMAT_VERSION,
        "format": found.format,
        "vocabulary": {"chars": vocabulary.chars, "separator": vocabulary.separator},
        **written,
        "digest": digest.hexdigest(),
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
    is_space = _is_space()
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

    for _ in _in_order(mark, read(), threads=1):
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


def _is_space() -> np.ndarray:
    """(n,) uint8: whether str.strip() removes a code point; no later one is a space."""
    spaces = [point for point in range(0x10000) if chr(point).isspace()]
    table = np.zeros(spaces[-1] + 1, np.uint8)
    table[spaces] = 1
    return table


def _check_disk(work: Work, found: Scan, itemsize: int) -> None:
    """Raises UserError unless the shards, and the working files of items, fit onto the disk."""
    needed = found.characters * itemsize
    if found.format == "line":
        needed = 2 * (needed + found.items * itemsize) + found.items * _index_dtype(found).itemsize
    needed -= sum(entry["bytes"] for entry in work.finished.values())
    free = shutil.disk_usage(work.directory).free
    if needed + PRINTED_SPACE > free:
        raise UserError(
            f"preparing needs about {format_bytes(needed)} in {work.directory.parent}, but only {format_bytes(free)} "
            "are free: free some, or choose a folder on another disk"
        )


# ---- running text


def _write_text(
    work: Work, text: Text, options: Options, name: str, vocabulary: Vocabulary, dtype: str, report: Report
) -> tuple[dict[str, Any], dict[str, int]]:
    """Writes the shards; returns their part of the manifest, and the bytes of the splits that are known."""
    assert work.scan is not None
    writer, total, done = ShardWriter(work, "tokens", dtype), work.scan.characters, 0
    table, buffers, last = vocabulary.table, _Buffers(dtype), None

    bounds = [0, *split_bounds(total), total]
    sizes = dict.fromkeys(SPLITS, 0)  # of each split in bytes

    def encode(piece: bytes) -> tuple[bytes, np.ndarray, int]:
        buffer = buffers.take(len(piece))
        return piece, buffer, _ext._C.encode_characters(piece, table, buffer)

    try:
        for piece, buffer, count in _in_order(encode, text()):
            if count < 0:
                raise _changed(name)
            for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False):
                first, end = max(start - done, 0), min(stop - done, count)  # the characters of the piece in this split
                if first == 0 and end == count:
                    sizes[split] += len(piece)
                elif first < end:
                    sizes[split] += len(piece.decode()[first:end].encode())
            writer.write(buffer[:count])
            if last is not None:  # it is written now
                buffers.give_back(last)
            last = buffer
            done += count
            report("encoding", done, total)
        if done != total:
            raise _changed(name)
        written = writer.close()
    finally:
        writer.discard()
    splits = {
        split: {"start": start, "stop": stop, "first_item": 0, "last_item": 0, "longest_item": stop - start}
        for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False)
    }
    return {"tokens": written, "ends": None, "splits": splits, "duplicates_removed": 0}, sizes


def _changed(name: str) -> UserError:
    return UserError(f"{name} changed while it was read: prepare it again")


# ---- items


def _write_items(
    work: Work, text: Text, options: Options, name: str, vocabulary: Vocabulary, dtype: str, report: Report
) -> tuple[dict[str, Any], dict[str, int]]:
    """As `_write_text`, for items."""
    assert work.scan is not None
    found = work.scan
    tokens, starts = _write_raw_items(work, text, name, vocabulary, dtype, report)
    kept = _order(tokens, starts, options)
    if kept < len(SPLITS):
        raise UserError(f"{name} has {plural(kept, 'item')}, but train, dev and test need one each")
    bounds = [0, *split_bounds(kept), kept]
    total = found.characters + found.items
    token_writer, end_writer = ShardWriter(work, "tokens", dtype), ShardWriter(work, "ends", str(starts.dtype))
    room = TAKEN_TOKENS
    splits, stop = {}, 0
    try:
        for split, first, last in zip(SPLITS, bounds, bounds[1:], strict=False):
            start, longest, at = stop, 0, first
            while at < last:
                chosen = starts[at : min(at + TAKEN_ITEMS, last)]
                out, ends = np.empty(room, dtype), np.empty_like(chosen)
                items, size, most = _ext._C.take_items(tokens, chosen, stop, out, ends)
                if not items:  # an item longer than all that were taken so far
                    room *= 2
                    continue
                token_writer.write(out[:size])
                end_writer.write(ends[:items])
                at += items
                stop += size
                longest = max(longest, most - 1)
                report("shuffling", stop, total)
            splits[split] = {
                "start": start, "stop": stop, "first_item": first, "last_item": last, "longest_item": longest,
            }  # fmt: skip
        written = {"tokens": token_writer.close(), "ends": end_writer.close()}
    finally:
        token_writer.discard()
        end_writer.discard()
    return {**written, "splits": splits, "duplicates_removed": found.items - kept}, {}


def _index_dtype(found: Scan) -> np.dtype[Any]:
    """The dtype of an index of the tokens of all items."""
    return np.dtype("uint32" if found.characters + found.items < 2**32 else "int64")


def _write_raw_items(
    work: Work, text: Text, name: str, vocabulary: Vocabulary, dtype: str, report: Report
) -> tuple[np.ndarray, np.ndarray]:
    """Writes the tokens of the items in the order of the text; returns them, mapped, and where each item begins.

    Behind the tokens are PADDING bytes.
    """
    assert work.scan is not None
    raw = work.directory / "items.tmp"
    lines = _ext._C.Lines(_is_space(), ITEM_CHARACTERS)
    encode = {"uint8": lines.encode8, "uint16": lines.encode16, "uint32": lines.encode32}[dtype]
    table, index = vocabulary.table, _index_dtype(work.scan)
    starts = np.empty(work.scan.items, index)  # in memory: the system would write back a file that is shuffled
    done, total, items = 0, work.scan.characters + work.scan.items, 0

    buffers = _Buffers(dtype)

    def encoded(piece: bytes) -> tuple[np.ndarray, int, np.ndarray]:
        buffer = buffers.take(len(piece) + lines.spaces + 1)
        try:
            return (buffer, *encode(piece, table, buffer))
        except ValueError as error:
            raise _changed(name) from error

    with naming(raw), raw.open("wb") as file:
        for buffer, count, found in _in_order(encoded, itertools.chain(text(), [b"\n"]), threads=1):
            if items + len(found) > len(starts):
                raise _changed(name)
            starts[items : items + len(found)] = found
            items += len(found)
            done += count
            file.write(buffer[:count].data)
            buffers.give_back(buffer)
            report("encoding", done, total)
        file.write(bytes(PADDING))
    if items != len(starts) or done != total:
        raise _changed(name)
    return shards.map_files([(str(raw), raw.stat().st_size)]).view(dtype), starts


def _order(tokens: np.ndarray, starts: np.ndarray, options: Options) -> int:
    """Puts `starts` in the order of the split; returns how many are left without duplicates."""
    kept = len(starts)
    if options.dedup:
        whole = tokens[: -PADDING // tokens.itemsize]
        repeated = _ext._C.repeated_items(whole, len(starts), TABLE_BYTES)
        kept = 0
        for at in range(0, len(starts), TAKEN_ITEMS):
            block = starts[at : at + TAKEN_ITEMS]
            bits = np.unpackbits(repeated[at // 8 : (at + len(block) + 7) // 8], count=len(block), bitorder="little")
            block = block[bits == 0]
            starts[kept : kept + len(block)] = block
            kept += len(block)
    state = random.Random(options.seed).getstate()[1]
    _ext._C.shuffle_indices(starts[:kept], list(state))
    return kept


def _overlap(work: Work, written: dict[str, Any]) -> int:
    """The number of dev items that also occur in train, by a hash table of as many dev items as fit at a time."""
    train, dev = (written["splits"][split] for split in ("train", "dev"))
    array, found = written["tokens"], 0
    wanted_of = {"uint8": _ext._C.WantedItems8, "uint16": _ext._C.WantedItems16, "uint32": _ext._C.WantedItems32}
    for tokens, items in _chunks(_whole_items(_read(work, array, dev["start"], dev["stop"]))):
        wanted = wanted_of[array["dtype"]](tokens, items)
        for _ in _in_order(wanted.mark, _whole_items(_read(work, array, train["start"], train["stop"]))):
            pass
        found += wanted.found()
    return found


def _whole_items(blocks: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The tokens of items in blocks that end behind an item."""
    rest: list[np.ndarray] = []
    for block in blocks:
        size = _ext._C.whole_items(block)
        if size:
            yield np.concatenate([*rest, block[:size]])
            rest = []
        rest.append(block[size:])


def _chunks(blocks: Iterable[np.ndarray]) -> Iterator[tuple[np.ndarray, int]]:
    """Blocks of items, joined up to WANTED_ITEMS or WANTED_BYTES, and the number of items in them."""
    parts: list[np.ndarray] = []
    items = 0
    for block in blocks:
        parts.append(block)
        items += int(np.count_nonzero(block == SEPARATOR))
        if items >= WANTED_ITEMS or sum(part.nbytes for part in parts) >= WANTED_BYTES:
            yield np.concatenate(parts), items
            parts, items = [], 0
    if parts:
        yield np.concatenate(parts), items


# ---- the digest


def _read(work: Work, array: dict[str, Any], start: int, stop: int) -> Iterator[np.ndarray]:
    """array[start:stop] in blocks; they are read, and not mapped, so that only some are in memory."""
    dtype = np.dtype(array["dtype"])
    shard_size = shards.SHARD_BYTES // dtype.itemsize
    while start < stop:
        shard, at = divmod(start, shard_size)
        path = work.directory / array["shards"][shard]["file"]
        size = min(READ_TOKENS, stop - start, shard_size - at)
        block = np.fromfile(path, dtype, size, offset=at * dtype.itemsize)
        if len(block) < size:
            raise UserError(f"{path} was cut while the corpus was prepared: prepare it again")
        yield block
        start += size


def _digest(
    digest: Any,
    split: str,
    part: dict[str, Any],
    read: Callable[[int, int], Iterator[np.ndarray]],
    size: int | None,
    vocabulary: Vocabulary,
    report: Report,
) -> None:
    """Adds a split to the digest, as `charlm.lm.data` does: its size in items or strings, in bytes, and its text.

    Its size in bytes is `size`, or is found in a pass over its tokens.
    """
    start, stop = part["start"], part["stop"]
    if vocabulary.separator:
        count, stop = part["last_item"] - part["first_item"], stop - 1  # without the end of the last item
    else:
        count = 1
    encoded = [character.encode() for character in ("\n" if vocabulary.separator else "") + vocabulary.chars]
    sizes = np.array([len(character) for character in encoded], np.uint8)
    characters = np.array([int.from_bytes(character, "little") for character in encoded], np.uint32)

    def decode(block: np.ndarray) -> tuple[np.ndarray, int]:
        text = np.empty(4 * len(block), np.uint8)
        return text[: _ext._C.decode_tokens(block, characters, sizes, text)], len(block)

    if size is None and sizes.max() > 1:
        size = sum(_in_order(lambda block: _ext._C.utf8_size(block, sizes), read(start, stop)))
    elif size is None:
        size = stop - start
    digest.update(f"\n{split} {count} {size}\n".encode())
    for text, tokens in _in_order(decode, read(start, stop)):
        digest.update(text)
        start += tokens
        report("digesting", start, stop)


# ---- memory and threads


class _Buffers:
    """Arrays that are used again: the pages of a new one cost as much as what is written into it."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._free: deque[np.ndarray] = deque()

    def take(self, size: int) -> np.ndarray:
        """An array of at least `size`."""
        with suppress(IndexError):  # threads take and give back
            buffer = self._free.pop()
            if len(buffer) >= size:
                return buffer
        return np.empty(size + size // 8, self._dtype)

    def give_back(self, buffer: np.ndarray) -> None:
        """Takes back an array that nobody reads any more."""
        self._free.append(buffer)


Argument = TypeVar("Argument")
Result = TypeVar("Result")


def _in_order(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], threads: int = THREADS
) -> Iterator[Result]:
    """Yields the results of `function`, which threads call for the next arguments meanwhile; one calls it in order."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Result]] = deque()
        for argument in arguments:
            running.append(pool.submit(function, argument))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
