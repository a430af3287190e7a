"""What the benchmark prints: a header, one table for each op, the outcome of `compare` and of the grid."""

from __future__ import annotations

import shutil
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from bench.cases import FLOORS
from bench.clock import Timing
from bench.measure import Result
from bench.units import duration, ratio

DASH = "–"
NARROWEST = 200  # columns: a table that goes to a file keeps its lines whole
PEERS = {"eager": "torch", "eager_index": r"C\[x]", "compile": "compile", "jax": "JAX"}
MARKS = {True: "✓", False: "✗", None: "–"}
COLOURS = {True: "green", False: "red", None: "yellow"}


def console() -> Console:
    found = Console(highlight=False)
    return found if found.is_terminal else Console(highlight=False, width=max(NARROWEST, shutil.get_terminal_size()[0]))


def print_header(out: Console, header: dict[str, Any]) -> None:
    caches = f"; {header['caches']}" if header["caches"] else ""
    out.print(f"{header['processor']}, {header['cores']} cores{caches}; {header['system']}", soft_wrap=True)
    jax = f"jax {header['jax']}" if header["jax"] else "no jax"
    out.print(
        f"charlm {header['charlm']} ({header['commit']}), {header['instruction_set']}, {header['threads']} threads; "
        f"torch {header['torch']}, {jax}, python {header['python']}; {header['date']}",
        soft_wrap=True,
    )


def print_results(out: Console, op: str, results: list[Result]) -> None:
    """One line for each case. Times are medians, ± half the way from the 10 % to the 90 % quantile."""
    peers = [name for name in PEERS if any(name in result.times for result in results)]
    table = Table(title=op, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("case", "ours", *(PEERS[name] for name in peers), "floors", "GB/s", "× floor", "× best peer"):
        table.add_column(column, justify="left" if column == "case" else "right", no_wrap=column == "case")
    table.add_column("memory: ours, torch", justify="right")
    table.add_column("goals", overflow="fold")
    for result in results:
        table.add_row(*_row(result, peers))
    out.print(table)
    out.print(
        "GB/s: of the least bytes that any implementation moves, each input read once and each output written once; "
        "memory: peak beyond the inputs.",
        soft_wrap=True,
    )


def _row(result: Result, peers: list[str]) -> list[str]:
    case = result.case
    dtype = "" if case.dtype == "float32" else f" {case.dtype}"
    name = f"{case.variant} {'×'.join(map(str, case.shape))}{dtype}"
    if result.error is not None:
        return [name, "[red]WRONG[/]", *[DASH] * (len(peers) + 5), result.error.replace("[", r"\[")]
    floors = [name for name in (*FLOORS, "noop") if result.times.get(name)]
    ours = result.times["ours"]
    best = result.figures.get("best_peer")
    return [
        name,
        _time(ours),
        *(_time(result.times.get(peer)) for peer in peers),
        "\n".join(f"{floor} {_time(result.times[floor])}" for floor in floors) or DASH,
        f"{result.bytes / ours.median / 1e9:.1f}",
        "\n".join(ratio(result.figures[floor]) for floor in floors if floor in FLOORS) or DASH,
        DASH if best is None else ratio(best),
        ", ".join(_size(result.memory[name]) if name in result.memory else DASH for name in ("ours", "eager")),
        "\n".join(_goal(result, goal, reached) for goal, reached in result.goals()) or DASH,
    ]


def _goal(result: Result, goal: Any, reached: bool | None) -> str:
    figure = result.figures.get(goal.figure)
    found = "" if figure is None else f": {ratio(figure)}"
    return f"[{COLOURS[reached]}]{MARKS[reached]}[/] {goal}{found}"


def _time(timing: Timing | None) -> str:
    if timing is None:
        return DASH
    return f"{duration(timing.median)} ±{50 * (timing.p90 - timing.p10) / timing.median:.0f}%"


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def print_absent(out: Console, results: list[Result]) -> None:
    """Why there are dashes."""
    reasons: dict[tuple[str, str], int] = {}
    for result in results:
        for name, reason in result.absent.items():
            reasons[name, reason] = reasons.get((name, reason), 0) + 1
    for (name, reason), count in reasons.items():
        out.print(f"{DASH} {name}: {reason} ({count} cases)", soft_wrap=True, markup=False)


def print_goals(out: Console, results: list[Result]) -> None:
    outcomes = [reached for result in results for _, reached in result.goals()]
    if outcomes:
        counts = {text: outcomes.count(value) for text, value in (("reached", True), ("missed", False))}
        unproven = outcomes.count(None)
        out.print(f"goals: {counts['reached']} reached, {counts['missed']} missed, {unproven} unproven")


def print_changes(out: Console, rows: list[dict[str, Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("case", "before", "after", "divided by the change of", "after / before", ""):
        table.add_column(column, justify="right" if column in ("before", "after", "after / before") else "left")
    for row in sorted(rows, key=lambda row: -row["ratio"]):
        mark = "[red]regression[/]" if row["regression"] else ""
        old, new = duration(row["old"]), duration(row["new"])
        table.add_row(row["name"], old, new, row["floor"] or DASH, f"{row['ratio']:.2f}", mark)
    out.print(table)
    out.print(f"{sum(row['regression'] for row in rows)} regressions in {len(rows)} cases")
