"""`charlm score`: the surprisal of each character of a text under a trained model."""

from __future__ import annotations

import json
import math
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from charlm._errors import UserError
from charlm.cli.common import (
    Column,
    Device,
    Directory,
    InputFile,
    Unknown,
    new_console,
    protocol_option,
    unknown_characters_named,
)

if TYPE_CHECKING:
    from rich.console import Console

    from charlm.lm.character_model import CharacterModel

MAX_BYTES = 1_000_000  # of a longer text only the total is printed, not every character
SVG_COLUMNS = 80
EMPTY = "there is nothing to score: the text is empty"


class Scored(NamedTuple):
    """The bits of all characters and their number; in line format the end of each item is one."""

    total: float
    count: int
    texts: list[tuple[str, list[float]]] | None  # each item or text with its bits; None for more than MAX_BYTES


def score(
    directory: Directory,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to score, each on its own. Default: the input file, or standard input."),
    ] = None,
    input_file: InputFile = None,
    column: Column = None,
    unknown: Unknown = "error",
    protocol: Annotated[str | None, protocol_option("sliding")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only a JSON object, in bits.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Also write the coloured text to this SVG file.")] = None,
    device: Device = "cpu",
) -> None:
    """Score the surprisal of each character, in bits.

    The surprisal of a character is -log2 p, from green (expected) to red (surprising).

    A model of items scores each line including its end; another model scores the whole text.

    For a text of more than 1 MB only the total is printed.
    """
    import charlm
    from charlm.lm.sources import check_column

    if texts and input_file is not None:
        raise UserError("TEXT and --input-file exclude each other")
    if svg is not None and (not svg.name or svg.is_dir()):
        raise UserError(f"cannot write {svg}: Is a directory")
    if column is not None:
        check_column(["column"], input_file)
    model = charlm.load(directory, device)
    protocol = model.protocol(protocol)
    options = {"unit": "bits", "unknown": unknown, "protocol": protocol}
    with unknown_characters_named():
        if texts:
            scored = _score(model, texts, options)
        else:
            scored = _score_file(model, input_file or Path("-"), column or model.config.column, options)
    if svg is not None:
        if scored.texts is None:
            raise UserError(f"--svg draws every character, and takes a text of at most {MAX_BYTES:,} bytes")
        _write_svg(svg, model, scored, protocol)
    if as_json:
        typer.echo(json.dumps(_to_json(model.format, protocol, scored), allow_nan=False))
    else:
        _show(new_console(), model, scored, protocol)


def _score(model: CharacterModel, texts: list[str], options: dict[str, Any]) -> Scored:
    from charlm.lm.data import split_items

    parts = [split_items(text) if model.format == "line" else [text] for text in texts]
    if not all(map(any, parts)):
        raise UserError(EMPTY)
    texts = list(chain(*parts))
    bits = [found.tolist() for found in model.surprisals(texts, **options)]
    return Scored(math.fsum(chain(*bits)), sum(map(len, bits)), list(zip(texts, bits, strict=True)))


def _score_file(model: CharacterModel, path: Path, column: str, options: dict[str, Any]) -> Scored:
    from charlm.lm.sources import text_of

    blocks, head = text_of([path], column), b""
    for block in blocks:
        head += block
        if len(head) > MAX_BYTES:
            total, count = model.total_surprisal(map(bytes.decode, chain([head], blocks)), **options)
            if not count:
                raise UserError(EMPTY)
            return Scored(total, count, None)
    return _score(model, [head.decode()], options)


def _show(console: Console, model: CharacterModel, scored: Scored, protocol: str) -> None:
    from charlm.lm.display import ITEM_END, legend, print_surprisals
    from charlm.lm.examples import PROTOCOLS

    if scored.texts is not None:
        max_bits = max(1.0, math.log2(len(model.vocabulary)))
        end = [ITEM_END] if model.format == "line" else []
        for text, bits in scored.texts:
            print_surprisals(console, [*text, *end], bits, max_bits)
            if len(scored.texts) > 1:
                console.print(f"{math.fsum(bits):.2f} bits\n")
        console.print(legend(max_bits, len(model.vocabulary)), soft_wrap=True)
    how = ", with item ends" if protocol == "items" else f" ({PROTOCOLS[protocol]})"
    mean = scored.total / scored.count
    console.print(
        f"total {scored.total:.2f} bits for {scored.count:,} characters{how}: {mean:.4f} bits per character",
        soft_wrap=True,
    )


def _write_svg(path: Path, model: CharacterModel, scored: Scored, protocol: str) -> None:
    import io

    from rich.console import Console

    from charlm.lm.files import write_atomically

    console = Console(record=True, file=io.StringIO(), width=SVG_COLUMNS, highlight=False)
    _show(console, model, scored, protocol)
    write_atomically(path, console.export_svg(title="charlm score").encode())


def _to_json(format: str, protocol: str, scored: Scored) -> dict[str, Any]:
    """The object of `charlm score --json`, in bits; a number that JSON cannot represent is null."""
    items = scored.texts and [
        {"text": text, "bits": [_finite(each) for each in bits], "total_bits": _finite(math.fsum(bits))}
        for text, bits in scored.texts
    ]
    return {
        "format": format,
        "protocol": protocol,
        "items": items,
        "characters": scored.count,
        "total_bits": _finite(scored.total),
        "bits_per_char": _finite(scored.total / scored.count),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
