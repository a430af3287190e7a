"""Is any shape slower than torch? Ours and torch eager on a grid of odd and round sizes in every dtype.

The figure is the median over rounds of torch's time / ours. A shape below ENOUGH is measured once more, with more
samples; where it stays below it is listed. Every shape is checked against float64 first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from bench import contenders
from bench.cases import DTYPES, BadRequest, Case
from bench.clock import Budget, Clock, paired_ratio
from bench.inputs import make_inputs
from bench.measure import why_wrong

ENOUGH = 0.95
FIRST, AGAIN = Budget(0.4, 5), Budget(1.5, 9)
TENSORS_AT_ONCE = 6

# (N, V): each in float32, every other one in a second dtype too, which goes round.
LOGITS = (
    *((1, v) for v in (1, 2, 3, 27, 256, 1000, 50257, 262144)),
    *((3, v) for v in (5, 129, 128256)),
    *((7, v) for v in (27, 513, 32000)),
    *((32, v) for v in (2, 27, 65, 256, 1023, 4099, 32000)),
    *((129, v) for v in (3, 27, 129, 1000, 8192)),
    *((512, v) for v in (27, 4097, 50257)),
    *((1000, v) for v in (2, 10, 27, 64, 65, 100, 1024, 32001)),
    *((4099, v) for v in (2, 5, 16, 27, 33, 255, 257, 5003)),
    *((16384, v) for v in (13, 31, 96, 1000)),
    *((65537, v) for v in (2, 7, 27, 65, 128, 1001)),
    *((262147, v) for v in (3, 27, 66)),
    *((1_000_000, v) for v in (2, 17, 27, 64)),
)
# Up to a gigabyte of logits, in one dtype each.
LARGEST = (
    ((1024, 262144), "float32"),
    ((4096, 32000), "float64"),
    ((8192, 50257), "bfloat16"),
    ((1_000_000, 256), "float32"),
    ((1_000_000, 500), "float16"),
)
EMBEDDINGS = ((1, 27, 10), (96, 27, 10), (33, 1000, 17), (4096, 65, 24), (32768, 256, 129), (8192, 50257, 768))


def shapes() -> Iterator[Case]:
    others = [dtype for dtype in DTYPES if dtype != "float32"]
    for i, shape in enumerate(LOGITS):
        yield Case("cross_entropy", "default", shape)
        if i % 2:
            yield Case("cross_entropy", "default", shape, others[i // 2 % len(others)])
    for shape, dtype in LARGEST:
        yield Case("cross_entropy", "default", shape, dtype)
    for shape in EMBEDDINGS:
        yield Case("embedding", "int64", shape)
        yield Case("embedding_backward", "default", shape)


def measure(say: Callable[[str], object], problem: Callable[[object], object]) -> list[dict[str, Any]]:
    """One dict for each shape: name, ratio, whether it was measured again, whether it is fast enough, error.

    say: takes a line for each shape as soon as it is measured. problem: takes what could not be run.
    """
    clock = Clock()
    points = []
    for case in shapes():
        try:
            point = _point(case, clock)
        except BadRequest as reason:
            problem(f"{case.name}: {reason}")
            continue
        points.append(point)
        again = ", measured twice" if point["again"] else ""
        say(f"{case.name}: " + ("WRONG" if point["error"] else f"{point['ratio']:.2f}× torch's speed{again}"))
    return points


def _point(case: Case, clock: Clock) -> dict[str, Any]:
    inputs = make_inputs(case, TENSORS_AT_ONCE)
    calls = {name: contenders.build(name, case, inputs) for name in ("ours", "eager")}
    error = why_wrong(case, inputs, calls["ours"])
    point = {"name": case.name, "ratio": None, "again": False, "reached": False, "error": error}
    if error is not None:
        return point
    for budget in (FIRST, AGAIN):
        samples = clock.rounds(calls, budget)
        point["ratio"] = paired_ratio(samples["eager"], samples["ours"])
        if point["ratio"] >= ENOUGH:
            return {**point, "reached": True, "again": budget is AGAIN}
    return {**point, "again": True}
