"""The command line: checks each case against float64, times it beside its peers, prints times and ratios.

    python -m bench                                     every listed case of the CPU
    python -m bench cross_entropy --shape 4096x27       one op, one shape
    python -m bench --device cuda --json FILE           the cases of the GPU, recorded

A wrong result, and a request that cannot be met, is one line on stderr; the rest goes on, and the exit code is 1. A
listed case for which memory is short, and a goal that is missed, are printed and are no failure. A busy machine is
refused with exit code 2. Tables, comparisons of two records and the chart: python -m bench.report. Single questions:
bench/studies.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import record, report
from bench.cases import DTYPES, OPS, SHAPES, VARIANTS, BadRequest, Case, dry_run, grid, of_shape, select
from bench.measure import measure
from bench.ops import of_shapes
from bench.timer import DRY_RUN, ON_GPU, QUICK, Budget, GpuTimer, Timer, exit_codes

QUICK_ELEMENTS = 1 << 21
COMPILED = ("compile", "jax")


def parser() -> argparse.ArgumentParser:
    variants = dict.fromkeys(name for names in VARIANTS.values() for name in names)
    made = argparse.ArgumentParser(
        prog="python -m bench",
        description="Checks charlm's ops against float64, then times them beside torch eager, torch.compile and other "
        "libraries in one interleaved run. Prints medians and ratios.",
        epilog=f"Shapes: {', '.join(f'{op} {shape}' for op, shape in SHAPES.items())}. Other commands: python -m "
        "bench.report, python -m bench.gpu, bench/studies.",
    )
    add = made.add_argument
    add("ops", nargs="*", metavar="op", help=f"{', '.join(OPS)} (default: all)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--shape", action="append", default=[], help="such as 4096x27, instead of the listed shapes; can be repeated")
    add("--dtype", action="append", default=[], choices=DTYPES, help="can be repeated")
    add("--variant", action="append", default=[], choices=variants, metavar="NAME", help=", ".join(variants))
    add("--quick", action="store_true", help="only small cases, fewer samples, no torch.compile")
    add("--grid", action="store_true", help="many odd shapes of cross_entropy and embedding: is torch faster on one?")
    add("--dry-run", action="store_true", help="a few rows of each kind of case, on a busy machine too: no real times")
    add("--threads", type=int, help="of torch; JAX takes part only with all cores")
    add("--seconds", type=float, default=float("inf"), help="no case begins later than this")
    add("--json", type=Path, metavar="FILE", help="write the record there after each case")
    return made


def main(arguments: list[str] | None = None) -> int:
    given = parser().parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    problems: list[str] = []
    cases = _choose(given, problems)
    if given.json is not None and not given.json.parent.is_dir():
        problems, cases = [_say(f"there is no folder {given.json.parent}")], []
    if cases:
        with exit_codes():
            _run(cases, given, problems)
    return 1 if problems else 0


def _say(problem: str) -> str:
    print(f"bench: {' '.join(problem.split())}", file=sys.stderr, flush=True)
    return problem


def _choose(given: Any, problems: list[str]) -> list[Case]:
    unknown = [op for op in given.ops if op not in OPS]
    if unknown:
        problems.append(_say(f"unknown op {unknown[0]!r}: it is one of {', '.join(OPS)}"))
        return []
    ops = [op for op in OPS if op in given.ops or not given.ops]
    if given.dry_run or given.grid:
        return [case for case in (grid() if given.grid else dry_run(given.device)) if case.op in ops]
    if not given.shape:
        cases = select(ops, given.variant, given.dtype, given.device)
        return [case for case in cases if not given.quick or of_shapes(case).elements() <= QUICK_ELEMENTS]
    try:
        shaped = [of_shape(text, ops, given.variant, given.dtype, given.device) for text in given.shape]
    except BadRequest as problem:
        problems.append(_say(str(problem)))
        return []
    return [case for cases in shaped for case in cases]


def _run(cases: list[Case], given: Any, problems: list[str]) -> None:
    """Measures case by case, and writes the record after each, so that what was measured survives an interruption."""
    end = time.monotonic() + given.seconds
    timer: Timer | GpuTimer
    if given.device == "cuda":
        timer, budget = GpuTimer(), DRY_RUN if given.dry_run else ON_GPU
    else:
        timer = Timer(lambda: None) if given.dry_run else Timer()
        budget = DRY_RUN if given.dry_run else QUICK if given.quick else Budget()
    without = COMPILED if given.dry_run or given.grid else ("compile",) if given.quick else ()
    content: dict[str, Any] = {"schema": record.SCHEMA, "header": record.header(given.device), "cases": []}
    if isinstance(timer, GpuTimer):
        content["copy_bandwidth"] = timer.copy_bandwidth()
    not_run: dict[str, str] = {}
    for case in cases:
        if time.monotonic() > end:
            not_run[case.name] = "no time was left"
            continue
        try:
            result = measure(case, timer, budget, given.device, without)
        except (BadRequest, MemoryError, RuntimeError) as problem:
            if isinstance(problem, RuntimeError) and "allocate" not in str(problem):  # no lack of memory
                raise
            not_run[case.name] = str(problem) if isinstance(problem, BadRequest) else "too little memory"
            said = _say(f"{case.name}: {not_run[case.name]}")
            problems += [said] if given.shape else []
            continue
        content["cases"].append(result)
        if result["error"] is not None:
            problems.append(_say(f"{case.name}: WRONG: {result['error']}"))
        if given.json is not None:
            record.write(given.json, {**content, "not_run": not_run})
        print(f"{case.name}: {'timed' if result['error'] is None else 'WRONG'}", flush=True)
    content["not_run"] = not_run
    if given.json is not None:
        record.write(given.json, content)
    print(f"\n{report.render_run(content)}")


if __name__ == "__main__":
    raise SystemExit(main())
