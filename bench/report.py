"""Tables and the chart, from records. Nothing here needs torch or charlm, so a failed build has its table too.

python -m bench.report show FILE        every case of a record
python -m bench.report table FILE       its table in docs/benchmarks.md, in Markdown
python -m bench.report compare A B      how charlm's times changed; exit code 1 on a regression of more than 10 %
python -m bench.report gpu              writes docs/gpu/MEASURED.md from bench/results/h200.json
python -m bench.report chart            writes docs/speed.svg from bench/results
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from html import escape
from math import log2
from pathlib import Path
from typing import Any

from bench import record
from bench.cases import INFORMATION, LOWER_BOUNDS, SHAPES, BadRequest

GPU_RECORD, MEASURED = record.RESULTS / "h200.json", record.ROOT / "docs" / "gpu" / "MEASURED.md"
CHART = record.ROOT / "docs" / "speed.svg"

DASH = "–"
MARKS = {True: "reached", False: "MISSED", None: "unproven"}
PEERS = {
    "eager": "torch",
    "eager_index": "C[x]",
    "drop_in": "drop-in",
    "compile": "torch.compile",
    "jax": "JAX",
    "liger": "Liger",
    "cce": "CCE",
    "quack": "quack",
}


def duration(seconds: float) -> str:
    """Three digits: 4.51 ms, 17.2 µs, 312 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{seconds * 1e9:.0f} ns"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}" if value > 99.5 else f"{value:.1f}"


def size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def columns(rows: list[list[str]], right: Iterable[int]) -> str:
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


# --- every case of a record ---------------------------------------------------------------------------------


def render_run(content: dict[str, Any]) -> str:
    """What `python -m bench` prints in the end."""
    made = content["header"]
    gpu = f"{made['gpu']}; " if made.get("gpu") else ""
    jax = f"jax {made['jax']}" if made["jax"] else "no jax"
    lines = [
        f"{gpu}{made['processor']}, {made['cores']} cores; {made['system']}",
        f"charlm {made['charlm']} ({made['commit']}), {made['instruction_set']}, {made['threads']} threads; "
        f"torch {made['torch']}, {jax}, python {made['python']}; {made['date']}",
    ]
    return "\n\n".join(["\n".join(lines), *render_cases(content)])


def render_cases(content: dict[str, Any]) -> list[str]:
    """The table; × columns say how many times faster than that peer charlm is. Then what it leaves out."""
    cases = content["cases"]
    peers = [name for name in PEERS if any(case["times"].get(name) for case in cases)]
    titles = ["case", "charlm", "GB/s", "lower bounds", *(f"× {PEERS[name]}" for name in peers)]
    titles += ["memory, torch's", "goals"]
    rows = [titles, *(_row(case, peers) for case in cases)]
    return [columns(rows, right=range(1, len(rows[0]) - 1)), _remarks(content)]


def _row(case: dict[str, Any], peers: list[str]) -> list[str]:
    name = f"{case['op']} {case['variant']} {'×'.join(map(str, case['shape']))} {case['dtype']}"
    if case["error"] is not None:
        return [name, "WRONG", *[DASH] * (3 + len(peers)), case["error"]]
    ours, figures = case["times"]["ours"], case["figures"]
    bandwidth = case["bytes"] / ours["median"] / 1e9
    spread = 50 * (ours["p90"] - ours["p10"]) / ours["median"]
    bounds = [f"{bound} {ratio(figures[bound])}" for bound in LOWER_BOUNDS if figures.get(bound)]
    if figures.get("copy_bandwidth"):
        bounds = [f"{100 * figures['copy_bandwidth']:.0f} % of a copy"]
    goals = [
        f"{goal['figure']} {goal['bound']} {goal['value']:g}: {MARKS[_reached(case, goal)]}" for goal in case["goals"]
    ]
    sizes = [size(case["memory"][name]) for name in ("ours", "eager") if name in case.get("memory", {})]
    return [
        name,
        f"{'≤ ' * _mostly_late(case, 'ours')}{duration(ours['median'])} ±{spread:.0f}%",
        f"{bandwidth:.3g}" if bandwidth < 100 else f"{bandwidth:.0f}",
        ", ".join(bounds) or DASH,
        *(
            DASH if figures.get(peer) is None else ratio(figures[peer]) + "?" * _mostly_late(case, peer)
            for peer in peers
        ),
        ", ".join(sizes) or DASH,
        "; ".join(goals),
    ]


