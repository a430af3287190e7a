"""`charlm entropy`: reference values for the loss of a model of a file."""

from __future__ import annotations

import json
import os
import stat
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from charlm.cli.common import new_console
from charlm.lm.config import Config

if TYPE_CHECKING:
    from rich.console import Console

    from charlm.lm.predictability import Predictability


def entropy(
    file: Annotated[
        Path | None,
        typer.Argument(help="UTF-8 text file; - reads standard input. Default: the 32,000 shipped names."),
    ] = None,
    order: Annotated[int, typer.Option(help="Longest context in characters, from 0 to 20.")] = 5,
    format: Annotated[
        str | None, typer.Option(help="Data format: line (one item per line) or text. Default: guessed.")
    ] = None,
    split_seed: Annotated[int, typer.Option(help="Random seed of the 80/10/10 split.")] = Config.split_seed,
    column: Annotated[
        str | None, typer.Option(help="Column of a .jsonl, .parquet, .csv or .tsv file. Default: text.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only a JSON object, in bits per character.")] = False,
) -> None:
    """Measure how predictable a file is, in bits per character.

    In-sample entropies are computed from the counts of the whole file.

    Held-out losses are those of Kneser-Ney n-grams, fitted on train and measured on dev.
    """
    from charlm.lm.data import data_name, read_text
    from charlm.lm.predictability import measure
    from charlm.lm.sources import check_column

    if column is not None:
        check_column(["column"], file)
    if file is None:
        _hint_at_standard_input()
    name = data_name(file)
    found = measure(read_text(file, column or Config.column), order=order, format=format, seed=split_seed, name=name)
    if as_json:
        typer.echo(json.dumps(found.to_json(), allow_nan=False))
    else:
        _show(new_console(), name, found, guessed=format is None)


def _show(console: Console, name: str, found: Predictability, guessed: bool) -> None:
    from charlm.lm.display import print_entropies
    from charlm.lm.terminal import print_line

    kind = f"{found.format} format{', guessed' if guessed else ''}"
    lines = [
        f"{name}: {found.bytes:,} bytes, {found.characters:,} characters, {found.alphabet:,} of them distinct ({kind})"
    ]
    if found.items is not None:
        share = found.dev_items_in_train / found.dev_items
        lines += [
            f"{found.items:,} items, of which {found.duplicate_items:,} repeat an earlier one",
            f"{found.dev_items_in_train:,} of {found.dev_items:,} dev items ({share:.1%}) also occur in train",
        ]
    lines += ["bits per character, by the length of the context in characters:"]
    for line in lines:
        print_line(console, line)
    print_entropies(console, found.in_sample, found.held_out)
    compressed = ", ".join(f"{compressor} {bits:.4f}" for compressor, bits in found.compressed.items())
    order = ", items shuffled" if found.format == "line" else ""
    print_line(console, f"compressed, bits per character of the whole file{order}: {compressed}")


def _hint_at_standard_input() -> None:
    """Prints how to read standard input if it is a pipe or a file, because the user may expect it to be read."""
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (AttributeError, OSError, ValueError):  # closed, or not a file
        return
    if stat.S_ISFIFO(mode) or stat.S_ISREG(mode):
        typer.echo("charlm: measuring the shipped names; `charlm entropy -` reads standard input", err=True)
