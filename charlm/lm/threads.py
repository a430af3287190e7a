"""Detects when a single thread is faster: on a shared machine, synchronizing threads can cost more than they save."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from charlm._errors import UserError

WARM_UP, REPEATS = 2, 5
MIN_STEPS = 1000  # shorter runs are not timed: the measurement takes 2 * (WARM_UP + REPEATS) steps
SLOWER = 1.25  # smaller ratios are within the noise


def advice(step: Callable[[], None]) -> str | None:
    """A recommendation if `step` is clearly faster with one thread than with torch's current number; otherwise None."""
    threads = torch.get_num_threads()
    one, many = seconds_of(step, threads)
    if many < SLOWER * one:
        return None
    return (
        f"a step takes {1e3 * many:.3g} ms with {threads} threads, but {1e3 * one:.3g} ms with one: "
        "--threads 1 is faster here"
    )


@contextmanager
def using_threads(count: int | None) -> Iterator[None]:
    """Sets the number of torch's CPU threads inside; None changes nothing.

    Raises:
        UserError: The machine does not have so many cores.
    """
    cores, before = os.cpu_count() or 1, torch.get_num_threads()
    if count is not None:
        if not 1 <= count <= cores:
            raise UserError(
                f"threads is {count}, but must be at least 1 and at most {cores}, the cores of this machine"
            )
        torch.set_num_threads(count)
    try:
        yield
    finally:
        if count is not None:
            torch.set_num_threads(before)


def seconds_of(step: Callable[[], None], threads: int) -> tuple[float, float]:
    """The median seconds of `step` with one thread and with `threads` threads, measured alternately."""
    found: dict[int, list[float]] = {1: [], threads: []}
    before = torch.get_num_threads()
    try:
        for _ in range(WARM_UP + REPEATS):
            for count, seconds in found.items():
                torch.set_num_threads(count)
                start = time.perf_counter()
                step()
                seconds.append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    one, many = (statistics.median(seconds[WARM_UP:]) for seconds in found.values())
    return one, many
