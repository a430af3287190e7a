"""Interleaved samples A B C A B C …, so that a drift of the machine's speed cancels out of the ratios of each round.

On a CPU (`Timer`), a competing process makes parallel regions wait for a core, some eight milliseconds each, and times
then mean nothing. So empty parallel regions are timed before and after each sample. Where one takes longer than a
millisecond and ten times what it takes on the quiet machine, the sample is discarded and repeated. Where that happens
too often, or the region is slow from the start, `MachineBusyError` is raised. torch's threads sleep when they are idle,
and waking them takes some milliseconds, so regions first run until one is fast, and only those after it are judged.

On a GPU (`GpuTimer`) a sample is the time between two events, after the L2 cache was flushed by reading a gigabyte:
what a flush writes would have to leave the cache during the sample. Behind that read the GPU idles for twice as long as
Python needs to launch the call's kernels, at most 20 ms: they wait in the queue, and the time between the events is the
GPU's alone, as in the middle of a training step. A sample whose kernels were not all queued by then is late: it may
hold time in which the GPU waited for Python. Late ones are counted.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from math import ceil
from typing import Any, NamedTuple

import numpy as np
import torch

SHORTEST_SAMPLE = 2e-3  # seconds: shorter calls are repeated within a sample
LONG_CALL, ROUNDS_OF_LONG_CALLS = 2.0, 3  # seconds: what the machine does meanwhile is a small part of such calls
DISTURBED = 1e-3  # seconds of the empty parallel region
WAKING = 0.05  # seconds that torch's threads may take to wake up
CHECKED = 3  # regions in a row that have to be fast then
PATIENCE = 100  # samples that may be discarded before half of all may not
CALIBRATION = 50  # regions timed to learn what quiet is
MOST_ROUNDS = 60
# Seconds of untimed calls before a sample of a provider with threads of its own: its threads wake up.
WARM_UP = {"jax": 0.02}

FLUSH_BYTES = COPY_BYTES = 1 << 30
CYCLES_A_SECOND = 3_000_000_000  # of the idling: above the clock of every GPU that charlm is built for
LEAST_IDLE, MOST_IDLE = 2e-4, 2e-2  # seconds

WRONG, BUSY, INTERRUPTED = 1, 2, 130  # exit codes
ADVICE = (
    "Times taken now would mean nothing. Stop other programs (`top` shows them), or use fewer threads than cores, and "
    "run the command again."
)


class MachineBusyError(RuntimeError):
    """Something else is using the cores."""


class WrongResult(ArithmeticError):
    """charlm does not agree with float64: there is nothing to time."""


@contextmanager
def exit_codes() -> Iterator[None]:
    """Turns a busy machine, a wrong result and Ctrl-C into one line on stderr and an exit code."""
    try:
        yield
    except WrongResult as wrong:
        print(f"bench: {wrong}", file=sys.stderr)
        raise SystemExit(WRONG) from wrong
    except MachineBusyError as busy:
        print(f"bench: the machine is busy: {busy}. {ADVICE}", file=sys.stderr)
        raise SystemExit(BUSY) from busy
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        raise SystemExit(INTERRUPTED) from None


class Budget(NamedTuple):
    """seconds: of samples for each provider, at most, once it has `rounds` samples."""

    seconds: float = 3.0
    rounds: int = 7


QUICK, DRY_RUN, ON_GPU = Budget(0.25, 5), Budget(0.0, 2), Budget(0.25, 10)

Calls = Mapping[str, Callable[[], object]]


class Timing(NamedTuple):
    """Seconds of one call: median, quantiles 10 % and 90 %, and from how many samples."""

    median: float
    p10: float
    p90: float
    samples: int

    @classmethod
    def of(cls, samples: list[float]) -> Timing:
        # Not statistics.quantiles: between two equal samples, it rounds to a value beside them.
        p10, median, p90 = np.quantile(samples, (0.1, 0.5, 0.9)).tolist()
        return cls(median, p10, p90, len(samples))


def paired_ratio(numerator: list[float], denominator: list[float]) -> float:
    """Median over rounds of a / b."""
    return statistics.median(a / b for a, b in zip(numerator, denominator, strict=True))


class Timer:
    """Takes samples on a CPU, for as many threads as torch has when it is made.

    A region that does nothing (`Timer(lambda: None)`) switches the watch over the machine off, for a dry run.
    """

    def __init__(
        self, region: Callable[[], object] | None = None, now: Callable[[], float] = time.perf_counter
    ) -> None:
        # One small piece for each thread: a fill is cut into pieces of 32768 elements at least.
        self.region = region or partial(torch.empty(32768 * torch.get_num_threads()).fill_, 0.0)
        self.now = now
        self.kept = self.discarded = 0  # samples since the last rounds() began
        self.late: Counter[str] = Counter()
        self.region()
        quiet = statistics.median(self._timed(self.region) for _ in range(CALIBRATION))
        if quiet > DISTURBED:
            normal = "less than 0.1 ms is normal, and 1 ms is the limit"
            raise MachineBusyError(f"an empty parallel region takes {1e3 * quiet:.1f} ms; {normal}")
        self.limit = max(DISTURBED, 10 * quiet)

    def rounds(self, calls: Calls, budget: Budget) -> dict[str, list[float]]:
        """Samples of each provider, seconds a call; those of one round have the same index. Each was called before."""
        self.kept = self.discarded = 0
        repeats, longest = {}, 0.0
        for name, call in calls.items():
            seconds = self._timed(call)
            if seconds < LONG_CALL:
                seconds = min(seconds, self._timed(call), self._timed(call))
            repeats[name] = max(1, ceil(SHORTEST_SAMPLE / max(seconds, 1e-7)))
            longest = max(longest, repeats[name] * seconds)
        fewest = budget.rounds if longest < LONG_CALL else ROUNDS_OF_LONG_CALLS
        n_rounds = max(fewest, min(MOST_ROUNDS, int(budget.seconds / max(longest, 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(n_rounds):
            for name, call in calls.items():
                samples[name].append(self._sample(call, repeats[name], WARM_UP.get(name, 0.0)))
        return samples

    def _sample(self, call: Callable[[], object], repeats: int, warm_up: float) -> float:
        """Seconds of one call, from the first sample with quiet regions before and after it."""
        while True:
            if self._quiet():
                if repeats > 1:
                    call()  # untimed: the provider before it has left its own data in the caches
                start = self.now()
                while self.now() - start < warm_up:
                    call()
                seconds = self._timed(call, repeats) / repeats
                if self._quiet():
                    self.kept += 1
                    return seconds
            self.discarded += 1
            if self.discarded > PATIENCE + self.kept:
                raise MachineBusyError(f"{self.discarded} samples were disturbed, {self.kept} were not; few are normal")

    def _quiet(self) -> bool:
        start = self.now()
        while self._timed(self.region) > self.limit:
            if self.now() - start > WAKING:
                return False
        return all(self._timed(self.region) <= self.limit for _ in range(CHECKED))

    def _timed(self, call: Callable[[], object], repeats: int = 1) -> float:
        start = self.now()
        for _ in range(repeats):
            call()
        return self.now() - start


class GpuTimer:
    """Takes samples on a GPU."""

    def __init__(self, device: str = "cuda") -> None:
        self.discarded = 0
        self.late: Counter[str] = Counter()  # samples of each provider since the last rounds() began
        self.launching: dict[str, float] = {}  # the longest seconds that each provider's call took in Python
        self.device = device
        self.scratch = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device=device)

    def rounds(self, calls: Calls, budget: Budget = ON_GPU) -> dict[str, list[float]]:
        """As `Timer.rounds`."""
        self.launching.clear()
        longest = max(self._round(calls).values())
        self.late.clear()
        n_rounds = max(budget.rounds, min(MOST_ROUNDS, int(budget.seconds / max(longest, 1e-9))))
        taken = [self._round(calls) for _ in range(n_rounds)]
        return {name: [seconds[name] for seconds in taken] for name in calls}

    def copy_bandwidth(self) -> float:
        """Bytes read and written in a second by a device-to-device copy of a gigabyte."""
        source = torch.zeros(COPY_BYTES, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        return 2 * source.nbytes / statistics.median(self.rounds({"copy": lambda: target.copy_(source)})["copy"])

    def _round(self, calls: Calls) -> dict[str, float]:
        marks = {name: self._sample(name, call) for name, call in calls.items()}
        torch.cuda.synchronize()
        return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in marks.items()}

    def _sample(self, name: str, call: Callable[[], object]) -> tuple[Any, Any]:
        self.scratch.sum()
        idle = min(MOST_IDLE, max(LEAST_IDLE, 2 * self.launching.get(name, 0.0)))
        torch.cuda._sleep(int(idle * CYCLES_A_SECOND))
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        began = time.perf_counter()
        call()
        end.record()
        self.launching[name] = max(self.launching.get(name, 0.0), time.perf_counter() - began)
        self.late[name] += start.query()
        return start, end
