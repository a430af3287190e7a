"""metrics.jsonl: what a run measured, one JSON object a line.

    {"step": 400, "split": "train", "nats": 2.1042, "tokens/s": 151234.5}
    {"step": 400, "split": "dev", "nats": 2.0871, "tokens/s": 812345.6}

train: the mean over the batches since the line before (with dropout). dev: the whole split. tokens/s is of
       that work.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

from charlm.lm.files import naming, write_atomically

METRICS = "metrics.jsonl"


class MetricsLog:
    """Appends to DIR/metrics.jsonl, less what lies beyond `step`, where the run begins (0) or resumes.

    A run that begins has no lines there before its first checkpoint: until then those of an earlier one stay.
    """

    def __init__(self, directory: Path, step: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._path = directory / METRICS
        self._file: BinaryIO | None = None
        self._waiting = b""  # lines for which there is no file yet
        if step:
            self._waiting = "".join(f"{line}\n" for line in _lines(self._path) if _step(line) <= step).encode()
            self._begin()

    def write(self, step: int, split: str, nats: float, tokens_per_second: float) -> None:
        entry = {"step": step, "split": split, "nats": nats, "tokens/s": round(tokens_per_second, 1)}
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        if self._file is None:
            self._waiting += line
            return
        with naming(self._path):
            self._file.write(line)

    def checkpointed(self) -> None:
        """To be called when a checkpoint of this run is on disk: its lines take their place."""
        if self._file is None:
            self._begin()

    def _begin(self) -> None:
        write_atomically(self._path, self._waiting)
        self._file = self._path.open("ab", buffering=0)  # else a line that the disk had no room for is tried on close

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []


def _step(line: str) -> float:
    """The step of a line; of one that is damaged, or that a crash cut short, infinity."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return float("inf")
    return step if isinstance(step, int) else float("inf")
