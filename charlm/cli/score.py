"""`charlm score`: how surprising each character of a text is to a trained model."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charlm.cli.common import Device, Directory, InputFile, new_console
from charlm.lm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from charlm.lm.character_model import CharacterModel

MAX_BYTES = 1_000_000  # of a text whose every character is printed; `charlm eval` takes files of any size
SVG_COLUMNS = 80


@dataclass(frozen=True)
class Scored:
    """One item, or the text, and the bits of each of its characters (and of its end, in line format)."""

    text: str
    bits: list[float]

    @property
    def total(self) -> float:
        return math.fsum(self.bits)


def score(
    directory: Directory,
    text: Annotated[str | None, typer.Argument(help="What to score; without it and -i: standard input.")] = None,
    input_file: InputFile = None,
    unknown: Annotated[
        str, typer.Option(help="A character outside the vocabulary: error, or escape at its cost of about 32 bits.")
    ] = "error",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else; bits.")] = False,
    svg: Annotated[Path | None, typer.Option(help="Write the coloured picture here as well.")] = None,
    device: Device = "cpu",
) -> None:
    """How surprising each character is, in bits.

    The surprisal of a character is -log2 p: green is expected, red a surprise.

    A model of items scores each line, its end included; another the whole text.
    """
    import charlm

    if text is not None and input_file is not None:
        raise UserError("TEXT and --input-file exclude each other")
    model = charlm.load(directory, device)
    texts = _texts(_read(input_file) if text is None else text, model.format)
    scored = [
        Scored(text, bits.tolist())
        for text, bits in zip(texts, model.surprisals(texts, unit="bits", unknown=unknown), strict=True)
    ]
    if svg is not None:
        _write_svg(svg, model, scored)
    if as_json:
        typer.echo(json.dumps(_to_json(model, scored), allow_nan=False))
    else:
        _show(new_console(), model, scored)


def _read(path: Path | None) -> str:
    """The text of a file, or of standard input, of at most MAX_BYTES."""
    from charlm.lm.data import decode_text

    name = "standard input" if path is None else str(path)
    try:
        if path is None:
            raw = sys.stdin.buffer.read(MAX_BYTES + 1)
        else:
            with path.open("rb") as file:
                raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read {name}: {error.strerror}") from error
    if len(raw) > MAX_BYTES:
        raise UserError(f"{name} has more than {MAX_BYTES:,} bytes, and score prints every character: give it a part")
    return decode_text(raw, name)


def _texts(text: str, format: str) -> list[str]:
    texts = [item for line in text.split("\n") if (item := line.strip())] if format == "line" else [text]
    if not any(texts):
        raise UserError("there is nothing to score: the text is empty")
    return texts


def _show(console: Console, model: CharacterModel, scored: list[Scored]) -> None:
    from charlm.lm.heatmap import END, legend, print_surprisals

    worst = max(1.0, math.log2(len(model.vocabulary)))
    end = [END] if model.format == "line" else []
    for each in scored:
        print_surprisals(console, [*each.text, *end], each.bits, worst)
        if len(scored) > 1:
            console.print(f"{each.total:.2f} bits\n")
    console.print(legend(worst, len(model.vocabulary)), soft_wrap=True)
    total = math.fsum(each.total for each in scored)
    count = sum(len(each.bits) for each in scored)
    ends = ", an item's end being one" if end else ""
    console.print(
        f"total {total:.2f} bits for {count:,} characters{ends}: {total / count:.4f} bits per character", soft_wrap=True
    )


def _write_svg(path: Path, model: CharacterModel, scored: list[Scored]) -> None:
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
    _show(console, model, scored)
    write_atomically(path, console.export_svg(title="charlm score").encode())


def _to_json(model: CharacterModel, scored: list[Scored]) -> dict[str, Any]:
    """The fixed form of `charlm score --json`: bits throughout; a number that JSON cannot hold is null."""
    total = math.fsum(each.total for each in scored)
    count = sum(len(each.bits) for each in scored)
    items = [
        {"text": each.text, "bits": [_finite(bits) for bits in each.bits], "total_bits": _finite(each.total)}
        for each in scored
    ]
    return {
        "format": model.format,
        "items": items,
        "characters": count,
        "total_bits": _finite(total),
        "bits_per_char": _finite(total / count),
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
