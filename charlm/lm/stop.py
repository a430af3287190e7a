"""How a signal stops a run: between two steps, or in the middle of work that can be repeated."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(BaseException):
    """Raised by a signal while the interrupted work can be repeated."""


@dataclass
class StopRequest:
    """A flag that a signal sets and that the training loop checks between steps, so that every step is completed."""

    signal: int | None = None
    is_interruptible: bool = False
    ignores_repeats: bool = False  # torchrun sends each process the signals that the terminal has sent it already

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handles SIGINT, SIGTERM and SIGHUP inside: the first sets `signal`, a second raises KeyboardInterrupt
        unless repeats are ignored.

        Python gives signals to the main thread only: in another one nothing is handled. If SIGHUP is ignored, as under
        nohup, it stays ignored.
        """

        def handle(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                if self.ignores_repeats:
                    return
                raise KeyboardInterrupt
            self.signal = number
            if self.is_interruptible:
                raise Interrupted

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        if threading.current_thread() is not threading.main_thread():
            numbers = []
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once; a signal received earlier raises it on entry."""
        self.is_interruptible = True
        try:
            if self.signal is not None:
                raise Interrupted
            yield
        finally:
            self.is_interruptible = False
