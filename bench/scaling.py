"""How time grows with N, with V and with the threads: three panels, log-log, each with the floor as a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from bench import contenders
from bench.cases import Case
from bench.clock import QUICK, Budget, Clock, Timing
from bench.inputs import make_inputs
from bench.jax_runtime import cores
from bench.measure import WrongResult, why_wrong

FLOOR = "scale"
CONTENDERS = ("eager", FLOOR)
BUDGET = Budget(0.5, 7)
# Ours by the label of its line: a new gradient, and the gradient in the logits' memory.
OURS = {"ours": "default", "ours in place": "inplace_forward"}
SWEEPS: dict[str, list[tuple[int, int]]] = {
    "N, at V = 27": [(4**k, 27) for k in range(10)],
    "N, at V = 256": [(4**k, 256) for k in range(9)],
    "V, at N = 256": [(256, 2**k) for k in range(1, 18, 2)],
}
THREADS_SHAPE, QUICK_THREADS_SHAPE = (65536, 256), (4096, 256)
QUICK_ELEMENTS = 1 << 20


def measure(quick: bool) -> list[dict[str, Any]]:
    """One dict for each panel: its title, the values of x, and the seconds of each line at each of them."""
    budget = QUICK if quick else BUDGET
    clock = Clock()
    panels = []
    for title, shapes in SWEEPS.items():
        kept = [shape for shape in shapes if not quick or shape[0] * shape[1] <= QUICK_ELEMENTS]
        varying = 0 if title.startswith("N") else 1
        points = [_point(shape, clock, budget) for shape in kept]
        panels.append(_panel(title, [shape[varying] for shape in kept], points))

    shape, found = QUICK_THREADS_SHAPE if quick else THREADS_SHAPE, torch.get_num_threads()
    counts, points = range(1, cores() + 1), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            points.append(_point(shape, Clock(), budget))
    finally:
        torch.set_num_threads(found)
    return [*panels, _panel(f"threads, at {shape[0]} × {shape[1]}", list(counts), points)]


def _point(shape: tuple[int, int], clock: Clock, budget: Budget) -> dict[str, float]:
    """Median seconds of each line at one shape."""
    calls = {}
    for label, variant in OURS.items():
        case = Case("cross_entropy", variant, shape)
        inputs = make_inputs(case)
        calls[label] = contenders.build("ours", case, inputs)
        error = why_wrong(case, inputs, calls[label])
        if error is not None:
            raise WrongResult(f"{case.name}: WRONG: {error}")
    for name in CONTENDERS:
        calls[name] = contenders.build(name, case, inputs)
    return {name: Timing.of(samples).median for name, samples in clock.rounds(calls, budget).items()}


def _panel(title: str, x: list[int], points: list[dict[str, float]]) -> dict[str, Any]:
    return {"title": title, "x": x, "seconds": {name: [point[name] for point in points] for name in points[0]}}


def draw(panels: list[dict[str, Any]], path: Path) -> None:
    """Writes the plot; the suffix of the path says in which format. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5 * len(panels), 4.2), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        for name, seconds in panel["seconds"].items():
            floor = name == FLOOR
            label = "floor: one in-place scaling" if floor else "torch eager" if name == "eager" else name
            style = {"linestyle": "--", "color": "black"} if floor else {"marker": "o", "markersize": 3}
            axis.loglog(panel["x"], seconds, label=label, **style)
        axis.set_xscale("log", base=2)
        name, _, fixed = panel["title"].partition(", ")
        axis.set(xlabel=name, title=fixed, ylabel="seconds")
        axis.grid(visible=True, which="major", linewidth=0.3)
    axes[0].legend()
    figure.suptitle("cross_entropy, loss and gradient, float32")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
