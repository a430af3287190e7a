"""`charlm score`: the surprisal of each character of a text under a trained model."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charlm._errors import UserError
from charlm.cli.common import Column, Device, Directory, InputFile, Unknown, new_console, unknown_characters_named

if TYPE_CHECKING:
    from rich.console import Console

    from charlm.lm.character_model import CharacterModel

MAX_BYTES = 1_000_000  # of a longer text only the total is printed, not every character
SVG_COLUMNS = 80


@dataclass(frozen=True)
class Scored:
    """An item or a text, and the bits of each of its characters and, in line format, of its end."""

    text: str
    bits: list[float]

    @property
    def total(self) -> float:
        return math.fsum(self.bits)


def score(
    directory: Directory,
    texts: Annotated[
        list[str] | None,
        typer.Argument(help="Texts to score, each on its own. Default: the input file, or standard input."),
    ] = None,
    input_file: InputFile = None,
    column: Column = None,
    unknown: Unknown = "error",
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Context of a prediction in running text: sliding (the full context before it) or fixed "
            "(consecutive windows, as in nanoGPT). Default: sliding.",
            show_default=False,
        ),
    ] = None,
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
            found: list[Scored] | tuple[float, int] = _score(model, texts, options)
        else:
            found = _score_file(model, input_file or Path("-"), column or model.config.column, options)
    scored = None if isinstance(found, tuple) else found
    total, count = _sum(scored) if scored else found
    if not count:
        raise UserError("there is nothing to score: the text is empty")
    if svg is not None:
        if scored is None:
            raise UserError(f"--svg draws every character, and takes a text of at most {MAX_BYTES:,} bytes")
        _write_svg(svg, model, scored, protocol)
    if as_json:
        typer.echo(json.dumps(_to_json(model.format, protocol, total, count, scored), allow_nan=False))
    elif scored is None:
        _show_sum(new_console(), total, count, protocol)
    else:
        _show(new_console(), model, scored, protocol)


def _score(model: CharacterModel, texts: list[str], options: dict[str, Any]) -> list[Scored]:
    texts = [part for text in texts for part in _texts(text, model.format)]
    found = model.surprisals(texts, **options)
    return [Scored(text, bits.tolist()) for text, bits in zip(texts, found, strict=True)]


def _score_file(
    model: CharacterModel, path: Path, column: str, options: dict[str, Any]
) -> list[Scored] | tuple[float, int]:
    """Scores a file; for more than MAX_BYTES, returns only the total in bits and the number of predictions."""
    from charlm.lm.sources import text_of

    blocks, head = text_of([path], column), b""
    for block in blocks:
        head += block
        if len(head) > MAX_BYTES:
            return model.total_surprisal(map(bytes.decode, chain([head], blocks)), **options)
    return _score(model, [head.decode()], options)


def _texts(text: str, format: str) -> list[str]:
    from charlm.lm.data import split_items

    texts = split_items(text) if format == "line" else [text]
    if not any(texts):
        raise UserError("there is nothing to score: the text is empty")
    return texts


def _sum(scored: list[Scored]) -> tuple[float, int]:
    return math.fsum(each.total for each in scored), sum(len(each.bits) for each in scored)


def _show(console: Console, model: CharacterModel, scored: list[Scored], protocol: str) -> None:
    from charlm.lm.display import ITEM_END, legend, print_surprisals

    max_bits = max(1.0, math.log2(len(model.vocabulary)))
    end = [ITEM_END] if model.format == "line" else []
    for each in scored:
        print_surprisals(console, [*each.text, *end], each.bits, max_bits)
        if len(scored) > 1:
            console.print(f"{each.total:.2f} bits\n")
    console.print(legend(max_bits, len(model.vocabulary)), soft_wrap=True)
    _show_sum(console, *_sum(scored), protocol)


def _show_sum(console: Console, total: float, count: int, protocol: str) -> None:
    from charlm.lm.examples import PROTOCOLS

    how = ", with item ends" if protocol == "items" else f" ({PROTOCOLS[protocol]})"
    console.print(
        f"total {total:.2f} bits for {count:,} characters{how}: {total / count:.4f} bits per character", soft_wrap=True
    )


def _write_svg(path: Path, model: CharacterModel, scored: list[Scored], protocol: str) -> None:
    import io

    from rich.console import Console

    from charlm.lm.files import write_atomically

    console = Console(
        record=True,
        file=io.StringIO(),
        width=SVG_COLUMNS,
        force_terminal=True,
        color_system="truecolor",
        no_color=False,
        highlight=False,
    )
    _show(console, model, scored, protocol)
    write_atomically(path, console.export_svg(title="charlm score").encode())


def _to_json(format: str, protocol: str, total: float, count: int, scored: list[Scored] | None) -> dict[str, Any]:
    """The object of `charlm score --json`, in bits; a number that JSON cannot represent is null.

    "items" is null for a text of more than MAX_BYTES, of which only the total is known.
    """
    items = scored and [
        {"text": each.text, "bits": [_finite(bits) for bits in each.bits], "total_bits": _finite(each.total)}
        for each in scored
    ]
    return {
        "format": format,
        "protocol": protocol,
        "items": items,
        "characters": count,
        "total_bits": _finite(total),
        "bits_per_char": _finite(total / count),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
