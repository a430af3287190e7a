"""One case, from its tensors to its entry in a record: check, warm-up, interleaved samples, ratios, memory, goals."""

from __future__ import annotations

import gc
import json
import operator
import os
import statistics
import tempfile
from collections.abc import Callable, Collection
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bench.cases import LOWER_BOUNDS, PEERS, Case
from bench.ops import make_workload, without_memory
from bench.ops.cross_entropy import INPLACE
from bench.providers import Call, Workload
from bench.timer import Budget, GpuTimer, Timer, Timing, paired_ratio

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler writes two lines to stderr for each run below that


def measure(
    case: Case, timer: Timer | GpuTimer, budget: Budget, device: str = "cpu", without: Collection[str] = ()
) -> dict[str, Any]:
    """Measures a case without some providers, and returns its entry in a record:

    name, op, variant, shape, dtype
    bytes:     the least that any implementation moves: each input read once, each output written once
    times:     of each provider; None for one that could not take part, whose reason `absent` holds
    figures:   the ratios that bench/cases.py explains
    goals:     with the figure that was measured; reached is None where there is no figure
    memory:    peak bytes beyond inputs of one call, of charlm and torch eager
    discarded: samples that were disturbed, and repeated
    late:      on a GPU, samples of each provider that may hold time in which the GPU waited for Python
    error:     why charlm is wrong: then nothing was timed
    """
    gc.collect()  # the case before may have left cycles that hold its tensors
    workload = make_workload(case, device)
    entry: dict[str, Any] = {"name": case.name, **asdict(case), "bytes": without_memory(case).minimal_bytes()}
    entry |= {"goals": [], "times": {}, "figures": {}, "memory": {}, "absent": {}, "discarded": 0, "late": {}}
    entry["error"] = why_wrong(workload)
    if entry["error"] is not None:
        return entry

    names = [name for name in workload.providers() if name not in without]
    calls: dict[str, Call] = {}
    for name in names:
        ready = warm(lambda name=name: workload.build(name))
        if isinstance(ready, str):
            entry["absent"][name] = ready
        else:
            calls[name] = ready
    samples = timer.rounds(calls, budget)
    peaks = {name: peak_bytes(calls[name], device) for name in ("ours", "eager") if name in calls}
    returned = 0 if case.variant in INPLACE else sum(tensor.nbytes for tensor in calls["ours"]())
    extra = peaks["ours"] - returned
    figures = {**ratios(samples), "bytes_per_row": extra / case.shape[0], "extra_mb": extra / 1e6}
    if "copy" in samples and device == "cuda":
        copied = 2 * sum(tensor.nbytes for tensor in workload.copied)
        figures["copy_bandwidth"] = entry["bytes"] / copied / figures.pop("copy")
        figures["over_copy_us"] = 1e6 * statistics.median(map(operator.sub, samples["ours"], samples["copy"]))
    figures["ms"] = 1e3 * statistics.median(samples["ours"])
    goals = [
        {**asdict(goal), "measured": figures.get(goal.figure), "reached": goal.reached(figures.get(goal.figure))}
        for goal in case.goals
    ]
    times = {name: Timing.of(samples[name])._asdict() if name in samples else None for name in names}
    late = {name: count for name, count in timer.late.items() if count}
    return entry | {
        "goals": goals,
        "times": times,
        "figures": figures,
        "memory": peaks,
        "discarded": timer.discarded,
        "late": late,
    }


def why_wrong(workload: Workload) -> str | None:
    """The error of one call of charlm's, against float64 or raised; None if there is none."""
    try:
        workload.check(workload.build("ours")())
    except Exception as error:
        return first_line(error)
    return None


def first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def warm(build: Callable[[], Call]) -> Call | str:
    """Ready to be timed: compiled, its memory touched. Or the reason why it cannot take part."""
    try:
        call = build()
        call()
    except Exception as reason:
        return first_line(reason)
    return call


def ratios(samples: dict[str, list[float]]) -> dict[str, float]:
    """The figures that bench/cases.py explains, as far as their providers took part."""
    ours = samples["ours"]
    figures = {name: paired_ratio(ours, samples[name]) for name in LOWER_BOUNDS if name in samples}
    peers = {name: paired_ratio(samples[name], ours) for name in PEERS if name in samples}
    figures |= peers
    if peers:
        figures["best_peer"] = peers[min(peers, key=lambda name: Timing.of(samples[name]).median)]
    return figures


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most that torch's allocator has given out at once during the call; tensors made before do not count.

    On a CPU, what a kernel keeps on its threads' stacks or takes from malloc itself is not seen.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = call()
        torch.cuda.synchronize()
        del result  # alive until here, as an output is
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    del result
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak
