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
from bench.ops import without_memory
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
    try:
        cases = _choose(given)
    except BadRequest as problem:
        _say(problem)
        return 1
    with exit_codes():
        return 0 if _run(cases, given) else 1


def _say(problem: object) -> None:
    print(f"bench: {' '.join(str(problem).split())}", file=sys.stderr, flush=True)


def _choose(given: Any) -> list[Case]:
    unknown = [op for op in given.ops if op not in OPS]
    if unknown:
        raise BadRequest(f"unknown op {unknown[0]!r}: it is one of {', '.join(OPS)}")
    if given.device == "cuda" and not torch.cuda.is_available():
        raise BadRequest("--device cuda: torch sees no GPU")
    if given.json is not None and not given.json.parent.is_dir():
        raise BadRequest(f"there is no folder {given.json.parent}")
    ops = [op for op in OPS if op in given.ops or not given.ops]
    if given.dry_run or given.grid:
        cases = [case for case in (grid() if given.grid else dry_run(given.device)) if case.op in ops]
    elif given.shape:
        of_shapes = [of_shape(text, ops, given.variant, given.dtype, given.device) for text in given.shape]
        cases = [case for chosen in of_shapes for case in chosen]
    else:
        cases = select(ops, given.variant, given.dtype, given.device)
        cases = [case for case in cases if not given.quick or without_memory(case).elements() <= QUICK_ELEMENTS]
    if not cases:
        raise BadRequest("no listed case fits this request; name a size with --shape")
    return cases


def _run(cases: list[Case], given: Any) -> bool:
    """Measures case by case, and writes the record after each, so that what was measured survives an interruption."""
    end = time.monotonic() + given.seconds
    on_gpu = given.device == "cuda"
    timer = GpuTimer() if on_gpu else Timer(lambda: None) if given.dry_run else Timer()
    budget = DRY_RUN if given.dry_run else ON_GPU if on_gpu else QUICK if given.quick else Budget()
    without = COMPILED if given.dry_run or given.grid else ("compile",) if given.quick else ()
    not_run: dict[str, str] = {}
    content = {"schema": record.SCHEMA, "header": record.header(given.device), "cases": [], "not_run": not_run}
    if isinstance(timer, GpuTimer):
        content["copy_bandwidth"] = timer.copy_bandwidth()
    for case in cases:
        if time.monotonic() > end:
            not_run[case.name] = "no time was left"
            continue
        try:
            entry = measure(case, timer, budget, given.device, without)
        except (BadRequest, MemoryError, RuntimeError) as problem:
            if isinstance(problem, RuntimeError) and "allocate" not in str(problem):  # no lack of memory
                raise
            not_run[case.name] = str(problem) if isinstance(problem, BadRequest) else "too little memory"
            _say(f"{case.name}: {not_run[case.name]}")
            continue
        content["cases"].append(entry)
        if entry["error"] is not None:
            _say(f"{case.name}: WRONG: {entry['error']}")
        print(f"{case.name}: {'timed' if entry['error'] is None else 'WRONG'}", flush=True)
        if given.json is not None:
            record.write(given.json, content)
    if given.json is not None:
        record.write(given.json, content)
    print(f"\n{report.render_run(content)}")
    # A listed case that does not fit is no failure; one that the user named is.
    return all(entry["error"] is None for entry in content["cases"]) and not (given.shape and not_run)


if __name__ == "__main__":
    raise SystemExit(main())
