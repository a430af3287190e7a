"""metrics.jsonl, the losses of a run: one JSON object per line.

    {"step": 400, "split": "train", "nats": 2.1042, "tokens/s": 151234.5}
    {"step": 400, "split": "dev", "nats": 2.0871, "tokens/s": 812345.6}

The loss on train is the mean over the batches since the previous line, with dropout; that on dev is over the
whole split, or over a sample of a large one (`--eval-tokens`). tokens/s is the speed of training or of the evaluation.

metrics.csv has the same for spreadsheets and pandas, with the columns COLUMNS. It is replaced as a whole with every
checkpoint.
"""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from charlm.lm.files import naming, write_atomically

if TYPE_CHECKING:
    from typing_extensions import Self

METRICS = "metrics.jsonl"
CSV = "metrics.csv"
COLUMNS = ("step", "split", "nats", "bits", "tokens_per_second")


class StepLog:
    """Appends lines to the file at `path`, after removing those beyond `step`, where the run starts (0) or resumes.

    A new run replaces the lines of an earlier one only with its first checkpoint. Checkpoints may be written by another
    thread.
    """

    without_lines = False  # whether the file of a run that has none is written

    def __init__(self, path: Path, step: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._file: BinaryIO | None = None
        self._pending = b""  # lines written before the first checkpoint
        self._has_begun = False  # whether the file has the lines of this run
        self._lock = threading.Lock()
        if step:
            kept = [line for line in _lines(self._path) if _entry(line).get("step", math.inf) <= step]
            self._pending = "".join(f"{line}\n" for line in kept).encode()
            self._begin()

    def append(self, entry: dict[str, Any]) -> None:
        """Appends `entry`, which has a "step", as a line."""
        line = json.dumps(entry, allow_nan=False).encode() + b"\n"
        with self._lock, naming(self._path):
            if not self._has_begun:
                self._pending += line
                return
            if self._file is None:
                self._file = self._path.open("ab", buffering=0)  # a buffer would retry a failed write on close
            self._file.write(line)

    def checkpointed(self) -> None:
        """Must be called when a checkpoint of this run is on disk; the lines of this run then replace the old ones."""
        with self._lock:
            if not self._has_begun:
                self._begin()

    def _begin(self) -> None:
        if self._pending or self._path.exists() or self.without_lines:
            write_atomically(self._path, self._pending)
        self._has_begun = True

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        if self._file is not None:
            self._file.close()


class MetricsLog(StepLog):
    """The log of the losses of a run in DIR/metrics.jsonl."""

    without_lines = True

    def __init__(self, directory: Path, step: int) -> None:
        self._csv = directory / CSV
        self._rows = [",".join(COLUMNS)]
        super().__init__(directory / METRICS, step)
        if step:
            self._rows += map(_row, read_metrics(directory))
            self._write_table()

    def write(self, step: int, split: str, nats: float, tokens_per_second: float) -> None:
        entry = {"step": step, "split": split, "nats": nats, "tokens/s": round(tokens_per_second, 1)}
        self.append(entry)
        self._rows.append(_row(_record(entry)))

    def checkpointed(self) -> None:
        super().checkpointed()
        self._write_table()

    def _write_table(self) -> None:
        write_atomically(self._csv, "".join(f"{row}\n" for row in self._rows).encode())


def read_metrics(directory: Path) -> list[dict[str, Any]]:
    """The records of DIR/metrics.jsonl that are whole, with "bits" too, and "tokens_per_second" for "tokens/s"."""
    entries = map(_entry, _lines(directory / METRICS))
    return [_record(entry) for entry in entries if entry.keys() >= {"split", "nats", "tokens/s"}]


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    """A line of the file as `read_metrics` returns it."""
    known = {key: entry[key] for key in ("step", "split", "nats")}
    return {**known, "bits": entry["nats"] / math.log(2), "tokens_per_second": entry["tokens/s"]}


def _row(record: dict[str, Any]) -> str:
    return ",".join(str(record[column]) for column in COLUMNS)


def _entry(line: str) -> dict[str, Any]:
    """The entry in a line, whose step is a finite number, and its nats too if it has them; {} for a damaged line."""
    try:
        entry = json.loads(line)
        return entry if math.isfinite(entry["step"]) and math.isfinite(entry.get("nats", 0)) else {}
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return {}


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
