"""The folder in which a corpus is being prepared: what is finished there, and the shards that are being written."""

from __future__ import annotations

import hashlib
import json
import os
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from charlm.lm import shards
from charlm.lm.files import naming, write_atomically

STATE = "state.json"


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
    thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))  # that writes all files

    def load(self) -> None:
        """Takes over what an earlier call with the same key has finished."""
        try:
            state = json.loads((self.directory / STATE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return
        if state["key"] == json.loads(json.dumps(self.key)):
            self.scan = Scan(**state["scan"])
            self.finished = state["finished"]

    def save(self) -> None:
        assert self.scan is not None
        state = {"key": self.key, "scan": asdict(self.scan), "finished": self.finished}
        write_atomically(self.directory / STATE, json.dumps(state).encode())


class ShardWriter:
    """Writes one array as shards, in the thread of `work`; shards that are finished already are not written again."""

    def __init__(self, work: Work, name: str, dtype: str) -> None:
        self.work, self.name, self.dtype = work, name, dtype
        self.entries: list[dict[str, Any]] = []
        self.writing: Future[None] | None = None
        self._open()

    def _open(self) -> None:
        self.file = f"{self.name}-{len(self.entries):05}.bin"
        self.room, self.hash = shards.SHARD_BYTES, hashlib.sha256()
        self.skips = self.file in self.work.finished
        self.out = None if self.skips else (self.work.directory / f"{self.file}.tmp").open("wb")

    def write(self, array: np.ndarray) -> None:
        """Writes `array`, which must not change any more, as soon as the last one is written."""
        self._wait()
        self.writing = self.work.thread.submit(self._write, array)

    def _wait(self) -> None:
        if self.writing is not None:
            self.writing.result()

    def _write(self, array: np.ndarray) -> None:
        data = memoryview(np.ascontiguousarray(array, self.dtype)).cast("B") if len(array) else memoryview(b"")
        while len(data):
            part, data = data[: self.room], data[self.room :]
            if self.out is not None:
                with naming(self.work.directory / self.file):
                    self.out.write(part)
                self.hash.update(part)
            self.room -= len(part)
            if not self.room:
                self._finish()
                self._open()

    def _finish(self) -> None:
        path = self.work.directory / self.file
        if self.out is not None:
            with naming(path):
                self.out.flush()
                os.fsync(self.out.fileno())
                self.out.close()
                path.with_name(f"{self.file}.tmp").rename(path)
            entry = {"file": self.file, "bytes": path.stat().st_size, "sha256": self.hash.hexdigest()}
            self.work.finished[self.file] = entry
            self.work.save()
        self.entries.append(self.work.finished[self.file])

    def close(self) -> dict[str, Any]:
        """Finishes the last shard; returns the manifest's entry of the array."""
        self._wait()
        return self.work.thread.submit(self._close).result()

    def _close(self) -> dict[str, Any]:
        if self.room < shards.SHARD_BYTES or not self.entries:
            self._finish()
        elif self.out is not None:
            self.out.close()
            (self.work.directory / f"{self.file}.tmp").unlink()
        return {"dtype": self.dtype, "shards": self.entries}

    def discard(self) -> None:
        """Closes the file after an error, when it is no longer being written."""
        if self.writing is not None:
            wait([self.writing])
        if self.out is not None:
            self.out.close()
