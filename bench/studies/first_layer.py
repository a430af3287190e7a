"""Two questions about embedding_linear with tanh, float32, whose plan is "folded" (a table) or "gathered" (a product).

    python -m bench.studies.first_layer break-even    from how many contexts N on does the table pay?
    python -m bench.studies.first_layer regret        how much longer does the chosen plan take than the better one?

The first is measured forward and backward together, against torch too; bench/results/skip_the_matmul.json holds it, and
docs/skip_the_matmul.md shows its table and its plot (--plot). The second is measured for each pass on a grid of 144
sizes; bench/results/plans.json holds it. Its exit code is 1 where a choice takes over 10 % longer, measured twice.
--show prints the result of a record instead of measuring.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from itertools import product
from math import exp, log
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench import record
from bench.report import duration
from bench.timer import Budget, Timer, Timing, WrongResult, exit_codes, paired_ratio
from charlm import functional

PLANS = ("folded", "gathered")
MOST_ERROR = 1e-5  # of a result, in the norm: sums of up to 131072 terms; tests/ judge each number of it

T, D, H = 8, 24, 200
VOCABULARIES = (27, 256)
ROWS = tuple(4**k for k in range(8))  # N: 1 … 16384
BUDGET = Budget(2.0, 15)
LINES = {"folded": 'plan="folded"', "gathered": 'plan="gathered"', "auto": 'plan="auto"', "torch": "torch eager"}
PASSES = {"forward": "plan", "backward": "backward_plan"}  # and the attribute that names its plan

GRID_ROWS = (8, 32, 128, 512, 2048, 8192)
GRID_VOCABULARIES = (27, 256, 4096)
GRID_LAYERS = ((3, 10, 200), (8, 24, 200), (8, 32, 256), (16, 64, 512))  # T, D, H
GRID_BUDGET, LONGER = Budget(0.2, 9), Budget(1.0, 31)
MOST_REGRET = 0.1


class Layer(NamedTuple):
    """tokens: (N, T). parameters: C (V, D), W (H, T * D), b (H), as leaves. cotangent: (N, H)."""

    tokens: Tensor
    parameters: list[Tensor]
    cotangent: Tensor

    def output(self, plan: str, **options: bool) -> Any:
        if plan == "torch":
            embedding, weight, bias = self.parameters
            rows = torch.nn.functional.embedding(self.tokens, embedding).flatten(-2)  # (N, T * D)
            return torch.tanh(torch.nn.functional.linear(rows, weight, bias))
        return functional.embedding_linear(self.tokens, *self.parameters, activation="tanh", plan=plan, **options)

    def gradients(self, output: Tensor, **options: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, self.parameters, self.cotangent, **options)

    def call(self, plan: str) -> tuple[Tensor, ...]:
        output = self.output(plan)
        return output.detach(), *self.gradients(output)


def make_layer(n: int, t: int, d: int, h: int, vocabulary: int, dtype: torch.dtype = torch.float32) -> Layer:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (n, t), generator=generator)
    shapes = ((vocabulary, d), (h, t * d), (h,), (n, h))
    *parameters, cotangent = (torch.randn(shape, generator=generator) for shape in shapes)
    parameters[1] *= (t * d) ** -0.5
    return Layer(tokens, [p.to(dtype).requires_grad_() for p in parameters], cotangent.to(dtype))


def assert_same(results: tuple[Tensor, ...], expected: tuple[Tensor, ...], what: str) -> None:
    for label, one, right in zip(("output", "C.grad", "W.grad", "b.grad"), results, expected, strict=True):
        error = ((one - right).norm() / right.norm()).item()
        if not error <= MOST_ERROR:
            raise WrongResult(f"{what}: WRONG: {label}: relative error {error:.1e}")


def measure_break_even() -> list[dict[str, Any]]:
    """For each V: N, the median seconds of each line at each N, where lines cross and where "auto" changes its plan."""
    timer, panels = Timer(), []
    for vocabulary in VOCABULARIES:
        points = [_point(n, vocabulary, timer) for n in ROWS]
        seconds = {name: [point[name] for point in points] for name in LINES}
        panels.append(
            {
                "vocabulary": vocabulary,
                "rows": list(ROWS),
                "seconds": seconds,
                "break_even": break_even(ROWS, seconds["folded"], seconds["gathered"]),
                "auto_folds_from": auto_folds_from(vocabulary, ROWS[-1]),
            }
        )
    return panels


def _point(n: int, vocabulary: int, timer: Timer) -> dict[str, float]:
    layer = make_layer(n, T, D, H, vocabulary)
    exact = make_layer(n, T, D, H, vocabulary, torch.float64).call("torch")
    for plan in (*PLANS, "auto"):
        assert_same(layer.call(plan), exact, f'plan "{plan}", N = {n}, V = {vocabulary}')
    calls = {name: lambda name=name: layer.call(name) for name in LINES}
    return {name: Timing.of(samples).median for name, samples in timer.rounds(calls, BUDGET).items()}


def break_even(rows: tuple[int, ...], folded: list[float], gathered: list[float]) -> float | None:
    """N from which on folded is faster; between two measured N, linear in log N and the logarithm of the ratio."""
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
        return getattr(make_layer(n, T, D, H, vocabulary).output("auto", return_plan=True), which) == "folded"

    def least(which: str) -> int | None:
        if not folds(most, which):
            return None
        low, high = 0, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if folds(middle, which) else (middle, high)
        return high

    return {name: least(which) for name, which in PASSES.items()}


def document_table(content: dict[str, Any]) -> str:
    """The table of docs/skip_the_matmul.md, in Markdown."""
    panels, made = content["fold"], content["header"]
    most = panels[0]["rows"][-1]
    lines = [
        f"| V | break-even, measured | `auto` folds from: forward, backward | N = {most}: folded | gathered | torch |",
        "|---|---|---|---|---|---|",
    ]
    for panel in panels:
        last = [duration(panel["seconds"][name][-1]) for name in ("folded", "gathered", "torch")]
        plans = ", ".join(_row_count(panel["auto_folds_from"][name]) for name in PASSES)
        lines.append(f"| {panel['vocabulary']} | {_row_count(panel['break_even'])} | {plans} | {' | '.join(last)} |")
    machine = f"{made['processor']}, {made['threads']} threads, {made['instruction_set']}, torch {made['torch']}"
    return "\n".join([*lines, "", f"({machine}.)"])


def _row_count(n: float | None) -> str:
    return "never" if n is None else f"N = {n:.0f}"


def draw(panels: list[dict[str, Any]], path: Path) -> None:
    """The suffix of the path says in which format. ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(panels), figsize=(5.5 * len(panels), 4.2), layout="constrained")
    for panel, axis in zip(panels, axes, strict=True):
        for name, seconds in panel["seconds"].items():
            style = {"linestyle": "--", "color": "black"} if name == "auto" else {"marker": "o", "markersize": 3}
            axis.loglog(panel["rows"], [1e6 * value for value in seconds], label=LINES[name], **style)
        axis.set_xscale("log", base=4)
        axis.set_xticks(panel["rows"], labels=panel["rows"])
        marks = [(panel["break_even"], "tab:red", "-", "measured break-even")]
        marks += [(n, "gray", "--", f"auto folds {name}") for name, n in panel["auto_folds_from"].items()]
        for n, color, style, label in marks:
            if n is not None:
                axis.axvline(n, color=color, linewidth=1, linestyle=style, label=f"{label} from {_row_count(n)}")
        axis.set(xlabel="contexts N", ylabel="µs", title=f"V = {panel['vocabulary']}")
        axis.grid(visible=True, which="major", linewidth=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(f"embedding_linear with tanh, forward and backward, float32, T {T}, D {D}, H {H}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def measure_regret() -> list[dict[str, Any]]:
    """For each size and pass: the plan chosen, the seconds of both, and the regret: how much longer the chosen one
    takes, as a share of the other's time."""
    timer, points = Timer(), []
    for n, vocabulary, (t, d, h) in product(GRID_ROWS, GRID_VOCABULARIES, GRID_LAYERS):
        layer = make_layer(n, t, d, h, vocabulary)
        assert_same(layer.call("folded"), layer.call("gathered"), f"N {n}, T {t}, D {d}, H {h}, V {vocabulary}")
        auto, outputs = layer.output("auto", return_plan=True), {plan: layer.output(plan) for plan in PLANS}
        passes = {"forward": layer.output, "backward": partial(_backward, layer, outputs)}
        for name, call in passes.items():
            calls = {plan: partial(call, plan) for plan in PLANS}
            plan = getattr(auto, PASSES[name])
            with torch.set_grad_enabled(name == "backward"):
                times = _times(plan, calls, timer, GRID_BUDGET)
                if times["regret"] > MOST_REGRET:
                    times = _times(plan, calls, timer, LONGER)
            points.append({"pass": name, "shape": [n, t, d, h, vocabulary], "plan": plan, **times})
    return points


def _backward(layer: Layer, outputs: dict[str, Tensor], plan: str) -> tuple[Tensor, ...]:
    return layer.gradients(outputs[plan], retain_graph=True)


def _times(chosen: str, calls: dict[str, Callable[[], Any]], timer: Timer, budget: Budget) -> dict[str, Any]:
    samples = timer.rounds(calls, budget)
    (other,) = set(PLANS) - {chosen}
    return {
        "seconds": {plan: Timing.of(samples[plan]).median for plan in PLANS},
        "regret": max(0.0, paired_ratio(samples[chosen], samples[other]) - 1),
    }


def bad_choices(points: list[dict[str, Any]]) -> list[str]:
    """A sentence for each choice that takes over 10 % longer than the other plan."""
    return [
        "{}, N {}, T {}, D {}, H {}, V {}: {} takes {:.0%} more".format(
            point["pass"], *point["shape"], point["plan"], point["regret"]
        )
        for point in points
        if point["regret"] > MOST_REGRET
    ]


def summary(points: list[dict[str, Any]]) -> str:
    best, bad = sum(point["regret"] == 0 for point in points), bad_choices(points)
    counts = (
        f"{len(points)} choices of a plan: {best} are the faster one, {len(points) - best - len(bad)} take up to "
        f"{MOST_REGRET:.0%} more than the other, {len(bad)} more than that"
    )
    return "\n".join([*bad, counts])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.studies.first_layer", description=__doc__.splitlines()[0])
    parser.add_argument("question", choices=("break-even", "regret"))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what was measured")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print this record instead of measuring")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the times of break-even (needs matplotlib)")
    given = parser.parse_args(arguments)
    part, measure = ("fold", measure_break_even) if given.question == "break-even" else ("plans", measure_regret)
    if given.show is not None:
        content = record.read(given.show)
    else:
        content = {"schema": record.SCHEMA, "header": record.header(), "cases": []}
        with exit_codes():
            content[part] = measure()
    if given.json is not None:
        record.write(given.json, content)
    if part == "fold":
        print(document_table(content))
        if given.plot is not None:
            draw(content["fold"], given.plot)
        return 0
    print(summary(content["plans"]))
    return int(bool(bad_choices(content["plans"])))


if __name__ == "__main__":
    raise SystemExit(main())
