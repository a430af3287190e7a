"""The command line, `charlm`: a file for each command.

A command parses its options, calls charlm.lm and prints the result. It imports its dependencies when it runs, so that
`charlm --help` is fast. An error that the user can correct is one sentence on stderr and exit code 2. A training run
that is stopped by a signal saves its state and exits with 128 + the number of the signal, as is usual in shells.
"""

from __future__ import annotations

from typing import Annotated

import charlm.lm  # noqa: F401  (before typer: its ImportError says what to install)

# isort: split
import typer

from charlm._version import __version__
from charlm.cli import compare, compress, entropy, eval, export, info, prepare, report, sample, score, serve, train
from charlm.cli.common import prepare_streams, reports_user_errors

__all__ = ["app", "main"]

app = typer.Typer(
    help="Character-level language models: train them, sample from them, and measure surprise.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"charlm {__version__}")
        raise typer.Exit


@app.callback()
def _charlm(
    version: Annotated[
        bool,
        typer.Option("--version", help="Show the version and exit.", callback=_print_version, is_eager=True),
    ] = False,
) -> None:
    """The options before a command."""


app.command("prepare")(reports_user_errors(prepare.prepare))
app.command("train")(reports_user_errors(train.train))
app.command("sample")(reports_user_errors(sample.sample))
app.command("score")(reports_user_errors(score.score))
app.command("eval")(reports_user_errors(eval.evaluate))
app.command("compare")(reports_user_errors(compare.compare))
app.command("report")(reports_user_errors(report.report))
app.command("serve")(reports_user_errors(serve.serve))
app.command("export")(reports_user_errors(export.export))
app.command("entropy")(reports_user_errors(entropy.entropy))
app.command("compress")(reports_user_errors(compress.compress))
app.command("decompress")(reports_user_errors(compress.decompress))
app.command("info")(reports_user_errors(info.info))


def main() -> None:
    prepare_streams()
    try:
        app(prog_name="charlm")
    except SystemExit as end:
        train.end_process(end)
        raise
