"""Whether a second thread pays: on a machine that others use too, waiting for it can cost more than it computes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

WARM_UP, REPEATS = 2, 5
STEPS_WORTH_IT = 1000  # of a run, beside which 2 * (WARM_UP + REPEATS) are little
SLOWER = 1.25  # by less, the next moment may be another


def advice(step: Callable[[], None]) -> str | None:
    """A sentence where `step` is clearly faster with one thread than with as many as torch uses now; else None."""
    threads = torch.get_num_threads()
    one, all_of_them = seconds_of(step, threads)
    if all_of_them < SLOWER * one:
        return None
    return (
        f"{threads} threads are slower than one here: {1e3 * all_of_them:.3g} ms a step, with one {1e3 * one:.3g} ms; "
        "--threads 1 goes faster"
    )


def seconds_of(step: Callable[[], None], threads: int) -> tuple[float, float]:
    """What `step` takes with one thread and with `threads`, in turns; medians, since a busy machine has moments."""
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