def _mostly_late(case: dict[str, Any], name: str) -> bool:
    """Whether most samples of this provider may hold time in which the GPU waited for Python."""
    samples = (case["times"].get(name) or {}).get("samples", 0)
    return 2 * case.get("late", {}).get(name, 0) > samples


def _reached(case: dict[str, Any], goal: dict[str, Any]) -> bool | None:
    """Whether a goal is reached; None where it is unmeasured, or where times that are bounds do not decide it."""
    other = "copy" if goal["figure"] == "copy_bandwidth" else goal["figure"]
    in_doubt = _mostly_late(case, other) if goal["reached"] else _mostly_late(case, "ours")
    return None if in_doubt else goal["reached"]


def _remarks(content: dict[str, Any]) -> str:
    lines = []
    if "copy_bandwidth" in content:
        bandwidth = content["copy_bandwidth"] / 1e9
        lines.append(f"device-to-device copy of a gigabyte: {bandwidth:.0f} GB/s, read and written")
    outcomes = [_reached(case, goal) for case in content["cases"] for goal in case["goals"]]
    lines.append("goals: " + ", ".join(f"{outcomes.count(value)} {text.lower()}" for value, text in MARKS.items()))
    reasons: dict[str, list[str]] = {}
    for case in content["cases"]:
        for name in case.get("late", {}):
            reason = f"{PEERS.get(name, name)}: some samples may hold time that the GPU waited for Python"
            reasons.setdefault(reason, []).append(case["name"])
        for name, reason in case["absent"].items():
            reasons.setdefault(f"{PEERS.get(name, name)}: {reason}", []).append(case["name"])
    for name, reason in content.get("not_run", {}).items():
        reasons.setdefault(f"not run: {reason}", []).append(name)
    lines += [
        f"{DASH} {reason} ({names[0] if len(names) == 1 else f'{len(names)} cases'})"
        for reason, names in reasons.items()
    ]
    return "\n".join(lines)


def render_changes(rows: list[dict[str, Any]]) -> str:
    table = [["case", "before", "after", "after / before", "divided by the change of", ""]]
    for row in sorted(rows, key=lambda row: -row["ratio"]):
        times = duration(row["old"]), duration(row["new"])
        mark = "regression" if row["regression"] else ""
        table.append([row["name"], *times, f"{row['ratio']:.2f}", row["bound"] or DASH, mark])
    found = sum(row["regression"] for row in rows)
    return f"{columns(table, right=(1, 2, 3))}\n\n{found} regressions in {len(rows)} cases"


# --- the record of `make gpu` -------------------------------------------------------------------------------

HEADER = """<!-- Written by python -m bench.report gpu; do not edit. -->
# Measured on a GPU

From bench/results/h200.json. GB/s are the fewest bytes that a call has to move, over its time. "of a copy" compares
them with a device-to-device copy of as many bytes that was sampled in turn. × says how many times faster charlm is.

A ≤ marks an upper bound: most samples of charlm may hold time in which the GPU waited for Python. The ratios are then
lower bounds. A question mark follows a ratio where the same is true of the peer. A goal that such a number does not
decide is unproven.
"""


def document() -> str:
    """MEASURED.md: what the record says of itself, and its table."""
    content = record.read(GPU_RECORD)
    remarks = "".join(f"\n{remark}\n" for remark in content.get("remarks", []))
    return f"{HEADER}{remarks}\n```\n{render_gpu(content)}\n```\n"


