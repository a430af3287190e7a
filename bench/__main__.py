"""The command line of the benchmark.

    python -m bench [OP …] [--quick] [--json FILE] [--plot FILE] [--threads N] [--dtype NAME] [--shape 4096x27]
    python -m bench grid [--json FILE]
    python -m bench fold [--quick] [--json FILE] [--plot FILE]
    python -m bench plans [--quick] [--json FILE]
    python -m bench gpt_step [--quick] [--json FILE]
    python -m bench compare A.json B.json
    python -m bench table [FILE]

What cannot be run is one line on stderr, the rest goes on, and the exit code is 1, as it is for a wrong result and for
a regression. A busy machine is refused: one line, exit code 2. A goal that is missed is reported, and no failure.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from typer.core import TyperGroup

from bench import cases, record, report
from bench.cases import DTYPES, OPS, VARIANTS, BadRequest, Case
from bench.clock import QUICK, Budget, Busy, Clock
from bench.measure import Result, WrongResult, measure

PROBLEM, BUSY, INTERRUPTED = 1, 2, 130


class RunByDefault(TyperGroup):
    """`python -m bench OP` means `python -m bench run OP`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args or args[0] not in (*self.commands, "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=RunByDefault,
    help="Times charlm's ops beside torch eager, torch.compile, JAX and the machine's floor.",
    add_completion=False,
    pretty_exceptions_enable=False,
)

JsonFile = Annotated[Path | None, typer.Option("--json", help="Write everything that was measured.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Of torch; JAX takes part with all cores only.")]


class Problems:
    """Says on stderr what could not be run, and remembers that something could not."""

    def __init__(self) -> None:
        self.any = False

    def report(self, text: object) -> None:
        self.any = True
        typer.echo(f"bench: {' '.join(str(text).split())}", err=True)

    @contextmanager
    def collected(self, prefix: str = "") -> Iterator[None]:
        """What the block cannot do is reported, and ends the block only."""
        try:
            yield
        except (BadRequest, WrongResult, OSError, ImportError) as problem:
            self.report(f"{prefix}{problem}")
        except (MemoryError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "can't allocate memory" not in str(error):
                raise
            self.report(f"{prefix}too little memory")

    def exit(self) -> None:
        if self.any:
            raise typer.Exit(PROBLEM)


@app.command()
def run(
    ops: Annotated[list[str] | None, typer.Argument(help=f"{', '.join(OPS)}; absent: all of them.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Few small cases, few samples, no torch.compile.")] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw how time grows with N, V and threads.")] = None,
    threads: Threads = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"{', '.join(DTYPES)}; can be repeated.")] = None,
    shape: Annotated[list[str] | None, typer.Option(help="NxV or NxVxD instead of the list; can be repeated.")] = None,
    variant: Annotated[list[str] | None, typer.Option(help="Such as inplace_forward; can be repeated.")] = None,
) -> None:
    """Check, time and compare the ops; this is the command where none is named."""
    problems = _begin(json_file, plot, threads)
    chosen = _choose(ops or [], quick, dtype or [], shape or [], variant or [], problems)
    results: list[Result] = []
    parts: dict[str, Any] = {}
    out = report.console()
    with _refusing_a_busy_machine():
        clock = Clock()
        if any(chosen.values()):
            report.print_header(out, record.header())
        for op, op_cases in chosen.items():
            measured = _measured(op_cases, clock, quick, problems)
            if measured:
                report.print_results(out, op, measured)
            results += measured
        report.print_absent(out, results)
        report.print_goals(out, results)
        if plot is not None:
            from bench import scaling

            with problems.collected("--plot: "):
                parts["scaling"] = scaling.measure(quick)
    if "scaling" in parts:
        with problems.collected():
            scaling.draw(parts["scaling"], plot)
    if json_file is not None:
        with problems.collected():
            record.write(json_file, results, **parts)
    problems.exit()


def _begin(json_file: Path | None, plot: Path | None, threads: int | None) -> Problems:
    """Sets the threads; ends here, rather than after half an hour, where the results could not be kept."""
    problems = Problems()
    for path in (json_file, plot):
        if path is not None and not path.parent.is_dir():
            problems.report(f"there is no folder {path.parent}")
    if plot is not None:
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            problems.report("--plot needs matplotlib: pip install matplotlib")
    problems.exit()
    if threads is not None:
        torch.set_num_threads(threads)
    return problems


def _choose(
    ops: list[str], quick: bool, dtypes: list[str], shapes: list[str], variants: list[str], problems: Problems
) -> dict[str, list[Case]]:
    """The cases of each op that was asked for."""
    for kind, given, known in (
        ("op", ops, OPS),
        ("dtype", dtypes, DTYPES),
        ("variant", variants, [name for names in VARIANTS.values() for name in names]),
    ):
        for name in given:
            if name not in known:
                problems.report(f"unknown {kind} {name!r}: it is one of {', '.join(dict.fromkeys(known))}")
    if dtypes and not set(dtypes) & set(DTYPES):
        return {}
    known_ops = [op for op in OPS if op in ops or not ops]
    if not shapes:
        return {op: cases.select(op, quick, variants, dtypes) for op in known_ops}
    chosen: dict[str, list[Case]] = {op: [] for op in known_ops}
    for text in shapes:
        with problems.collected():
            for case in _cases_of_shape(text, known_ops, dtypes, variants):
                chosen[case.op].append(case)
    return chosen


