"""What `make gpu` leaves behind: a JSON, written whole or not at all, and the same as a table of plain text.

    python -m bench.gpu_report      writes docs/gpu/MEASURED.md from bench/results/h100.json

Nothing here needs torch or charlm, so a run whose build failed has its table too.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bench.units import duration, ratio

RECORD = Path(__file__).with_name("results") / "h100.json"
DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "gpu" / "MEASURED.md"
HEADER = """<!-- Written by python -m bench.gpu_report; do not edit. -->
# Measured on a GPU

From bench/results/h100.json. GB/s are the fewest bytes that a call has to move, over its time; "of a copy" compares
them with a device-to-device copy of as many bytes that was sampled in turn; × says how many times faster ours is.

A ≤ stands where most samples of ours may hold time that the GPU waited for Python: an upper bound. There the ratios are
lower bounds, unless the same is true of the peer: then a question mark stands behind them. A goal that such a number
does not decide is unproven.
"""

DASH = "–"
MARKS = {True: "reached", False: "MISSED", None: "unproven"}
UNSURE = "?"  # behind a ratio to a peer most of whose samples were late
PEERS = {"eager": "torch", "eager_index": "C[x]", "compile": "compile", "liger": "Liger"}


def write(path: Path, text: str) -> None:
    """Replaces the file in one step: a reader, or whatever ends this process, never meets half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def document() -> str:
    """MEASURED.md: what the record says of itself, and its table."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    remarks = "".join(f"\n{remark}\n" for remark in record.get("remarks", []))
    return f"{HEADER}{remarks}\n```\n{render(record)}\n```"


def render(record: dict[str, Any]) -> str:
    """The table of a record, finished or not."""
    parts = [_environment(record), _steps(record["steps"])]
    if "bench" in record:
        parts += [_bench(record["bench"]), *_remarks(record["bench"])]
    return "\n\n".join(parts)


def _environment(record: dict[str, Any]) -> str:
    found = record["environment"]
    gpu = found["gpu"]
    device = "no GPU: a dry run on the CPU, its times mean nothing" if record["device"] == "cpu" else gpu["name"]
    lines = [f"charlm on {device}: {record['status']}, {record['date']}, commit {record['commit'] or 'unknown'}"]
    if gpu is not None:
        lines.append(
            f"{gpu['count']} × {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_cache'] / 2**20:.0f} MiB, driver {found['driver']}"
        )
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    toolkit = f"CUDA {found['torch_cuda']}, nvcc {found['nvcc']}" if found["torch_cuda"] else "a CPU build"
    lines.append(f"torch {found['torch']} ({toolkit}), python {found['python']}, {packages}")
    return "\n".join(lines)


def _steps(steps: Iterable[dict[str, Any]]) -> str:
    rows = [["step", "", "seconds", ""]]
    for step in steps:
        seconds = DASH if step["seconds"] is None else f"{step['seconds']:.0f}"
        rows.append([step["name"], step["status"], seconds, step["note"]])
    return _columns(rows, right=(2,))


def _bench(bench: dict[str, Any]) -> str:
    """× columns: how many times faster than that peer ours is."""
    peers = [name for name in PEERS if any(case["times"].get(name) for case in bench["cases"])]
    rows = [["case", "ours", "GB/s", "of a copy", *(f"× {PEERS[name]}" for name in peers), "goals"]]
    rows += [_case(case, peers) for case in bench["cases"]]
    return _columns(rows, right=range(1, len(rows[0]) - 1))


def _case(case: dict[str, Any], peers: list[str]) -> list[str]:
    name = f"{case['op']} {case['variant']} {'×'.join(map(str, case['shape']))} {case['dtype']}"
    if case["error"] is not None:
        return [name, "WRONG", *[DASH] * (2 + len(peers)), case["error"]]
    seconds, figures = case["times"]["ours"]["median"], case["figures"]
    share = figures.get("copy_bandwidth")
    goals = [
        f"{goal['figure']} {goal['bound']} {goal['value']:g}: {MARKS[_reached(case, goal)]}" for goal in case["goals"]
    ]
    return [
        name,
        f"{'≤ ' if _mostly_late(case, 'ours') else ''}{duration(seconds)}",
        f"{case['bytes'] / seconds / 1e9:.0f}",
        DASH if share is None else f"{100 * share:.0f} %",
        *(
            DASH if figures.get(peer) is None else ratio(figures[peer]) + UNSURE * _mostly_late(case, peer)
            for peer in peers
        ),
        "; ".join(goals),
    ]


def _mostly_late(case: dict[str, Any], name: str) -> bool:
    """Whether most samples of this contender may hold time that the GPU waited for Python."""
    samples = (case["times"].get(name) or {}).get("samples", 0)
    return 2 * case["late"].get(name, 0) > samples


def _reached(case: dict[str, Any], goal: dict[str, Any]) -> bool | None:
    """Whether a goal, at least so much, is reached; None where times that are bounds do not tell."""
    other = "copy" if goal["figure"] == "copy_bandwidth" else goal["figure"]
    in_doubt = (goal["reached"] and _mostly_late(case, other)) or (not goal["reached"] and _mostly_late(case, "ours"))
    return None if in_doubt else goal["reached"]


def _remarks(bench: dict[str, Any]) -> list[str]:
    lines = [f"device-to-device copy of a gigabyte: {bench['copy_bandwidth'] / 1e9:.0f} GB/s, read and written"]
    outcomes = [_reached(case, goal) for case in bench["cases"] for goal in case["goals"]]
    lines.append("goals: " + ", ".join(f"{outcomes.count(value)} {text.lower()}" for value, text in MARKS.items()))
    reasons: dict[str, list[str]] = {}
    for case in bench["cases"]:
        for name in case["late"]:
            reason = f"{PEERS.get(name, name)}: some samples may hold time that the GPU waited for Python"
            reasons.setdefault(reason, []).append(case["name"])
        for peer, reason in case["absent"].items():
            reasons.setdefault(f"{PEERS.get(peer, peer)}: {reason}", []).append(case["name"])
    for name, reason in bench["not_run"].items():
        reasons.setdefault(f"not run: {reason}", []).append(name)
    lines += [
        f"{DASH} {reason} ({cases[0] if len(cases) == 1 else f'{len(cases)} cases'})"
        for reason, cases in reasons.items()
    ]
    return ["\n".join(lines)]


def _columns(rows: list[list[str]], right: Iterable[int]) -> str:
    """Cells padded to the width of their column; `right`: the columns that are aligned there."""
    right = set(right)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in lines)


if __name__ == "__main__":
    write(DOCUMENT, document())
