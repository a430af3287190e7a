"""Interleaved samples A B C A B C … on a GPU, timed by events, each after the L2 cache was flushed.

The flush is a write of a gigabyte; behind it the GPU idles for twice as long as Python has needed to launch the call's
kernels, at most 20 ms: they wait in the queue, and the time between the two events is the GPU's alone, as it is in the
middle of a training step. A sample whose kernels were not all in the queue by then is late: it may hold time that the
GPU waited for Python. Late samples are counted. On the CPU, for a dry run, a sample is a plain difference of times.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench.clock import Budget

FLUSH_BYTES = 1 << 30
COPY_BYTES = 1 << 30
MOST_ROUNDS = 50
CYCLES_A_SECOND = 3_000_000_000  # of the idling; no GPU that we build for has a faster clock
LEAST_IDLE, MOST_IDLE = 2e-4, 2e-2  # seconds
BUDGET = Budget(0.25, 10)
DRY_RUN = Budget(0.0, 2)


class GpuClock:
    def __init__(self, device: str) -> None:
        self.device = device
        self.on_gpu = device != "cpu"
        self.budget = BUDGET if self.on_gpu else DRY_RUN
        self.late: Counter[str] = Counter()  # samples of each contender since the last rounds() began
        self.launching: dict[str, float] = {}  # the longest seconds that each contender's call took in Python so far
        self.scratch = torch.empty(FLUSH_BYTES if self.on_gpu else 1, dtype=torch.int8, device=device)

    def rounds(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
        """Seconds of each contender's calls, of one round at equal index. Each has been called before."""
        self.launching.clear()
        longest = max(self._round(contenders).values())
        self.late.clear()
        n_rounds = max(self.budget.rounds, min(MOST_ROUNDS, int(self.budget.seconds / max(longest, 1e-9))))
        taken = [self._round(contenders) for _ in range(n_rounds)]
        return {name: [seconds[name] for seconds in taken] for name in contenders}

    def copy_bandwidth(self) -> float:
        """Bytes read and written in a second by a device-to-device copy of a gigabyte."""
        source = torch.zeros(COPY_BYTES if self.on_gpu else 1 << 20, dtype=torch.int8, device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        return 2 * source.nbytes / statistics.median(self.rounds({"copy": lambda: target.copy_(source)})["copy"])

    def _round(self, contenders: Mapping[str, Callable[[], object]]) -> dict[str, float]:
        marks = {name: self._sample(name, call) for name, call in contenders.items()}
        if self.on_gpu:
            torch.cuda.synchronize()
            return {name: start.elapsed_time(end) / 1e3 for name, (start, end) in marks.items()}
        return {name: end - start for name, (start, end) in marks.items()}

    def _sample(self, name: str, call: Callable[[], object]) -> tuple[Any, Any]:
        self.scratch.zero_()
        if self.on_gpu:
            idle = min(MOST_IDLE, max(LEAST_IDLE, 2 * self.launching.get(name, 0.0)))
            torch.cuda._sleep(int(idle * CYCLES_A_SECOND))
        start, began = self._mark(), time.perf_counter()
        call()
        end = self._mark()
        self.launching[name] = max(self.launching.get(name, 0.0), time.perf_counter() - began)
        self.late[name] += self.on_gpu and start.query()
        return start, end

    def _mark(self) -> Any:
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
