"""`charlm info`: versions, instruction sets, CUDA and threads."""

from __future__ import annotations

import typer


def info() -> None:
    """Show what charlm was built with and runs with."""
    import charlm

    for name, value in charlm.build_info().items():
        shown = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{name.replace('_', ' ')}: {'-' if shown in (None, '') else shown}")
