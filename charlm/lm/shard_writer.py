"""The folder in which a corpus is being prepared: what is finished there, and the shards that are being written."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from charlm._errors import UserError
from charlm.lm import shards
from charlm.lm.files import naming, sha256_of, write_atomically

STATE = "state.json"
READ_TOKENS = 1 << 20  # at a time

Text = Callable[[], Iterator[bytes]]  # the text in pieces of UTF-8, each of whole characters, with newlines as "\n"
Report = Callable[[str, int, int], None]  # stage, characters done, characters in total (0 in the first stage: unknown)


def changed(name: str) -> UserError:
    """The error about a text that is not the same in both passes."""
    return UserError(f"{name} changed while it was read: prepare it again")


@dataclass
class Scan:
    """What the first pass finds."""

    format: str
    chars: str
    characters: int  # of running text, or of all items without their ends
    items: int


@dataclass
class Work:
    """The folder in which a corpus is being prepared, and what is finished there."""

    directory: Path
    key: dict[str, Any]
    scan: Scan | None = None
    finished: dict[str, dict[str, Any]] = field(default_factory=dict)  # the manifest's entry of each shard, by its name
    writing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    hashing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    syncing: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))  # that alone adds to `finished`

    def load(self) -> None:
        """Takes over what an earlier call with the same key has finished."""
        try:
            state = json.loads((self.directory / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if state["key"] == json.loads(json.dumps(self.key)):
            self.scan = Scan(**state["scan"])
            self.finished = {name: entry for name, entry in state["finished"].items() if self._is_whole(entry)}

    def _is_whole(self, entry: dict[str, Any]) -> bool:
        """Whether a finished shard is still as it was written."""
        try:
            return sha256_of(self.directory / entry["file"]) == entry["sha256"]
        except OSError:
            return False

    def close(self) -> None:
        """Ends the threads, when they have done what they were given."""
        for thread in (self.writing, self.hashing, self.syncing):
            thread.shutdown()

    def read(self, array: dict[str, Any], start: int, stop: int) -> Iterator[np.ndarray]:
        """array[start:stop] in blocks, of the array that a ShardWriter has written.

        They are read, and not mapped, so that only some are in memory.
        """
        dtype = np.dtype(array["dtype"])
        shard_size = shards.SHARD_BYTES // dtype.itemsize
        while start < stop:
            shard, at = divmod(start, shard_size)
            path = self.directory / array["shards"][shard]["file"]
            size = min(READ_TOKENS, stop - start, shard_size - at)
            block = np.fromfile(path, dtype, size, offset=at * dtype.itemsize)
            if len(block) < size:
                raise UserError(f"{path} was cut while the corpus was prepared: prepare it again")
            yield block
            start += size

    def save(self) -> None:
        assert self.scan is not None
        state = {"key": self.key, "scan": asdict(self.scan), "finished": self.finished}
        write_atomically(self.directory / STATE, json.dumps(state).encode())


class ShardWriter:
    """Writes one array as shards, in the threads of `work`; shards that are finished already are not written again.

    While one shard is synced to disk, the next is written; there are never two that are not synced.
    """

    def __init__(self, work: Work, name: str, dtype: str) -> None:
        self.work, self.name, self.dtype = work, name, dtype
        self.files: list[str] = []
        nothing: Future[None] = Future()  # is written and synced before the first block
        nothing.set_result(None)
        self.writing, self.syncing = nothing, nothing
        self._open()

    def _open(self) -> None:
        self.file = f"{self.name}-{len(self.files):05}.bin"
        self.room, self.hash = shards.SHARD_BYTES, hashlib.sha256()
        is_finished = self.file in self.work.finished
        self.out = None if is_finished else (self.work.directory / f"{self.file}.tmp").open("wb")

    def write(self, array: np.ndarray, then: Callable[[], object] = lambda: None) -> None:
        """Writes `array` in a thread, behind the last one; it may not be changed until `then` is called."""
        self.writing.result()
        self.writing = self.work.writing.submit(self._write, array, then)

    def _write(self, array: np.ndarray, then: Callable[[], object]) -> None:
        data = memoryview(np.ascontiguousarray(array, self.dtype)).cast("B") if len(array) else memoryview(b"")
        while len(data):
            part, data = data[: self.room], data[self.room :]
            if self.out is not None:
                hashing = self.work.hashing.submit(self.hash.update, part)
                with naming(self.work.directory / self.file):
                    self.out.write(part)
                hashing.result()
            self.room -= len(part)
            if not self.room:
                self._finish()
                self._open()
        then()

    def _finish(self) -> None:
        self.syncing.result()
        if self.out is not None:
            self.syncing = self.work.syncing.submit(self._sync, self.out, self.file, self.hash.hexdigest())
            self.out = None
        self.files.append(self.file)

    def _sync(self, out: BinaryIO, file: str, sha256: str) -> None:
        """Records a shard as finished when it is on disk under its name."""
        path = self.work.directory / file
        with naming(path), out:
            out.flush()
            os.fsync(out.fileno())
            path.with_name(f"{file}.tmp").rename(path)
        self.work.finished[file] = {"file": file, "bytes": path.stat().st_size, "sha256": sha256}
        self.work.save()

    def close(self) -> dict[str, Any]:
        """Finishes the last shard; returns the manifest's entry of the array."""
        self.writing.result()
        return self.work.writing.submit(self._close).result()

    def _close(self) -> dict[str, Any]:
        if self.room < shards.SHARD_BYTES or not self.files:
            self._finish()
        elif self.out is not None:
            self.out.close()
            (self.work.directory / f"{self.file}.tmp").unlink()
        self.syncing.result()
        return {"dtype": self.dtype, "shards": [self.work.finished[file] for file in self.files]}

    def discard(self) -> None:
        """Closes the file after an error, when nothing is being written or synced any more."""
        wait([self.writing])
        wait([self.syncing])
        if self.out is not None:
            with suppress(OSError):  # it writes its buffer again, which has failed and has been reported
                self.out.close()
