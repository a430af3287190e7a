"""A prepared corpus: a folder of token shards and a manifest, as `charlm prepare` writes it.

    manifest.json      what is in the folder; written last, with a checksum of itself
    tokens-00000.bin   the tokens of train, dev and test, one behind another, in little-endian integers of 1, 2 or 4
    tokens-00001.bin   bytes; in line format each item is followed by token 0
    ends-00000.bin     in line format the index behind each item, in integers of 4 or 8 bytes

The shards are mapped one behind another, so that only what is used of them takes memory, which the system can reclaim.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from charlm import _ext
from charlm._errors import UserError
from charlm.lm.corpus import Corpus
from charlm.lm.files import sha256_of
from charlm.lm.stream import Stream
from charlm.lm.vocabulary import SEPARATOR, Vocabulary

MANIFEST = "manifest.json"
FORMAT_VERSION = 1
SHARD_BYTES = 1 << 26  # of every shard but the last: a multiple of the page size
DTYPES = {"uint8": torch.uint8, "uint16": torch.int16, "uint32": torch.int32, "int64": torch.int64}
SEARCHED_TOKENS = 1 << 24  # at a time


@dataclass(frozen=True)
class Part:
    """The place of a split: tokens[start:stop], of which the items are ends[first_item:last_item]."""

    start: int
    stop: int
    first_item: int
    last_item: int
    longest_item: int  # in characters


@dataclass(frozen=True)
class ShardedCorpus(Corpus):
    """A corpus in shards.

    Attributes:
        splits: The place of each split, in order.
        all_tokens: (S,) the tokens of all splits, mapped; int16 holds unsigned numbers of 16 bits.
        ends: (n,) the index behind each item, mapped; int32 holds unsigned numbers of 32 bits. None in running text.
        manifest: The manifest.
    """

    is_mapped: ClassVar[bool] = True
    splits: dict[str, Part]
    all_tokens: Tensor
    ends: Tensor | None
    manifest: dict[str, Any]

    @property
    def sizes(self) -> dict[str, int]:
        items = self.format == "line"
        return {
            name: part.last_item - part.first_item if items else part.stop - part.start
            for name, part in self.splits.items()
        }

    def stream(self, split: str, block_size: int) -> Stream:
        """As `Corpus.stream`; the tokens stay in the file."""
        part = self.splits[split]
        if self.ends is not None:
            ends = self.ends[part.first_item : part.last_item]
            return Stream(self.all_tokens[part.start : part.stop], SEPARATOR, ends=ends, ends_from=part.start)
        before = max(0, part.start - block_size)
        return Stream(self.all_tokens[before : part.stop], self.vocabulary.pad_token, part.start - before)

    def longest_item(self, split: str) -> int:
        return self.splits[split].longest_item

    def known(self, split: str) -> Tensor:
        """As `Corpus.known`: the vocabulary is that of the tokens."""
        return torch.ones(self.tokens(split), dtype=torch.bool)

    def overlap(self) -> int | None:
        return self.manifest["dev_items_in_train"]

    def splits_containing(self, items: list[str]) -> list[list[str]]:
        return [[split for split in self.splits if self._contains(split, item)] for item in items]

    def _contains(self, split: str, item: str) -> bool:
        """Whether an item of `split` is `item`: a search for its tokens between two separators."""
        if not set(item) <= set(self.vocabulary.chars):
            return False
        part = self.splits[split]
        tokens = self.all_tokens[part.start : part.stop].numpy()
        wanted = np.array([SEPARATOR, *self.vocabulary.encode(item).tolist(), SEPARATOR]).astype(tokens.dtype)
        if np.array_equal(tokens[: len(wanted) - 1], wanted[1:]):  # the first item has no separator before it
            return True
        pattern, width = wanted.tobytes(), tokens.itemsize
        for start in range(0, len(tokens), SEARCHED_TOKENS):
            block = tokens[start : start + SEARCHED_TOKENS + len(wanted)].tobytes()
            at = block.find(pattern)
            while at % width > 0:  # found across two tokens; -1 % 1 is 0
                at = block.find(pattern, at + 1) if at >= 0 else -width
            if at >= 0:
                return True
        return False


def load(directory: Path) -> ShardedCorpus:
    """Maps the prepared corpus in `directory`.

    Raises:
        UserError: There is none, its manifest was changed, or a shard is missing, cut, or outside the folder.
    """
    manifest = read_manifest(directory)
    chars, separator = manifest["vocabulary"]["chars"], manifest["vocabulary"]["separator"]
    tokens = _mapped(directory, manifest["tokens"])
    ends = _mapped(directory, manifest["ends"]) if manifest["format"] == "line" else None
    return ShardedCorpus(
        format=manifest["format"],
        vocabulary=Vocabulary(chars, separator),
        digest=manifest["digest"],
        duplicates_removed=manifest["duplicates_removed"],
        splits={name: Part(**part) for name, part in manifest["splits"].items()},
        all_tokens=tokens,
        ends=ends,
        manifest=manifest,
    )


def read_manifest(directory: Path) -> dict[str, Any]:
    """The manifest in `directory`, checked against its own checksum."""
    path = directory / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
    except FileNotFoundError:
        raise UserError(
            f"{directory} is a folder without a prepared corpus: `charlm prepare FILE -o {directory}` writes one"
        ) from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: prepare the corpus again") from error
    if version != FORMAT_VERSION:
        raise UserError(f"{path} has format version {version}, but this charlm reads {FORMAT_VERSION}: prepare again")
    if manifest.get("checksum") != checksum(manifest):
        raise UserError(f"{path} was changed after it was written (its checksum differs): prepare the corpus again")
    return manifest


def checksum(manifest: dict[str, Any]) -> str:
    """The sha256 of a manifest without its checksum."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def verify(directory: Path, report: Callable[[str, int, int], None] = lambda stage, done, total: None) -> int:
    """Reads all shards of the prepared corpus in `directory` and compares their sha256; returns their bytes.

    Raises:
        UserError: As `load`, or a shard was changed or cannot be read; the message names it.
    """
    manifest = read_manifest(directory)
    files = [file for array in ("tokens", "ends") if manifest[array] for file in _shards(directory, manifest[array])]
    total, done = sum(shard["bytes"] for _, shard in files), 0
    for path, shard in files:
        try:
            found = sha256_of(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from error
        if found != shard["sha256"]:
            raise UserError(f"{path} was changed after it was written (its sha256 differs): prepare the corpus again")
        done += shard["bytes"]
        report("checking", done, total)
    return total


def _shards(directory: Path, array: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The path of each shard of one array of the manifest, and what the manifest says of it; checks their sizes."""
    for shard in array["shards"]:
        name, expected = shard["file"], shard["bytes"]
        path = directory / name
        if Path(name).name != name or path.is_symlink():
            raise UserError(f"the manifest of {directory} names a shard outside of its folder: {name}")
        try:
            found = path.stat().st_size
        except OSError as error:
            raise UserError(f"{path} is missing ({error.strerror}): prepare the corpus again") from error
        if found != expected:
            raise UserError(f"{path} has {found:,} bytes instead of {expected:,}: prepare the corpus again")
        yield path, shard


def _mapped(directory: Path, array: dict[str, Any]) -> Tensor:
    """Maps the shards of one array of the manifest."""
    dtype, itemsize = DTYPES[array["dtype"]], np.dtype(array["dtype"]).itemsize
    files = [(str(path), shard["bytes"]) for path, shard in _shards(directory, array)]
    return torch.from_numpy(map_files(files)).view(dtype)[: sum(size for _, size in files) // itemsize]


def map_files(files: list[tuple[str, int]]) -> np.ndarray:
    """The bytes of files of known sizes, mapped one behind another: (total,) uint8, private to this process."""
    if _ext._C is None:
        return np.concatenate([np.empty(0, np.uint8), *(np.fromfile(path, np.uint8, size) for path, size in files)])
    return _ext._C.map_files(files)
