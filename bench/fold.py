"""embedding_linear, folded and gathered, against the number of contexts N: where does the table begin to pay?

Forward and backward, float32, at the sizes of docs/skip_the_matmul.md, whose table and plot are made here.
"""

from __future__ import annotations

from collections.abc import Callable
from math import exp, log
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.clock import QUICK, Budget, Clock, Timing
from bench.measure import WrongResult
from bench.units import duration
from charlm import functional

T, D, H = 8, 24, 200
VOCABULARIES = (27, 256)
ROWS = tuple(4**k for k in range(8))  # N: 1 … 16384
QUICK_ROWS = ROWS[:4]
BUDGET = Budget(2.0, 15)
MOST_ERROR = 1e-5  # of a result, against float64, in the norm: sums of 131072 terms; tests/ judge each number of it
PLANS = ("folded", "gathered", "auto")
LABELS = {"folded": 'plan="folded"', "gathered": 'plan="gathered"', "auto": 'plan="auto"', "torch": "torch eager"}

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def measure(quick: bool) -> list[dict[str, Any]]:
    """For each V: N, the median seconds of each line at each N, where lines cross and where "auto" changes its plan."""
    clock, rows = Clock(), QUICK_ROWS if quick else ROWS
    panels = []
    for vocabulary in VOCABULARIES:
        points = [_point(n, vocabulary, clock, QUICK if quick else BUDGET) for n in rows]
        seconds = {name: [point[name] for point in points] for name in points[0]}
        panels.append(
            {
                "vocabulary": vocabulary,
                "rows": list(rows),
                "seconds": seconds,
                "break_even": break_even(rows, seconds["folded"], seconds["gathered"]),
                "auto_folds_from": auto_folds_from(vocabulary, rows[-1]),
            }
        )
    return panels


def _inputs(n: int, vocabulary: int) -> tuple[Tensor, Inputs]:
    """Tokens (N, T); C (V, D), W (H, T * D), b (H), the gradient of the output (N, H)."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (n, T), generator=generator)
    shapes = ((vocabulary, D), (H, T * D), (H,), (n, H))
    embedding, weight, bias, gradient = (torch.randn(shape, generator=generator) for shape in shapes)
    weight *= (T * D) ** -0.5
    return tokens, (embedding, weight, bias, gradient)


def _call(plan: str, tokens: Tensor, inputs: Inputs) -> Callable[[], tuple[Tensor, ...]]:
    """Makes the output and the gradients of C, W and b; plan "torch" by torch's own ops."""
    embedding, weight, bias = (tensor.detach().requires_grad_() for tensor in inputs[:3])

    def call() -> tuple[Tensor, ...]:
        if plan == "torch":
            rows = torch.nn.functional.embedding(tokens, embedding).flatten(-2)  # (N, T * D)
            output = torch.tanh(torch.nn.functional.linear(rows, weight, bias))
        else:
            output = functional.embedding_linear(tokens, embedding, weight, bias, activation="tanh", plan=plan)
        return output.detach(), *torch.autograd.grad(output, (embedding, weight, bias), inputs[3])

    return call


def _point(n: int, vocabulary: int, clock: Clock, budget: Budget) -> dict[str, float]:
    """Median seconds of each line, once ours are right."""
    tokens, inputs = _inputs(n, vocabulary)
    calls = {plan: _call(plan, tokens, inputs) for plan in (*PLANS, "torch")}
    exact = _call("torch", tokens, tuple(tensor.double() for tensor in inputs))()
    for plan in PLANS:
        for what, ours, right in zip(("output", "C.grad", "W.grad", "b.grad"), calls[plan](), exact, strict=True):
            error = ((ours - right).norm() / right.norm()).item()
            if not error <= MOST_ERROR:
                raise WrongResult(
                    f'plan "{plan}", N = {n}, V = {vocabulary}: WRONG: {what}: relative error {error:.1e}'
                )
    return {name: Timing.of(samples).median for name, samples in clock.rounds(calls, budget).items()}


