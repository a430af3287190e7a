"""Surprisals on a terminal: each character in a cell from green to red, its bits below it. On rich.

The scale does not depend on the text, so that two texts can be compared: green is 0 bits, a sure guess; red is
log2 V bits, what a guess among the V tokens costs, and all above.
"""

from __future__ import annotations

import colorsys
import unicodedata
from collections.abc import Iterator

from rich.cells import cell_len
from rich.color import Color
from rich.console import Console
from rich.style import Style
from rich.text import Text

CELL = 6  # columns: "U+000A", "1088.5"
END = "end"  # the end of an item, in its cell
LEGEND_STEPS = 5


def print_surprisals(console: Console, characters: list[str], bits: list[float], worst: float) -> None:
    """`characters` in rows as wide as the console, each above its `bits`; a row ends behind a newline.

    worst: the bits from which on a cell is red.
    """
    columns = max(1, console.width // CELL)
    for start, stop in _rows(characters, columns):
        styles = [heat(value / worst) for value in bits[start:stop]]
        above = [_cell(glyph(character)) for character in characters[start:stop]]
        below = [_cell(f"{value:.1f}") for value in bits[start:stop]]
        for line in (above, below):
            console.print(Text.assemble(*zip(line, styles, strict=True)), no_wrap=True, soft_wrap=True)


def legend(worst: float, vocab_size: int) -> Text:
    """What the colours say."""
    values = [worst * step / (LEGEND_STEPS - 1) for step in range(LEGEND_STEPS)]
    cells = [(_cell(f"{value:.1f}"), heat(value / worst)) for value in values]
    return Text.assemble("bits: ", *cells, f" and more; {worst:.1f} is a guess among {vocab_size} tokens")


def heat(share: float) -> Style:
    """Black on green (0) over yellow to red (1 and more)."""
    hue = (1 - min(max(share, 0.0), 1.0)) / 3
    rgb = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.55, 0.95))
    return Style(color="black", bgcolor=Color.from_rgb(*rgb))


def glyph(character: str) -> str:
    """`character` as something that is seen and does nothing to the terminal."""
    if character in SHOWN:
        return SHOWN[character]
    if len(character) == 1 and not character.isprintable():
        return f"U+{ord(character):04X}"
    return f"◌{character}" if unicodedata.combining(character[0]) else character


SHOWN = {" ": "␣", "\n": "↵", "\t": "⇥"}


def _cell(text: str) -> str:
    """`text` in the middle of a cell; wide characters count as two columns."""
    free = max(0, CELL - cell_len(text))
    return " " * (free - free // 2) + text + " " * (free // 2)


def _rows(characters: list[str], columns: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each row: at most `columns` characters, the last one where a newline stands."""
    start = 0
    for index, character in enumerate(characters, 1):
        if character == "\n" or index - start == columns or index == len(characters):
            yield start, index
            start = index
