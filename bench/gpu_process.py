"""A process with a time-out that holds for everything it starts: its group is ended with it, compilers included."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

GRACE = 3.0  # seconds between asking a process to end and ending it


class Outcome(NamedTuple):
    """How a process ended: its exit code, None if its time ran out; all it printed; how long it took."""

    code: int | None
    output: str
    seconds: float

    @property
    def failed(self) -> bool:
        return self.code != 0

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1].strip() if lines else "it printed nothing"


class Child:
    """A process that has been started; several can run side by side."""

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        # A file, not a pipe: a grandchild that outlives its parent keeps a pipe open.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  closed by wait
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, end: float) -> Outcome:
        """Until it has ended, or until `end` of the monotonic clock; nothing of its group is left then."""
        code = None
        try:
            code = self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGTERM)
            self._reap(GRACE)
        finally:
            self.end()
        self.log.seek(0)
        with self.log:
            output = self.log.read().decode(errors="replace")
        return Outcome(code, output, time.monotonic() - self.began)

    def end(self) -> None:
        """At once, and whatever it has started."""
        self._signal(signal.SIGKILL)
        self._reap(None)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self.process.pid, number)
        except (ProcessLookupError, PermissionError):
            return

    def _reap(self, seconds: float | None) -> None:
        try:
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return
