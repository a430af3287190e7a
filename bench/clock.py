"""Interleaved samples A B C A B C …, each with a quiet machine before and after it.

One competing process makes parallel regions wait for a core, some eight milliseconds each: figures then mean nothing.
So empty parallel regions are timed around each sample. Where one takes longer than a millisecond and ten times what it
takes on the quiet machine, the sample is discarded and repeated; where that happens too often, or the region is slow
from the start, the machine is `Busy` and nothing is reported.

torch's threads spin for some milliseconds after a region, then sleep. Waking them takes long too, several milliseconds
if the scheduler puts two of them on one core. So regions first run until one is fast, and only those after it are
judged: else each sample of a contender that leaves torch's threads alone (JAX, a serial backward) would be discarded.

All contenders of a case are sampled in turn, so that a ratio can be taken within each round and drift of the machine's
speed cancels out.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from math import ceil
from typing import NamedTuple

import numpy as np
import torch

SHORTEST_SAMPLE = 2e-3  # seconds: shorter calls are repeated within a sample
LONG_CALL, ROUNDS_OF_LONG_CALLS = 2.0, 3  # seconds: what the machine does meanwhile is a small part of such calls
DISTURBED = 1e-3  # seconds of the empty parallel region
WAKING = 0.05  # seconds that torch's threads may take to be back
CHECKED = 3  # regions in a row that have to be fast then
PATIENCE = 100  # samples that may be discarded before half of all may not
CALIBRATION = 50  # regions timed to learn what quiet is
MOST_ROUNDS = 60
# Seconds of untimed calls before a sample of contenders with threads of their own: theirs wake up, torch's fall asleep.
WARM_UP = {"jax": 0.02}


class Busy(RuntimeError):
    """Something else is using the cores."""


class Budget(NamedTuple):
    """seconds: of samples for each contender, at most, once it has `rounds` samples."""

    seconds: float = 3.0
    rounds: int = 7


QUICK = Budget(0.25, 5)


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


class EmptyRegion:
    """One parallel region of torch's, one small piece for each thread, and nothing to do in it."""

    def __init__(self) -> None:
        # A fill is cut into pieces of 32768 elements at least.
        self.tensor = torch.empty(32768 * torch.get_num_threads())

    def __call__(self) -> None:
        self.tensor.fill_(0.0)


class Clock:
    """Takes samples for as many threads as torch has when it is made.

    region and now can be replaced, to test it without a machine.
    """

    def __init__(
        self,
        region: Callable[[], object] | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.region = region or EmptyRegion()
        self.now = now
        self.kept = self.discarded = 0  # samples of the rounds that are being taken
        self.limit = DISTURBED
        self._calibrate()

    def _calibrate(self) -> None:
        self.region()
        quiet = statistics.median(self._timed(self.region) for _ in range(CALIBRATION))
        if quiet > DISTURBED:
            raise Busy(f"an empty parallel region takes {1e3 * quiet:.1f} ms")
        self.limit = max(DISTURBED, 10 * quiet)

    def rounds(self, contenders: Mapping[str, Callable[[], object]], budget: Budget) -> dict[str, list[float]]:
        """Samples of each contender, seconds a call, of one round at equal index. Each has been called before."""
        self.kept = self.discarded = 0
        repeats, longest = {}, 0.0
        for name, call in contenders.items():
            seconds = self._timed(call)
            if seconds < LONG_CALL:
                seconds = min(seconds, self._timed(call), self._timed(call))
            repeats[name] = max(1, ceil(SHORTEST_SAMPLE / max(seconds, 1e-7)))
            longest = max(longest, repeats[name] * seconds)
        fewest = budget.rounds if longest < LONG_CALL else ROUNDS_OF_LONG_CALLS
        n_rounds = max(fewest, min(MOST_ROUNDS, int(budget.seconds / max(longest, 1e-9))))
        samples: dict[str, list[float]] = {name: [] for name in contenders}
        for _ in range(n_rounds):
            for name, call in contenders.items():
                samples[name].append(self._sample(call, repeats[name], WARM_UP.get(name, 0.0)))
        return samples

    def _sample(self, call: Callable[[], object], repeats: int, warm_up: float) -> float:
        """Seconds of one call, from the first sample with quiet regions before and after it."""
        while True:
            if self._quiet():
                if repeats > 1:
                    call()  # untimed: the contender before it has left its own data in the caches
                start = self.now()
                while self.now() - start < warm_up:
                    call()
                seconds = self._timed(call, repeats) / repeats
                if self._quiet():
                    self.kept += 1
                    return seconds
            self.discarded += 1
            if self.discarded > PATIENCE + self.kept:
                raise Busy(f"{self.discarded} samples were disturbed, {self.kept} were not")

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
