"""What the commands print: the live progress, the table of losses, the samples. On rich."""

from __future__ import annotations

import math
import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.table import Column, Table
from rich.text import Text

from charlm.lm.compare import Comparison
from charlm.lm.evaluate import Evaluation
from charlm.lm.examples import PROTOCOLS
from charlm.lm.train import Progress

SECONDS_BETWEEN_LINES = 10.0
SAMPLE_COLUMN = 32  # a longer sample pushes its mark to the right, and no other's


class ProgressReport:
    """Shows a training run: a live bar on a terminal, elsewhere a line for each evaluation on dev, and in between one
    of the training loss where SECONDS_BETWEEN_LINES have passed.

    A context manager; call it with each `Progress`.
    """

    def __init__(self, console: Console, max_steps: int, step: int) -> None:
        self.console = console
        self.max_steps = max_steps
        self.train: Progress | None = None
        self.dev: Progress | None = None
        # Refreshed by hand: rich's own thread would compete with the training loop for the interpreter.
        self.bar = Bar(
            TextColumn("training", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[losses]}", table_column=Column(no_wrap=True)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=console,
            auto_refresh=False,
            disable=not console.is_terminal,
        )
        self.task = self.bar.add_task("training", total=max_steps, completed=step, losses="")
        self.printed_at = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if progress.split == "train":
            self.train = progress
        else:
            self.dev = progress
        if not self.console.is_terminal:
            if progress.split == "dev" or time.monotonic() - self.printed_at >= SECONDS_BETWEEN_LINES:
                self._print_line(progress)
            return
        self.bar.update(self.task, completed=progress.step, losses=self.losses(progress.step))
        self.bar.refresh()

    def _print_line(self, progress: Progress) -> None:
        """Says what was measured since the line before: of an older loss it would be an untrue line."""
        self.console.print(f"step {progress.step}/{self.max_steps} · {self.losses(progress.step)}", soft_wrap=True)
        self.printed_at = time.monotonic()
        self.train = self.dev = None

    def advise(self, text: str) -> None:
        """Prints a sentence above the bar."""
        self.console.print(text, soft_wrap=True)

    def losses(self, step: int) -> str:
        """The latest train and dev loss, each with its step where that is not `step`, and the speed of training."""
        found = [p for p in (self.train, self.dev) if p is not None]
        parts = [f"{p.split} {p.nats:.4f}{'' if p.step == step else f' (step {p.step})'}" for p in found]
        text = " · ".join(parts) + " nats"
        return text if self.train is None else f"{text} · {self.train.tokens_per_second:,.0f} tokens/s"

    def __enter__(self) -> ProgressReport:
        self.bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.bar.stop()


def print_losses(console: Console, title: str, rows: dict[str, Evaluation]) -> None:
    """A title, and under it a table of models and their losses on one split."""
    console.print(title)
    table = Table()
    table.add_column("model")
    for column in ("nats", "bits per character", "perplexity"):
        table.add_column(column, justify="right")
    for name, result in rows.items():
        table.add_row(Text(name), f"{result.nats:.4f}", f"{result.bits_per_char:.4f}", f"{result.perplexity:.3f}")
    console.print(table)


def print_comparison(console: Console, rows: list[Comparison], units: str) -> None:
    """One table of models on one split; `units` is what the standard error was taken over."""
    evaluation = rows[0].evaluation
    console.print(
        f"loss on {evaluation.split}, {evaluation.tokens:,} tokens; ± is one standard error, over {units}; "
        "seconds are of this evaluation",
        soft_wrap=True,
    )
    table = Table()
    table.add_column("model", overflow="fold")
    if evaluation.protocol != "items":
        table.add_column("context")
    for column in ("nats", "±", "bits per character", "perplexity", "parameters", "seconds"):
        table.add_column(column, justify="right", min_width=max(map(len, column.split())))
    for row in rows:
        loss = row.evaluation
        name = row.name if row.name == row.type else f"{row.name} ({row.type})"
        error = "-" if math.isnan(row.standard_error) else f"{row.standard_error:.4f}"
        figures = (f"{loss.nats:.4f}", error, f"{loss.bits_per_char:.4f}", f"{loss.perplexity:.3f}")
        protocol = [] if evaluation.protocol == "items" else [PROTOCOLS[loss.protocol]]
        table.add_row(Text(name), *protocol, *figures, f"{row.parameters:,}", f"{row.seconds:.2f}")
    console.print(table)


def print_items(console: Console, samples: list[str], standing: list[str] | None) -> None:
    """Sampled items, one a line, each with where it stands in the data if that is known."""
    if standing is None:
        for text in samples:
            console.print(Text(text), soft_wrap=True)
        return
    width = min(max(len(text) for text in samples), SAMPLE_COLUMN)
    for text, place in zip(samples, standing, strict=True):
        marked = Text.assemble(text.ljust(width), "  ", (place, "green" if place == "new" else "dim"))
        console.print(marked, soft_wrap=True)


def print_passages(console: Console, samples: list[str]) -> None:
    """Samples of running text, a rule between them."""
    for text in samples:
        console.rule(characters="-")
        console.print(Text(text), soft_wrap=True)
