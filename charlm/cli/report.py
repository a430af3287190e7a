"""`charlm report`: one HTML file that shows trained models."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from charlm.cli.common import Device, TrainingData


def report(
    directories: Annotated[list[Path], typer.Argument(help="Folders of trained models, written by `charlm train -o`.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="HTML file to write.")] = Path("report.html"),
    open_: Annotated[bool, typer.Option("--open", help="Open the file in the browser.")] = False,
    input_file: TrainingData = None,
    device: Device = "cpu",
) -> None:
    """Show trained models of the same data in one HTML file.

    Loss, baselines, embedding, bigrams, activations, gradients, surprisal in bits, calibration and samples.

    Needs the extra report. The file needs no network; of a large text a sample is measured, which it states.
    """
    from charlm.lm.display import progress_bar
    from charlm.lm.terminal import new_console
    from charlm.report import write

    with progress_bar("report") as bar:
        write(directories, output, input_file=input_file, device=device, on_progress=bar)
    new_console().print(f"wrote {output} ({output.stat().st_size / 1e6:.1f} MB)", soft_wrap=True)
    if open_:
        import webbrowser

        webbrowser.open(output.resolve().as_uri())
