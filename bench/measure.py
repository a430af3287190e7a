"""One case, from its inputs to its `Result`: check, memory, warm-up, interleaved samples, figures, goals."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from statistics import median

from bench import check, contenders, memory
from bench.cases import FLOORS, Case, Goal
from bench.clock import Budget, Clock, Timing, paired_ratio
from bench.contenders import PEERS, Call
from bench.inputs import CrossEntropyInputs, EmbeddingInputs, item_size, main_elements, make_inputs, minimal_bytes
from bench.layers import LAYERS


@dataclass(frozen=True)
class Result:
    """What was measured of a case.

    times:     of each contender; None for one that could not take part, whose reason `absent` holds.
    figures:   the ratios that bench/cases.py explains; None where a contender is missing.
    memory:    peak bytes beyond inputs of one call, ours and torch eager's.
    bytes:     the least that any implementation moves: each input read once, each output written once.
    discarded: samples that were disturbed, and repeated.
    error:     why ours is wrong: then nothing was timed.
    """

    case: Case
    bytes: int
    times: dict[str, Timing | None] = field(default_factory=dict)
    figures: dict[str, float | None] = field(default_factory=dict)
    memory: dict[str, int] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)
    discarded: int = 0
    error: str | None = None

    def goals(self) -> list[tuple[Goal, bool | None]]:
        """Each goal, and whether it is reached; None where that is unproven."""
        return [(goal, self._reached(goal)) for goal in self.case.goals]

    def _reached(self, goal: Goal) -> bool | None:
        if goal.figure == "threads" and (self.figures.get("scale_threads") or 0) < goal.value:
            return None  # the memory itself gains less from the second core
        return goal.reached(self.figures.get(goal.figure))


def measure(case: Case, clock: Clock, budget: Budget, without: Collection[str] = ()) -> Result:
    """without: contenders that are left out."""
    gc.collect()  # the case before may have left cycles that hold its tensors
    inputs = make_inputs(case)
    ours = contenders.build("ours", case, inputs)
    error = why_wrong(case, inputs, ours)
    if error is not None:
        return Result(case, minimal_bytes(case), error=error)

    calls: dict[str, Call] = {"ours": ours}
    absent: dict[str, str] = {}
    names = [name for name in contenders.names(case) if name not in without]
    for name in names[1:]:
        call = warm(lambda name=name: contenders.build(name, case, inputs))
        if isinstance(call, str):
            absent[name] = call
        else:
            calls[name] = call
    samples = clock.rounds(calls, budget)
    peaks = {name: memory.peak_bytes(calls[name]) for name in ("ours", "eager") if name in calls}
    extra = peaks["ours"] - output_bytes(case)
    return Result(
        case,
        minimal_bytes(case),
        {name: Timing.of(samples[name]) if name in samples else None for name in names},
        {**_figures(samples), "bytes_per_row": extra / case.shape[0], "extra_mb": extra / 1e6},
        peaks,
        absent,
        clock.discarded,
    )


class WrongResult(ArithmeticError):
    """Ours does not agree with float64: there is nothing to time."""


def why_wrong(case: Case, inputs: CrossEntropyInputs | EmbeddingInputs, ours: Call) -> str | None:
    """The error of one call of ours, against float64 or raised; None if there is none."""
    try:
        result = ours()
    except Exception as raised:
        return _first_line(raised)
    return check.error(case, inputs, result)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def warm(build: Callable[[], Call]) -> Call | str:
    """Ready to be timed: compiled, jitted, its memory touched. Or why it cannot take part: a dash in its column."""
    try:
        call = build()
        call()
    except Exception as reason:
        return _first_line(reason)
    return call


def _figures(samples: dict[str, list[float]]) -> dict[str, float | None]:
    ours = samples["ours"]
    figures: dict[str, float | None] = {
        **{name: paired_ratio(ours, samples[name]) for name in FLOORS if name in samples},
        **{name: paired_ratio(samples[name], ours) for name in PEERS if name in samples},
    }
    peers = [name for name in PEERS if name in samples]
    if peers:
        figures["best_peer"] = figures[min(peers, key=lambda name: Timing.of(samples[name]).median)]
    if "noop" in samples and "eager" in samples:
        above, torchs = (_median_difference(samples[name], samples["noop"]) for name in ("ours", "eager"))
        # A difference of two medians may be noise around nothing: then there is no figure.
        figures["noop"] = above / torchs if torchs > 0 else None
    for name in ("float32", "int64"):
        if f"ours_{name}" in samples:
            figures[name] = paired_ratio(samples[f"ours_{name}"], ours)
    if "ours_1_thread" in samples and "scale_1_thread" in samples:
        figures["threads"] = paired_ratio(samples["ours_1_thread"], ours)
        figures["scale_threads"] = paired_ratio(samples["scale_1_thread"], samples["scale"])
    return figures


def _median_difference(samples: list[float], others: list[float]) -> float:
    return median(a - b for a, b in zip(samples, others, strict=True))


def output_bytes(case: Case) -> int:
    """Of the gradient or the output that a call returns in memory of its own."""
    if case.op in LAYERS:
        return LAYERS[case.op].output_bytes(case)
    if case.variant in (*contenders.INPLACE, "forward_only"):
        return 0
    elements = case.shape[1] * case.shape[2] if case.op == "embedding_backward" else main_elements(case)
    return elements * item_size(case)