def render_gpu(content: dict[str, Any]) -> str:
    """The table of a record of `make gpu`, finished or not."""
    steps = [["step", "", "seconds", ""]]
    for step in content["steps"]:
        seconds = DASH if step["seconds"] is None else f"{step['seconds']:.0f}"
        steps.append([step["name"], step["status"], seconds, step["note"]])
    parts = [_environment(content), columns(steps, right=(2,))]
    return "\n\n".join(parts + (render_cases(content["bench"]) if "bench" in content else []))


def _environment(content: dict[str, Any]) -> str:
    found = content["environment"]
    gpu = found["gpu"]
    device = "no GPU: a dry run on the CPU, its times mean nothing" if content["device"] == "cpu" else gpu["name"]
    lines = [f"charlm on {device}: {content['status']}, {content['date']}, commit {content['commit'] or 'unknown'}"]
    if gpu is not None:
        lines.append(
            f"{gpu['count']} × {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory'] / 2**30:.0f} GiB, "
            f"{gpu['multiprocessors']} multiprocessors, L2 {gpu['l2_cache'] / 2**20:.0f} MiB, driver {found['driver']}"
        )
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items() if version)
    toolkit = f"CUDA {found['torch_cuda']}, nvcc {found['nvcc']}" if found["torch_cuda"] else "a CPU build"
    lines.append(f"torch {found['torch']} ({toolkit}), python {found['python']}, {packages}")
    return "\n".join(lines)


# --- the tables of docs/benchmarks.md -----------------------------------------------------------------------

LARGE = "2048x32000"
HEADLINES = (  # the rows: op and variant, then the shapes
    ("cross_entropy/default", f"32x27 4096x27 65536x65 65536x256 {LARGE} 1024x128256 {LARGE}/bfloat16"),
    ("cross_entropy/inplace_forward", f"65536x256 {LARGE}"),
    ("cross_entropy/inplace_backward", LARGE),
    ("embedding/int64", "98304x27x10"),
    ("embedding_backward/default", "98304x27x10 65536x256x64"),
    ("embedding_linear/default", "4096x8x24x200x27 32x3x10x200x27 4096x8x32x256x256"),
    ("linear_cross_entropy/default", "1024x512x32000 512x768x50257 8192x512x32000 4096x768x50257"),
    ("linear_cross_entropy/default", "1024x512x32000/bfloat16 512x768x50257/bfloat16"),
    ("train_step/default", "4096x8x24x200x27 32x3x10x200x27"),
    *((f"{op}/default", f"32x27 4096x27 65536x256 {LARGE} {LARGE}/bfloat16") for op in INFORMATION),
)
PRODUCTS = {"embedding_linear", "linear_cross_entropy", "train_step"}  # bounded by matrix products, not by a copy


def benchmarks_table(content: dict[str, Any]) -> str:
    cases = {case["name"]: case for case in content["cases"]}
    layers = not PRODUCTS.isdisjoint(case["op"] for case in cases.values())
    bounds, title = (("gemms",), "products") if layers else (("copy", "fresh_copy", "read_write"), "copy")
    lines = [f"| work | time | × {title} | × torch eager | × best peer |", "|---|---|---|---|---|"]
    before = None
    for start, shapes in HEADLINES:
        for text in shapes.split():
            case = cases.get(f"{start}/{text}" if "/" in text else f"{start}/{text}/float32")
            if case is None or not case["times"]:
                continue
            figures = case["figures"]
            of_bound = next((figures[bound] for bound in bounds if bound in figures), None)
            ratios = [of_bound, figures.get("eager"), figures.get("best_peer")]
            cells = [duration(case["times"]["ours"]["median"]), *(DASH if r is None else ratio(r) for r in ratios)]
            lines.append(f"| {' | '.join([_work(case, before), *cells])} |")
            before = case
    made = content["header"]
    peers = "torch eager, torch.compile" + (f" and JAX {made['jax']}" if made["jax"] else "")
    explained = (
        "× products: ours / the three bare products x Wᵀ, g W and gᵀ x (in float32 where the machine has no "
        "instructions for bfloat16: torch's products take minutes there and were not timed)"
        if layers
        else "× copy: ours / one copy of the logits, for an embedding of its output, for its gradient one read and one "
        "write"
    )
    lines += [
        "",
        f"({made['processor']}, {made['threads']} threads, {made['instruction_set']}, torch {made['torch']}; float32, "
        f"forward and gradient, unless said. {explained}. The others: how many times faster than torch, and than the "
        f"best of {peers}.)",
    ]
    return "\n".join(lines)


