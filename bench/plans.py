"""The plan that embedding_linear chooses, on a grid of sizes: how much longer does it take than the better of the two?

Forward and backward are timed apart, for each has a plan of its own; float32, tanh. A choice that seems to be a bad one
is timed once more, for longer, and that figure stands.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.clock import Budget, Clock, Timing, paired_ratio
from bench.fold import MOST_ERROR
from bench.measure import WrongResult
from charlm import functional

ROWS = (8, 32, 128, 512, 2048, 8192)  # N
VOCABULARIES = (27, 256, 4096)
LAYERS = ((3, 10, 200), (8, 24, 200), (8, 32, 256), (16, 64, 512))  # T, D, H
QUICK_ROWS = ROWS[1:3]
BUDGET, LONGER = Budget(0.2, 9), Budget(1.0, 31)
MOST_REGRET = 0.1
PLANS = ("folded", "gathered")


class Choice(NamedTuple):
    """A pass of one size: the plan that "auto" chooses, and a call of each."""

    name: str  # "forward" or "backward"
    plan: str
    calls: dict[str, Callable[[], Any]]


def measure(quick: bool, progress: Callable[[str], None]) -> list[dict[str, Any]]:
    """For each size and pass: the plan chosen, the seconds of both, and the regret, which is how much longer the chosen
    one takes, as a share of the other's time."""
    clock, points = Clock(), []
    for n, vocabulary, (t, d, h) in product(QUICK_ROWS if quick else ROWS, VOCABULARIES, LAYERS):
        for choice in _choices(n, t, d, h, vocabulary):
            point = {"pass": choice.name, "shape": [n, t, d, h, vocabulary], "plan": choice.plan}
            point |= _times(choice, clock, BUDGET)
            if point["regret"] > MOST_REGRET:
                point |= _times(choice, clock, LONGER)
            points.append(point)
            if point["regret"] > MOST_REGRET:
                progress(describe(point))
    return points


def _times(choice: Choice, clock: Clock, budget: Budget) -> dict[str, Any]:
    samples = clock.rounds(choice.calls, budget)
    other = next(plan for plan in PLANS if plan != choice.plan)
    return {
        "seconds": {plan: Timing.of(samples[plan]).median for plan in PLANS},
        "regret": max(0.0, paired_ratio(samples[choice.plan], samples[other]) - 1),
    }


def _choices(n: int, t: int, d: int, h: int, vocabulary: int) -> Iterator[Choice]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (n, t), generator=generator)
    embedding, weight, bias = (torch.randn(size, generator=generator) for size in ((vocabulary, d), (h, t * d), (h,)))
    weight *= (t * d) ** -0.5
    parameters = [tensor.requires_grad_() for tensor in (embedding, weight, bias)]
    gradient = torch.randn((n, h), generator=generator)

    def forward(plan: str, **options: bool) -> Any:
        return functional.embedding_linear(tokens, *parameters, activation="tanh", plan=plan, **options)

    def forward_only(plan: str) -> Tensor:
        with torch.no_grad():
            return forward(plan)

    def backward(output: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(output, parameters, gradient, retain_graph=True)

    outputs = {plan: forward(plan) for plan in PLANS}
    results = [(output.detach(), *backward(output)) for output in outputs.values()]
    for folded, gathered in zip(*results, strict=True):
        error = ((folded - gathered).norm() / gathered.norm()).item()
        if not error <= MOST_ERROR:
            raise WrongResult(f"N {n}, T {t}, D {d}, H {h}, V {vocabulary}: WRONG: the plans differ by {error:.1e}")
    auto = forward("auto", return_plan=True)
    yield Choice("forward", auto.plan, {plan: lambda plan=plan: forward_only(plan) for plan in PLANS})
    yield Choice("backward", auto.backward_plan, {plan: lambda plan=plan: backward(outputs[plan]) for plan in PLANS})


def describe(point: dict[str, Any]) -> str:
    n, t, d, h, vocabulary = point["shape"]
    size = f"N {n}, T {t}, D {d}, H {h}, V {vocabulary}"
    return f"{point['pass']}, {size}: {point['plan']} takes {point['regret']:.0%} more"


def summary(points: list[dict[str, Any]]) -> str:
    """How many choices were the faster plan, how many about as fast, how many not."""
    best = sum(point["regret"] == 0 for point in points)
    bad = sum(point["regret"] > MOST_REGRET for point in points)
    return (
        f"{len(points)} choices of a plan: {best} are the faster one, {len(points) - best - bad} take up to "
        f"{MOST_REGRET:.0%} more than the other, {bad} more than that"
    )