def _cases_of_shape(text: str, ops: list[str], dtypes: list[str], variants: list[str]) -> Iterator[Case]:
    """Of the ops that take such a shape; where there is none, the first that was asked for says so."""
    shape = cases.parse_shape(text)
    fitting = [op for op in ops if len(shape) == len(cases.SHAPES[op].split("x"))]
    for op in fitting or ops[:1]:
        for variant in [name for name in variants if name in VARIANTS[op]] or VARIANTS[op][:1]:
            for dtype in [name for name in dtypes if name in DTYPES] or DTYPES[:1]:
                yield cases.case_for_shape(op, shape, variant, dtype)


def _measured(op_cases: list[Case], clock: Clock, quick: bool, problems: Problems) -> list[Result]:
    budget, without = (QUICK, ("compile",)) if quick else (Budget(), ())
    results: list[Result] = []
    for case in op_cases:
        with problems.collected(f"{case.name}: "):
            results.append(measure(case, clock, budget, without))
            if results[-1].error is not None:
                problems.report(f"{case.name}: WRONG: {results[-1].error}")
    return results


@contextmanager
def _refusing_a_busy_machine() -> Iterator[None]:
    """Busy, and ctrl-C, as one line and an exit code."""
    try:
        yield
    except Busy as busy:
        typer.echo(f"bench: the machine is busy, so nothing that it measures now means anything: {busy}", err=True)
        raise typer.Exit(BUSY) from busy
    except KeyboardInterrupt:
        typer.echo("bench: interrupted", err=True)
        raise typer.Exit(INTERRUPTED) from None


@app.command("grid")
def run_grid(json_file: JsonFile = None, threads: Threads = None) -> None:
    """Ours against torch eager on many shapes, every dtype: exit code 1 if any is wrong, or slower than torch."""
    from bench import grid

    problems = _begin(json_file, None, threads)
    out = report.console()
    with _refusing_a_busy_machine():
        report.print_header(out, record.header())
        points = grid.measure(lambda text: out.print(text, soft_wrap=True, markup=False), problems.report)
    for point in points:
        if point["error"] is not None:
            problems.report(f"{point['name']}: WRONG: {point['error']}")
        elif not point["reached"]:
            problems.report(f"{point['name']}: slower than torch, {point['ratio']:.2f}×")
    enough = sum(point["reached"] for point in points)
    out.print(f"{len(points)} shapes, {enough} of them at {grid.ENOUGH}× torch's speed or more")
    if json_file is not None:
        with problems.collected():
            record.write(json_file, [], grid=points)
    problems.exit()


@app.command("fold")
def run_fold(
    quick: Annotated[bool, typer.Option("--quick", help="Few N, few samples.")] = False,
    json_file: JsonFile = None,
    plot: Annotated[Path | None, typer.Option(help="Draw how time grows with N.")] = None,
    threads: Threads = None,
) -> None:
    """embedding_linear's two plans against N: from where on does its table pay? Prints the table of docs/."""
    from bench import fold

    problems = _begin(json_file, plot, threads)
    with _refusing_a_busy_machine(), problems.collected():
        panels = fold.measure(quick)
        typer.echo(fold.document_table({"header": record.header(), "fold": panels}))
        if json_file is not None:
            record.write(json_file, [], fold=panels)
        if plot is not None:
            fold.draw(panels, plot)
    problems.exit()


@app.command("plans")
def run_plans(
    quick: Annotated[bool, typer.Option("--quick", help="Few N.")] = False,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """The plans that embedding_linear chooses, on a grid: exit code 1 if one takes 10 % longer than the other."""
    from bench import plans

    problems = _begin(json_file, None, threads)
    with _refusing_a_busy_machine(), problems.collected():
        points = plans.measure(quick, problems.report)
        typer.echo(plans.summary(points))
        if json_file is not None:
            record.write(json_file, [], plans=points)
    problems.exit()


@app.command("gpt_step")
def run_gpt_step(
    quick: Annotated[bool, typer.Option("--quick", help="One vocabulary, few samples.")] = False,
    json_file: JsonFile = None,
    threads: Threads = None,
) -> None:
    """A GPT's training step: the share that our ops remove of what embeddings and loss cost in torch."""
    from bench import gpt_step

    problems = _begin(json_file, None, threads)
    with _refusing_a_busy_machine(), problems.collected():
        points = gpt_step.measure(quick)
        typer.echo(gpt_step.summary(points))
        if json_file is not None:
            record.write(json_file, [], gpt_step=points)
    problems.exit()


@app.command()
def compare(before: Path, after: Path) -> None:
    """Show how the time of ours changed between two records, and fail on a regression of more than 10 %."""
    problems = Problems()
    with problems.collected():
        rows = record.changes(record.read(before), record.read(after))
        if not rows:
            raise BadRequest(f"{before} and {after} have no timed case in common")
        report.print_changes(report.console(), rows)
        if any(row["regression"] for row in rows):
            raise typer.Exit(PROBLEM)
    problems.exit()


@app.command()
def table(file: Annotated[Path, typer.Argument(help="A record.")] = record.RECORD) -> None:
    """Print the README's table of speed, or of a record of `fold` that of docs/skip_the_matmul.md, in Markdown."""
    from bench import fold

    problems = Problems()
    with problems.collected():
        content = record.read(file)
        typer.echo(fold.document_table(content) if "fold" in content else record.readme_table(content))
    problems.exit()


if __name__ == "__main__":
    app(prog_name="python -m bench")