def _work(case: dict[str, Any], before: dict[str, Any] | None = None) -> str:
    """What a case times, in words that go on from the row before."""
    op, shape = case["op"], case["shape"]
    titles = {"embedding_backward": "its gradient", "train_step": "a training step"}
    same_op = before is not None and before["op"] == op
    title = [] if same_op and op != "embedding_backward" else [titles.get(op, op)]
    if op == "train_step":
        sizes = [f"batch {shape[0]}", *(f"{name} {n}" for name, n in zip("TDH", shape[1:4], strict=True))]
    elif op in PRODUCTS:
        sizes = [f"{name} {n}" for name, n in zip(SHAPES[op].split("x"), shape, strict=True)]
    else:
        sizes = [f"{shape[0]} × {shape[1]}" if len(shape) == 2 else f"{shape[0]} of {shape[1]} × {shape[2]}"]
    if op == "embedding_backward" and before is not None and before["op"] == "embedding" and before["shape"] == shape:
        sizes = []
    inplace = case["variant"].removeprefix("inplace_")
    sizes += [f'`inplace="{inplace}"`'] * (inplace != case["variant"])
    return ", ".join([*title, *sizes, *[case["dtype"]] * (case["dtype"] != "float32")])


# --- the chart ----------------------------------------------------------------------------------------------

BARS = {
    "cpu_ops": (
        "cross_entropy/default/4096x27/float32",
        "cross_entropy/default/65536x256/float32",
        "cross_entropy/default/2048x32000/float32",
        "cross_entropy/inplace_forward/2048x32000/float32",
        "embedding/int64/98304x27x10/float32",
        "embedding_backward/default/98304x27x10/float32",
    ),
    "cpu_layers": (
        "embedding_linear/default/4096x8x24x200x27/float32",
        "linear_cross_entropy/default/1024x512x32000/float32",
        "train_step/default/4096x8x24x200x27/float32",
    ),
    "h200": (
        "cross_entropy/default/65536x27/bfloat16",
        "cross_entropy/default/262144x65/bfloat16",
        "cross_entropy/default/65536x256/bfloat16",
        "cross_entropy/default/16384x8192/bfloat16",
        "cross_entropy/default/8192x32000/bfloat16",
        "cross_entropy/default/4096x128256/bfloat16",
    ),
}
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#1f2328}.title{font-weight:600}.small{font-size:11px;fill:#59636e}"
    ".grid{stroke:#d1d9e0}.one{stroke:#59636e}.bar{fill:#0969da}.slower{fill:#bc4c00}"
    "@media(prefers-color-scheme:dark){text{fill:#f0f6fc}.small{fill:#9198a1}.grid{stroke:#3d444d}.one{stroke:#9198a1}"
    ".bar{fill:#4493f8}.slower{fill:#db6d28}}"
)
WIDTH, LABELS, LINE, FIRST, LAST = 860, 400, 22, -1, 6  # pixels; powers of two at both ends of the axis


