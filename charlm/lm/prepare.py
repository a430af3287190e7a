"""Prepares a corpus that may be larger than memory: writes what `charlm.lm.shards` reads.

    1. scan      reads the text once: its format, vocabulary and size
    2. encode    reads it again and writes the tokens: running text in its order; items to a working file, from which
                 they are taken in the order of `random.Random(seed).shuffle`
    3. digest    reads the shards: the sha256 by which a checkpoint knows its data

Vocabulary, split, order and digest are those of `charlm.lm.data.build_corpus`. Memory does not depend on the size of
the text, but for one byte for each item, and two mapped arrays of 8 and 4 bytes for each that the system may reclaim.

All is written to a folder beside the target, which is renamed at the end. After a kill it stays, and the same call
keeps its finished shards; after an error it is removed.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from charlm import _ext
from charlm._errors import UserError
from charlm.lm import shards
from charlm.lm.data import FORMATS, ITEM_CHARACTERS, SPLITS, is_of_items, plural, split_bounds
from charlm.lm.files import LOCK, locked, naming, write_atomically
from charlm.lm.memory import format_bytes
from charlm.lm.shard_writer import Scan, ShardWriter, Work
from charlm.lm.sources import text_of
from charlm.lm.vocabulary import CODE_POINTS, Vocabulary

TABLE_BYTES = 100 << 20  # of the table in which equal items are found
TAKEN_ITEMS, TAKEN_TOKENS = 1 << 18, 1 << 24  # most items, and tokens of items, put in order at a time
DIGESTED_TOKENS = 1 << 22  # at a time
OWN_FILES = re.compile(rf"{re.escape(shards.MANIFEST)}|(tokens|ends)-\d+\.bin")  # of a prepared corpus
PRINTED_SPACE = 10 << 20  # bytes beyond the shards that must be free

Text = Callable[[], Iterator[str]]
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
        text: Returns the text in pieces, with newlines as "\\n"; it is called twice.
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
            shutil.rmtree(partial, ignore_errors=True)
            raise
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
        shutil.rmtree(old, ignore_errors=True)
    else:
        partial.rename(directory)
    (directory / LOCK).unlink()  # last: another process may not begin before the folder has its name


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
    written = write(work, text, options, name, vocabulary, dtype, report)
    tokens = _mapped(work, written["tokens"])
    ends = _mapped(work, written["ends"]) if written["ends"] else None
    digest = hashlib.sha256(found.format.encode())
    overlap = None
    for split, part in written["splits"].items():
        _digest(digest, split, part, tokens, vocabulary, report)
    if ends is not None:
        bounds = written["splits"]
        last = bounds["dev"]["last_item"]
        repeated = _ext._C.repeated_items(
            tokens[: bounds["dev"]["stop"]], ends[:last], bounds["train"]["last_item"], TABLE_BYTES
        )
        overlap = int(repeated[bounds["dev"]["first_item"] :].sum())
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
    seen, seen_in_items = (np.zeros(CODE_POINTS, np.uint8) for _ in range(2))
    lines = _ext._C.Lines(_is_space(), ITEM_CHARACTERS)
    characters = 0
    for piece in text():
        _ext._C.mark_characters(piece, seen)
        if options.format != "text":
            lines.mark(piece, seen_in_items)
        characters += len(piece)
        report("reading", characters, 0)
    lines.mark("\n", seen_in_items)
    chars = _characters(seen)
    if not chars or chars.isspace():
        raise UserError(f"{name} is empty")
    format = options.format or (
        "line" if is_of_items(lines.lines, lines.items, lines.short_items, lines.words) else "text"
    )
    if format == "line":
        return Scan("line", _characters(seen_in_items), lines.characters, lines.items)
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
        needed = 2 * (needed + found.items * itemsize) + found.items * (8 + 8 + 8)
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
) -> dict[str, Any]:
    assert work.scan is not None
    writer, total, done = ShardWriter(work, "tokens", dtype), work.scan.characters, 0
    table = vocabulary.table
    try:
        for piece in text():
            out = np.empty(len(piece), dtype)
            if _ext._C.encode_characters(piece, table, out) >= 0:
                raise _changed(name)
            writer.write(out)
            done += len(piece)
            report("encoding", done, total)
        if done != total:
            raise _changed(name)
        tokens = writer.close()
    finally:
        writer.discard()
    bounds = [0, *split_bounds(total), total]
    splits = {
        split: {"start": start, "stop": stop, "first_item": 0, "last_item": 0, "longest_item": stop - start}
        for split, start, stop in zip(SPLITS, bounds, bounds[1:], strict=False)
    }
    return {"tokens": tokens, "ends": None, "splits": splits, "duplicates_removed": 0}


def _changed(name: str) -> UserError:
    return UserError(f"{name} changed while it was read: prepare it again")


# ---- items


def _write_items(
    work: Work, text: Text, options: Options, name: str, vocabulary: Vocabulary, dtype: str, report: Report
) -> dict[str, Any]:
    assert work.scan is not None
    found = work.scan
    raw, raw_ends = work.directory / "items.tmp", work.directory / "ends.tmp"
    _write_raw_items(work, text, name, vocabulary, dtype, raw, raw_ends, report)
    tokens = shards.map_files([(str(raw), raw.stat().st_size)]).view(dtype)
    ends = shards.map_files([(str(raw_ends), raw_ends.stat().st_size)]).view(np.int64)
    order = np.memmap(
        work.directory / "order.tmp", "uint32" if found.items < 2**32 else "int64", "w+", shape=(found.items,)
    )
    kept = _order(tokens, ends, order, options)
    if kept < len(SPLITS):
        raise UserError(f"{name} has {plural(kept, 'item')}, but train, dev and test need one each")
    bounds = [0, *split_bounds(kept), kept]
    total = found.characters + found.items
    token_writer = ShardWriter(work, "tokens", dtype)
    end_writer = ShardWriter(work, "ends", "uint32" if total < 2**32 else "int64")
    splits, stop = {}, 0
    try:
        for split, first, last in zip(SPLITS, bounds, bounds[1:], strict=False):
            start, longest = stop, 0
            at = first
            while at < last:
                items = _items_that_fit(ends, order[at : min(at + TAKEN_ITEMS, last)])
                at += len(items)
                chosen, lengths = _ext._C.take_items(tokens, ends, items)
                token_writer.write(chosen)
                end_writer.write(stop + lengths.cumsum())
                stop += len(chosen)
                longest = max(longest, int(lengths.max()) - 1)
                report("shuffling", stop, total)
            splits[split] = {
                "start": start, "stop": stop, "first_item": first, "last_item": last, "longest_item": longest,
            }  # fmt: skip
        written = {"tokens": token_writer.close(), "ends": end_writer.close()}
    finally:
        token_writer.discard()
        end_writer.discard()
    return {**written, "splits": splits, "duplicates_removed": found.items - kept}


def _items_that_fit(ends: np.ndarray, items: np.ndarray) -> np.ndarray:
    """The first of `items`, of TAKEN_TOKENS tokens together, and at least one."""
    lengths = ends[items] - np.where(items > 0, ends[np.maximum(items, 1) - 1], 0)
    return items[: max(1, int(np.searchsorted(lengths.cumsum(), TAKEN_TOKENS, "right")))]


def _write_raw_items(
    work: Work, text: Text, name: str, vocabulary: Vocabulary, dtype: str, raw: Path, raw_ends: Path, report: Report
) -> None:
    """Writes the tokens of the items in the order of the text, and the index behind each."""
    assert work.scan is not None
    lines = _ext._C.Lines(_is_space(), ITEM_CHARACTERS)
    encode = {"uint8": lines.encode8, "uint16": lines.encode16, "uint32": lines.encode32}[dtype]
    table, end, done, total = vocabulary.table, 0, 0, work.scan.characters + work.scan.items
    with naming(raw), raw.open("wb") as token_file, raw_ends.open("wb") as end_file:
        for piece in _with_newline(text()):
            try:
                tokens, lengths = encode(piece, table)
            except ValueError as error:
                raise _changed(name) from error
            ends = end + lengths.cumsum()
            end = int(ends[-1]) if len(ends) else end
            done += len(tokens)
            token_file.write(tokens.data)
            end_file.write(ends.data)
            report("encoding", done, total)
    if lines.items != work.scan.items or done != total:
        raise _changed(name)


def _with_newline(text: Iterator[str]) -> Iterator[str]:
    yield from text
    yield "\n"


def _order(tokens: np.ndarray, ends: np.ndarray, order: np.ndarray, options: Options) -> int:
    """Fills `order` with the items in the order of the split; returns their number, without removed duplicates."""
    kept, removed = len(order), None
    if options.dedup:
        removed = _ext._C.repeated_items(tokens, ends, len(ends), TABLE_BYTES)
        kept -= int(removed.sum(dtype=np.int64))
    at = 0
    for start in range(0, len(order), TAKEN_ITEMS):
        items = np.arange(start, min(start + TAKEN_ITEMS, len(order)))
        if removed is not None:
            items = items[removed[start : start + TAKEN_ITEMS] == 0]
        order[at : at + len(items)] = items
        at += len(items)
    state = random.Random(options.seed).getstate()[1]
    _ext._C.shuffle_indices(order[:kept], list(state))
    return kept


# ---- the digest


def _mapped(work: Work, array: dict[str, Any]) -> np.ndarray:
    files = [(str(work.directory / shard["file"]), shard["bytes"]) for shard in array["shards"]]
    return shards.map_files(files).view(array["dtype"])


def _digest(
    digest: Any, split: str, part: dict[str, Any], tokens: np.ndarray, vocabulary: Vocabulary, report: Report
) -> None:
    """Adds a split to the digest, as `charlm.lm.data` does: its size in items or strings, in bytes, and its text."""
    start, stop = part["start"], part["stop"]
    if vocabulary.separator:
        count, stop = part["last_item"] - part["first_item"], stop - 1  # without the end of the last item
    else:
        count = 1
    text = ("\n" if vocabulary.separator else "") + vocabulary.chars
    points = np.array([ord(character) for character in text], np.uint32)
    sizes = np.array([len(character.encode("utf-8", "surrogatepass")) for character in text], np.uint8)
    blocks = [(at, min(at + DIGESTED_TOKENS, stop)) for at in range(start, stop, DIGESTED_TOKENS)]
    one_byte = int(sizes.max()) == 1
    size = stop - start if one_byte else sum(int(sizes[tokens[a:b]].sum(dtype=np.int64)) for a, b in blocks)
    digest.update(f"\n{split} {count} {size}\n".encode())
    to_bytes = bytes(points.astype(np.uint8).tobytes().ljust(256, b"\0")) if one_byte else b""
    for a, b in blocks:
        block = tokens[a:b]
        if one_byte:
            digest.update(block.tobytes().translate(to_bytes))
        else:
            digest.update(points[block].tobytes().decode("utf-32-le").encode())
        report("digesting", b, len(tokens))
