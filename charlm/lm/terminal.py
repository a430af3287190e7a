"""Safe terminal output: control characters from data, models and file names are escaped, and tables are not cut off.

All human-readable output of a command goes through `new_console` or `visible`; JSON has its own escapes.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.measure import Measurement
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

# C0 and C1 controls (ESC begins the sequences that change a window's title), line and paragraph separators, lone
# surrogates (undecodable bytes of a file name), and format characters: bidirectional ones reorder the text, the others
# are invisible. The joiners U+200C and U+200D are part of words and emoji and are not escaped.
CONTROLS = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
UNLIMITED_WIDTH = 100_000  # columns: wider than any line


def visible(text: str, keep: str = "") -> str:
    """`text` with every control character outside `keep` replaced by its escape, such as "\\x1b"."""
    return CONTROLS.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class SafeConsole(Console):
    """A console that escapes control characters in all text. Callers escape it themselves where they need its width."""

    def print(self, *objects: Any, **options: Any) -> None:  # rich would drop BEL, BS, VT, FF and CR from a string
        shown = (visible(each, keep="\n\t") if isinstance(each, str) else each for each in objects)
        super().print(*shown, **options)

    def on_broken_pipe(self) -> None:  # rich would exit here, before a run is saved
        raise BrokenPipeError(errno.EPIPE, "the reader of the output has gone")

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, keep="\n"))


def new_console() -> Console:
    """A console on standard output that interprets no markup; rich omits colours unless it is a terminal."""
    return SafeConsole(highlight=False, markup=False, emoji=False)


def print_line(console: Console, text: str) -> None:
    """Prints `text`, wrapped between words on a terminal and as a single line elsewhere."""
    console.print(text, soft_wrap=not console.is_terminal)


def print_table(console: Console, headers: dict[str, list[str]], folded: str | None = None) -> None:
    """Prints a table; only the column `folded` may be broken inside a word.

    On a terminal that is too narrow, cells are wrapped between words, then the padding is removed, then the column
    `folded` is broken anywhere. On a terminal that is narrower still, and elsewhere, each row is one line.

    Args:
        console: Where to print.
        headers: The cells of each column by its header.
        folded: The header of the column that may be broken inside a word.
    """
    for padding in (1, 0):
        table = Table(padding=(0, padding))
        for header, cells in headers.items():
            words = [header] if header == folded else [header, *cells]
            min_width = max(len(word) for cell in words for word in cell.split())
            justify = "left" if header == folded else "right"
            table.add_column(header, justify=justify, overflow="fold", min_width=min_width)
        for row in zip(*headers.values(), strict=True):
            table.add_row(*map(Text, row))
        needed = 1 + sum((column.min_width or 0) + 2 * padding + 1 for column in table.columns)
        if not console.is_terminal or needed <= console.width:
            break
    if console.is_terminal and needed <= console.width:
        natural = Measurement.get(console, console.options.update(max_width=UNLIMITED_WIDTH), table).maximum
        if natural > console.width:
            for column in table.columns:
                column.width = None if column.header == folded else column.min_width
        console.print(table)
        return
    width = console.width
    console.width = UNLIMITED_WIDTH
    try:
        console.print(table)
    finally:
        console.width = width
