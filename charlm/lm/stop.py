"""How a signal stops a run: between two steps, or in the middle of what can be made again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class Interrupted(BaseException):
    """A signal came while nothing would be left half done."""


@dataclass
class StopRequest:
    """Set by a signal; the loop looks at it between steps, so that no step is left half done."""

    signal: int | None = None
    is_interruptible: bool = False

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """SIGINT, SIGTERM and SIGHUP set `signal`; a second one interrupts at once. For the main thread only.

        SIGHUP stays ignored where it is (nohup).
        """

        def handle(number: int, frame: FrameType | None) -> None:
            if self.signal is not None:
                raise KeyboardInterrupt
            self.signal = number
            if self.is_interruptible:
                raise Interrupted

        numbers = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        before = {number: signal.signal(number, handle) for number in numbers}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Inside, a signal raises Interrupted at once, and one that came before it does on entering."""
        self.is_interruptible = True
        try:
            if self.signal is not None:
                raise Interrupted
            yield
        finally:
            self.is_interruptible = False