def break_even(rows: tuple[int, ...], folded: list[float], gathered: list[float]) -> float | None:
    """N from which on folded is faster: between two N that were measured, straight in log N and the ratio's log."""
    lead = [log(b / a) for a, b in zip(folded, gathered, strict=True)]  # > 0: folded is faster
    first = len(lead)
    while first > 0 and lead[first - 1] > 0:
        first -= 1
    if first in (0, len(lead)):
        return float(rows[0]) if first == 0 else None
    share = -lead[first - 1] / (lead[first] - lead[first - 1])
    return exp(log(rows[first - 1]) + share * log(rows[first] / rows[first - 1]))


def auto_folds_from(vocabulary: int, most: int) -> dict[str, int | None]:
    """The least N up to `most` at which plan "auto" is folded, in the forward and in the backward."""

    def folds(n: int, which: str) -> bool:
        tokens, inputs = _inputs(n, vocabulary)
        output = functional.embedding_linear(tokens, *inputs[:3], activation="tanh", return_plan=True)
        return getattr(output, which) == "folded"

    return {name: _least(most, lambda n, which=which: folds(n, which)) for name, which in _WHICH.items()}


_WHICH = {"forward": "plan", "backward": "backward_plan"}


def _least(most: int, holds: Callable[[int], bool]) -> int | None:
    """The least of 1 … most for which it holds, if it holds for all above that one."""
    if not holds(most):
        return None
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def document_table(record: dict[str, Any]) -> str:
    """What docs/skip_the_matmul.md says of a record, in Markdown."""
    panels = record["fold"]
    most = panels[0]["rows"][-1]
    lines = [
        f"| V | break-even, measured | `auto` folds from: forward, backward | N = {most}: folded | gathered | torch |",
        "|---|---|---|---|---|---|",
    ]
    for panel in panels:
        last = [duration(panel["seconds"][name][-1]) for name in ("folded", "gathered", "torch")]
        auto = panel["auto_folds_from"]
        plans = ", ".join(_row_count(auto[name]) for name in _WHICH)
        lines.append(f"| {panel['vocabulary']} | {_row_count(panel['break_even'])} | {plans} | {' | '.join(last)} |")
    made = record["header"]
    lines += [
        "",
        f"({made['processor']}, {made['threads']} threads, {made['instruction_set']}, torch {made['torch']}.)",
    ]
    return "\n".join(lines)


def _row_count(n: float | None) -> str:
    return "never" if n is None else f"N = {n:.0f}"


def draw(panels: list[dict[str, Any]], path: Path) -> None:
    """Writes the plot; the suffix of the path says in which format. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        for name, seconds in panel["seconds"].items():
            style = {"linestyle": "--", "color": "black"} if name == "auto" else {"marker": "o", "markersize": 3}
            axis.loglog(panel["rows"], [1e6 * value for value in seconds], label=LABELS[name], **style)
        axis.set_xscale("log", base=4)
        axis.set_xticks(panel["rows"], labels=panel["rows"])
        if panel["break_even"] is not None:
            label = f"measured break-even, {_row_count(panel['break_even'])}"
            axis.axvline(panel["break_even"], color="tab:red", linewidth=1, label=label)
        for n in sorted({n for n in panel["auto_folds_from"].values() if n is not None}):
            passes = " and ".join(name for name, least in panel["auto_folds_from"].items() if least == n)
            label = f"auto folds {passes} from {_row_count(n)}"
            axis.axvline(n, color="gray", linewidth=1, linestyle="--", label=label)
        axis.set(xlabel="contexts N", ylabel="µs", title=f"V = {panel['vocabulary']}")
        axis.grid(visible=True, which="major", linewidth=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(f"embedding_linear with tanh, forward and backward, float32, T {T}, D {D}, H {H}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
