"""What comes from data, models and file names is printed so that it cannot act on the terminal, and nothing is cut off.

Everything that a command prints for people goes through `new_console` or `visible`; JSON has escapes of its own.
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
# surrogates (undecodable bytes of a file name), and format characters: the bidirectional ones reorder what is read,
# the others are not seen. The joiners U+200C and U+200D spell words and emoji, and stay.
ACTING = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e0fff]"
)
WIDE = 100_000  # columns: wider than any line


def visible(text: str, keep: str = "") -> str:
    """`text` with each character that would act on a terminal as its escape, "\\x1b"; those in `keep` stay."""
    return ACTING.sub(lambda found: found[0] if found[0] in keep else _escape(found[0]), text)


def _escape(character: str) -> str:
    return character.encode("unicode_escape").decode()


class SafeConsole(Console):
    """A console on which no text acts: a net under callers, who escape where a width is counted."""

    def print(self, *objects: Any, **options: Any) -> None:  # rich drops BEL, BS, VT, FF and CR from a string
        shown = (visible(each, keep="\n\t") if isinstance(each, str) else each for each in objects)
        super().print(*shown, **options)

    def on_broken_pipe(self) -> None:  # rich would end the process here, and a run with it that is not saved
        raise BrokenPipeError(errno.EPIPE, "the reader of the output has gone")

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=visible(segment.text, keep="\n"))


def new_console() -> Console:
    """Standard output; rich leaves colours out where it is no terminal, and reads no markup in what is printed."""
    return SafeConsole(highlight=False, markup=False, emoji=False)


def print_line(console: Console, text: str) -> None:
    """Prints `text`, broken between words on a terminal, whole elsewhere."""
    console.print(text, soft_wrap=not console.is_terminal)


def print_table(console: Console, headers: dict[str, list[str]], folded: str | None = None) -> None:
    """Prints a table whose columns are `headers`; what is in no column named `folded` is never broken inside a word.

    Elsewhere a row is a line. On a terminal that is too narrow for that, words stand below each other, cells move
    together, and last the column `folded` is broken anywhere; narrower than that the terminal breaks the lines.
    """
    for padding in (1, 0):
        table = Table(padding=(0, padding))
        for header, cells in headers.items():
            words = [header] if header == folded else [header, *cells]
            least = max(len(word) for cell in words for word in cell.split())
            justify = "left" if header == folded else "right"
            table.add_column(header, justify=justify, overflow="fold", min_width=least)
        for row in zip(*headers.values(), strict=True):
            table.add_row(*map(Text, row))
        needed = 1 + sum((column.min_width or 0) + 2 * padding + 1 for column in table.columns)
        if not console.is_terminal or needed <= console.width:
            break
    if console.is_terminal and needed <= console.width:
        natural = Measurement.get(console, console.options.update(max_width=WIDE), table).maximum
        if natural > console.width:
            for column in table.columns:
                column.width = None if column.header == folded else column.min_width
        console.print(table)
        return
    width = console.width
    console.width = WIDE
    try:
        console.print(table)
    finally:
        console.width = width