def chart() -> str:
    """An SVG of bars: how many times faster than torch eager charlm is, on a logarithmic axis; a group per machine."""
    groups: dict[str, list[tuple[str, float, str]]] = {}
    for name, chosen in BARS.items():
        content = record.read(record.RESULTS / f"{name}.json")
        cases = {case["name"]: case for case in content.get("bench", content)["cases"]}
        bars = groups.setdefault(_machine(content), [])
        for case in (cases[one] for one in chosen):
            value = case["figures"]["eager"]
            label = _work(case).replace("`", "").replace("its gradient", "embedding gradient")
            bars.append((label, value, "≥ " * _mostly_late(case, "ours") + ratio(value)))

    def x(value: float) -> float:
        return LABELS + (log2(value) - FIRST) * (WIDTH - 70 - LABELS) / (LAST - FIRST)

    lines, y = [], 20
    lines.append(f'<text class="title" x="0" y="{y}">Speed-up over torch eager (logarithmic axis)</text>')
    for machine, bars in groups.items():
        y += 34
        lines.append(f'<text class="small" x="0" y="{y}">{escape(machine)}</text>')
        top, bottom = y + 8, y + 8 + LINE * len(bars)
        for power in range(FIRST, LAST + 1):
            at, tick = x(2.0**power), f"{2.0**power:g}×"
            kind = "one" if power == 0 else "grid"
            lines.append(f'<line class="{kind}" x1="{at:.1f}" x2="{at:.1f}" y1="{top}" y2="{bottom}"/>')
            lines.append(f'<text class="small" x="{at:.1f}" y="{bottom + 14}" text-anchor="middle">{tick}</text>')
        for i, (label, value, text) in enumerate(bars):
            start, end = sorted((x(1), x(value)))
            base, kind = top + LINE * i, "bar" if value >= 1 else "slower"
            lines.append(f'<text x="{LABELS - 8}" y="{base + 16}" text-anchor="end">{escape(label)}</text>')
            lines.append(
                f'<rect class="{kind}" x="{start:.1f}" y="{base + 4}" width="{end - start:.1f}" height="{LINE - 7}"/>'
            )
            lines.append(f'<text x="{max(end, x(1)) + 6:.1f}" y="{base + 16}">{text}×</text>')
        y = bottom + 14
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" width="{WIDTH}" role="img">'
    title = "<title>Speed-up of charlm over torch eager</title>"
    return "\n".join([head, title, f"<style>{STYLE}</style>", *lines, "</svg>"]) + "\n"


def _machine(content: dict[str, Any]) -> str:
    if "header" in content:
        made = content["header"]
        threads = f"{made['threads']} threads, {made['instruction_set'].upper()}"
        return f"{made['processor']}, {threads}; torch {made['torch']}; {made['date'][:10]}"
    return f"{content['environment']['gpu']['name']}; torch {content['environment']['torch']}; {content['date'][:10]}"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.report", description="Tables and the chart, from records.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("show", "every case of a record"), ("table", "its table in docs/benchmarks.md")):
        commands.add_parser(name, help=text).add_argument("files", nargs=1, type=Path, metavar="FILE")
    comparing = commands.add_parser("compare", help="how times changed; exit code 1 on a regression of over 10 %%")
    comparing.add_argument("files", nargs=2, type=Path, metavar="FILE")
    commands.add_parser("gpu", help="write docs/gpu/MEASURED.md")
    commands.add_parser("chart", help="write docs/speed.svg")
    given = parser.parse_args(arguments)
    try:
        contents = [record.read(file) for file in getattr(given, "files", [])]
        if given.command == "gpu":
            record.write(MEASURED, document())
        elif given.command == "chart":
            record.write(CHART, chart())
        elif given.command == "show":
            print(render_gpu(contents[0]) if "steps" in contents[0] else render_run(contents[0]))
        elif given.command == "table":
            print(benchmarks_table(contents[0]))
        else:
            rows = record.changes(*contents)
            if not rows:
                raise BadRequest("these two records have no timed case in common")
            print(render_changes(rows))
            return int(any(row["regression"] for row in rows))
    except BadRequest as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
