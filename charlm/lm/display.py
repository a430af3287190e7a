"""What the commands print: the live progress, the table of losses, the samples. On rich."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import zip_longest
from types import TracebackType

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.table import Column
from rich.text import Text

from charlm.lm.compare import Comparison
from charlm.lm.evaluate import Evaluation
from charlm.lm.examples import PROTOCOLS
from charlm.lm.terminal import print_line, print_table, visible
from charlm.lm.train import Progress

SECONDS_BETWEEN_LINES = 10.0
SAMPLE_COLUMN = 32  # a longer sample pushes its mark to the right, and no other's


class Bar(RichProgress):
    """A bar that leaves room behind it: the terminal writes ^C there, and a line that it made longer than the terminal
    is wide would be two, of which only one is ever taken back."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from map(Shorter, super().get_renderables())


@dataclass
class Shorter:
    """What it holds, in a line that is shorter than the terminal by two ^C."""

    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        yield Constrain(self.renderable, max(1, options.max_width - len("^C^C")))


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
            # What a narrow terminal cuts off is the end of this text, never the steps.
            TextColumn(
                "training {task.completed:.0f}/{task.total:.0f} {task.fields[losses]}",
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
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
        self.bar.update(self.task, completed=progress.step, losses=self.losses())
        self.bar.refresh()

    def _print_line(self, progress: Progress) -> None:
        """Says what was measured since the line before: of an older loss it would be an untrue line."""
        self.console.print(f"step {progress.step}/{self.max_steps} · {self.losses(progress.step)}", soft_wrap=True)
        self.printed_at = time.monotonic()
        self.train = self.dev = None

    def stopped_at(self, step: int) -> None:
        """Leaves the bar where the run stopped, which may be between two lines of its log."""
        self.bar.update(self.task, completed=step)

    def advise(self, text: str) -> None:
        """Prints a sentence above the bar."""
        self.console.print(text, soft_wrap=True)

    def losses(self, step: int | None = None) -> str:
        """The latest train and dev loss, each with its step where that is not `step`, and the speed of training."""
        parts = []
        for progress in (self.train, self.dev):
            if progress is not None:
                of_another = step is not None and progress.step != step
                at = f" (at step {progress.step})" if of_another else ""
                parts.append(f"{progress.split} {progress.nats:.4f}{at}")
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
    print_line(console, title)
    table = {
        "model": [visible(name) for name in rows],
        "nats": [f"{row.nats:.4f}" for row in rows.values()],
        "bits per character": [f"{row.bits_per_char:.4f}" for row in rows.values()],
        "perplexity": [f"{row.perplexity:.3f}" for row in rows.values()],
    }
    print_table(console, table, folded="model")


def print_comparison(console: Console, rows: list[Comparison], units: str) -> None:
    """One table of models on one split; `units` is what the standard error was taken over."""
    evaluation = rows[0].evaluation
    print_line(
        console,
        f"loss on {evaluation.split}, {evaluation.tokens:,} tokens; ± is one standard error, over {units}; "
        "seconds are of this evaluation",
    )
    table = {"model": [visible(row.name if row.name == row.type else f"{row.name} ({row.type})") for row in rows]}
    if evaluation.protocol != "items":
        table["context"] = [PROTOCOLS[row.evaluation.protocol] for row in rows]
    table |= {
        "nats": [f"{row.evaluation.nats:.4f}" for row in rows],
        "±": ["-" if math.isnan(row.standard_error) else f"{row.standard_error:.4f}" for row in rows],
        "bits per character": [f"{row.evaluation.bits_per_char:.4f}" for row in rows],
        "perplexity": [f"{row.evaluation.perplexity:.3f}" for row in rows],
        "parameters": [f"{row.parameters:,}" for row in rows],
        "seconds": [f"{row.seconds:.2f}" for row in rows],
    }
    print_table(console, table, folded="model")


def print_entropies(console: Console, in_sample: list[float], held_out: list[float]) -> None:
    """A row for each length of context, from 0 on: bits a character, "-" where there is no such length."""
    pairs = list(zip_longest(in_sample, held_out))
    shown = [["-" if bits is None else f"{bits:.4f}" for bits in column] for column in zip(*pairs, strict=True)]
    lengths = [str(length) for length in range(len(pairs))]
    print_table(console, {"context": lengths, "in-sample, whole file": shown[0], "held-out on dev": shown[1]})


def print_items(console: Console, samples: list[str], standing: list[str] | None) -> None:
    """Sampled items, one a line, each with where it stands in the data if that is known."""
    shown = [visible(text) for text in samples]
    if standing is None:
        for text in shown:
            console.print(Text(text), soft_wrap=True)
        return
    width = min(max(map(cell_len, shown)), SAMPLE_COLUMN)
    for text, place in zip(shown, standing, strict=True):
        gap = " " * (max(0, width - cell_len(text)) + 2)
        console.print(Text.assemble(text, gap, (place, "green" if place == "new" else "dim")), soft_wrap=True)


def print_passages(console: Console, samples: list[str]) -> None:
    """Samples of running text, a rule between them."""
    for text in samples:
        console.rule(characters="-")
        console.print(Text(visible(text, keep="\n\t")), soft_wrap=True)
