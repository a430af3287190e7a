"""`charlm serve`: a live page about trained models, for this machine alone."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from charlm.cli.common import Device

if TYPE_CHECKING:
    from charlm.serve.models import Served


def serve(
    directories: Annotated[
        list[Path], typer.Argument(help="Folders of one or two trained models.", metavar="DIR [DIR2]")
    ],
    port: Annotated[int, typer.Option(help="TCP port of 127.0.0.1; 0 is any that is free.")] = 0,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    device: Device = "cpu",
) -> None:
    """Serve a live page about trained models, on this machine.

    It shows the surprisal in bits of each character as you type, samples, and compares two models.

    No other machine can open it. Ctrl-C stops it. A model whose files change is loaded again. Needs the extra serve.
    """
    from charlm.lm.terminal import new_console
    from charlm.serve import serve as run

    console = new_console()

    def announce(url: str, models: list[Served]) -> None:
        for model in models:
            console.print(f"{model.directory}: {model.model.config.label}, step {model.step:,}", soft_wrap=True)
        console.print(f"{url} (Ctrl-C stops it)", soft_wrap=True)
        if open_:
            import webbrowser

            webbrowser.open(url)

    run(directories, port=port, device=device, on_start=announce)
    console.print("stopped")
