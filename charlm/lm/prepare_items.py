"""The items of a corpus that is prepared: their tokens go to a working file, from which they are copied in the order of
`random.Random(seed).shuffle`.

The loops over items, which know nothing of files, are in csrc/corpus/items.cpp.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from charlm import _ext
from charlm._errors import UserError
from charlm.lm import shards
from charlm.lm.data import ITEM_CHARACTERS, SPLITS, plural, split_bounds
from charlm.lm.files import naming
from charlm.lm.pipeline import Buffers, in_order
from charlm.lm.shard_writer import Report, Scan, ShardWriter, Text, Work, changed
from charlm.lm.vocabulary import SEPARATOR, Vocabulary

if TYPE_CHECKING:
    from charlm.lm.prepare import Options

TABLE_BYTES = 128 << 20  # of the table in which equal items are found
WANTED_ITEMS, WANTED_BYTES = 12 << 20, 96 << 20  # most dev items, and bytes of these, in a table at a time
TAKEN_ITEMS, TAKEN_TOKENS = 1 << 18, 1 << 22  # most items, and tokens of items, put in order at a time
PADDING = 8  # bytes behind the tokens of items, which are copied in words of 8 bytes


def spaces() -> np.ndarray:
    """(n,) uint8: whether str.strip() removes a code point; no later one is a space."""
    found = [point for point in range(0x10000) if chr(point).isspace()]
    table = np.zeros(found[-1] + 1, np.uint8)
    table[found] = 1
    return table


def write_items(
    work: Work, text: Text, options: Options, name: str, vocabulary: Vocabulary, dtype: str, report: Report
) -> dict[str, Any]:
    """Writes the shards of items, in the order of the split; returns their part of the manifest."""
    assert work.scan is not None
    found = work.scan
    tokens, starts = _write_raw_items(work, text, name, vocabulary, dtype, report)
    kept = _order(tokens, starts, options)
    if kept < len(SPLITS):
        raise UserError(f"{name} has {plural(kept, 'item')}, but train, dev and test need one each")
    bounds = [0, *split_bounds(kept), kept]
    total = found.characters + found.items
    token_writer, end_writer = ShardWriter(work, "tokens", dtype), ShardWriter(work, "ends", str(starts.dtype))
    buffers, room = Buffers(dtype), TAKEN_TOKENS
    splits, stop = {}, 0
    try:
        for split, first, last in zip(SPLITS, bounds, bounds[1:], strict=False):
            start, longest, at = stop, 0, first
            while at < last:
                chosen = starts[at : min(at + TAKEN_ITEMS, last)]
                out, ends = buffers.take(room), np.empty_like(chosen)
                items, size, most = _ext._C.take_items(tokens, chosen, stop, out, ends)
                if not items:  # an item longer than all that were taken so far
                    room *= 2
                    continue
                token_writer.write(out[:size], partial(buffers.give_back, out))
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
    return {**written, "splits": splits, "duplicates_removed": found.items - kept}


def index_dtype(found: Scan) -> np.dtype[Any]:
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
    lines = _ext._C.Lines(spaces(), ITEM_CHARACTERS)
    encode = {"uint8": lines.encode8, "uint16": lines.encode16, "uint32": lines.encode32}[dtype]
    table, index = vocabulary.table, index_dtype(work.scan)
    starts = np.empty(work.scan.items, index)  # in memory: the system would write back a file that is shuffled
    done, total, items = 0, work.scan.characters + work.scan.items, 0

    buffers = Buffers(dtype)

    def encoded(piece: bytes) -> tuple[np.ndarray, int, np.ndarray]:
        buffer = buffers.take(len(piece) + lines.spaces + 1)
        try:
            return (buffer, *encode(piece, table, buffer))
        except ValueError as error:
            raise changed(name) from error

    with naming(raw), raw.open("wb") as file:
        for buffer, count, found in in_order(encoded, itertools.chain(text(), [b"\n"]), threads=1):
            if items + len(found) > len(starts):
                raise changed(name)
            starts[items : items + len(found)] = found
            items += len(found)
            done += count
            file.write(buffer[:count].data)
            buffers.give_back(buffer)
            report("encoding", done, total)
        file.write(bytes(PADDING))
    if items != len(starts) or done != total:
        raise changed(name)
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


def count_dev_items_in_train(work: Work, written: dict[str, Any]) -> int:
    """The number of dev items that also occur in train, by a hash table of as many dev items as fit at a time."""
    train, dev = (written["splits"][split] for split in ("train", "dev"))
    array, found = written["tokens"], 0
    wanted_of = {"uint8": _ext._C.WantedItems8, "uint16": _ext._C.WantedItems16, "uint32": _ext._C.WantedItems32}
    for tokens, items in _chunks(_whole_items(work.read(array, dev["start"], dev["stop"]))):
        wanted = wanted_of[array["dtype"]](tokens, items)
        for _ in in_order(wanted.mark, _whole_items(work.read(array, train["start"], train["stop"]))):
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
