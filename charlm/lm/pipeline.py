"""Work on the pieces of a stream in threads, while the next piece is read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import numpy as np

THREADS = 2  # beside that which writes; a third could not be fed by the one that reads

Argument = TypeVar("Argument")
Result = TypeVar("Result")


class Buffers:
    """A pool of arrays: the page faults of a new one cost as much as what is written into it. Threads may share it."""

    def __init__(self, dtype: str) -> None:
        self._dtype = dtype
        self._free: deque[np.ndarray] = deque()

    def take(self, size: int) -> np.ndarray:
        """An array of at least `size` elements, of the pool or new."""
        with suppress(IndexError):  # it is empty
            buffer = self._free.pop()
            if len(buffer) >= size:
                return buffer
        return np.empty(size + size // 8, self._dtype)

    def give_back(self, buffer: np.ndarray) -> None:
        """Adds to the pool an array that is not used any more."""
        self._free.append(buffer)


def in_order(
    function: Callable[[Argument], Result], arguments: Iterable[Argument], threads: int = THREADS
) -> Iterator[Result]:
    """Yields the results of `function`, which threads call for the next arguments meanwhile; one calls it in order."""
    with ThreadPoolExecutor(threads) as pool:
        running: deque[Future[Result]] = deque()
        for argument in arguments:
            running.append(pool.submit(function, argument))
            if len(running) > threads:
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
