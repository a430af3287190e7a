"""The output of the commands, printed with rich: progress, tables of losses, samples, and the heatmap of surprisals.

The colours of the heatmap do not depend on the text, so that two texts can be compared: green is 0 bits, and red is
log2 V bits or more, the cost of a uniform guess among V tokens.
"""

from __future__ import annotations

import colorsys
import math
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import zip_longest

from rich.cells import cell_len
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType
from rich.constrain import Constrain
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.style import Style
from rich.table import Column
from rich.text import Text

from charlm._errors import UserError
from charlm.lm.config import Config
from charlm.lm.corpus import Corpus
from charlm.lm.evaluate import Comparison, Evaluation
from charlm.lm.examples import PROTOCOLS
from charlm.lm.inputs import STREAM
from charlm.lm.memory import estimate_bytes, format_bytes
from charlm.lm.parallel import is_sharded
from charlm.lm.sample import SamplingOptions, sample
from charlm.lm.terminal import print_line, print_table, visible
from charlm.lm.train import Progress, Trainer

SECONDS_BETWEEN_LINES = 10.0
PRINTED_ITEMS, PRINTED_CHARACTERS = 5, 80  # of the samples that are printed during training
SAMPLE_COLUMN = 32  # maximum width of the column of samples; a longer sample shifts only its own mark
CELL_WIDTH = 6  # columns of a heatmap cell, enough for "U+000A" and "1088.5"
ITEM_END = "end"  # the heatmap cell for the end of an item
LEGEND_STEPS = 5
GLYPHS = {" ": "␣", "\n": "↵", "\t": "⇥"}


class Bar(RichProgress):
    """A progress bar that leaves the end of the line free, where the terminal echoes ^C.

    Otherwise the echo would wrap the line, and rich would erase only the second half of it.
    """

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from map(Narrower, super().get_renderables())


@dataclass
class Narrower:
    """Renders its content in a line that is narrower than the terminal by the width of two ^C."""

    renderable: RenderableType

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterable[RenderableType]:
        yield Constrain(self.renderable, max(1, options.max_width - len("^C^C")))


class ProgressReport:
    """Shows the progress of a training run: a context manager that is called with each `Progress`.

    On a terminal, and in Jupyter with ipywidgets, it is a live bar. Elsewhere it prints a line for each evaluation on
    dev, and for the training loss whenever SECONDS_BETWEEN_LINES have passed since the last line.
    """

    def __init__(self, console: Console, max_steps: int, step: int) -> None:
        self.console = console
        self.max_steps = max_steps
        self.train: Progress | None = None
        self.dev: Progress | None = None
        self.is_live = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        # Refreshed manually: rich's refresh thread would compete with the training loop for the GIL.
        self.bar = Bar(
            # A narrow terminal truncates the end of this text, never the steps.
            TextColumn(
                "training {task.completed:.0f}/{task.total:.0f} {task.fields[losses]}",
                table_column=Column(no_wrap=True, overflow="ellipsis"),
            ),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            TimeRemainingColumn(table_column=Column(no_wrap=True)),
            console=console,
            auto_refresh=False,
            disable=not self.is_live or console.quiet,
        )
        self.task = self.bar.add_task("training", total=max_steps, completed=step, losses="")
        self.printed_at = time.monotonic()

    def __call__(self, progress: Progress) -> None:
        if progress.split == "train":
            self.train = progress
        else:
            self.dev = progress
        if not self.is_live:
            if progress.split == "dev" or time.monotonic() - self.printed_at >= SECONDS_BETWEEN_LINES:
                self._print_line(progress)
            return
        self.bar.update(self.task, completed=progress.step, losses=self.losses())
        self.bar.refresh()

    def _print_line(self, progress: Progress) -> None:
        """Prints the losses that were measured since the last line, and forgets them."""
        self.console.print(f"step {progress.step}/{self.max_steps} · {self.losses(progress.step)}", soft_wrap=True)
        self.printed_at = time.monotonic()
        self.train = self.dev = None

    def stopped_at(self, step: int) -> None:
        """Sets the bar to the last step of the run, which may lie between two reports."""
        self.bar.update(self.task, completed=step)

    def losses(self, step: int | None = None) -> str:
        """The latest train and dev losses, with their step if it differs from `step`, and the speed of training."""
        parts = []
        for progress in (self.train, self.dev):
            if progress is not None:
                differs = step is not None and progress.step != step
                at = f" (at step {progress.step})" if differs else ""
                error = "" if progress.standard_error is None else f" ± {progress.standard_error:.4f}"
                parts.append(f"{progress.split} {progress.nats:.4f}{error}{at}")
        text = " · ".join(parts) + " nats"
        return text if self.train is None else f"{text} · {self.train.tokens_per_second:,.0f} tokens/s"

    def __enter__(self) -> ProgressReport:
        self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.bar.stop()


@contextmanager
def progress_bar(name: str, silent: bool = False) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar on standard error, where this is a terminal: a function of (stage, done, total or 0)."""
    console = Console(stderr=True)
    columns = (TextColumn("{task.description} {task.completed:,.0f}"), BarColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, disable=silent or not console.is_terminal, transient=True) as bar:
        task = bar.add_task(name, total=None)

        def report(stage: str, done: int, total: int) -> None:
            bar.update(task, description=f"{stage} {name}", completed=done, total=total or None)

        yield report


def print_data(console: Console, config: Config, corpus: Corpus, guessed: str, source: str | None = None) -> None:
    """Prints what a run trains on; `guessed` follows the format, and `source` stands for the path of the data."""
    sizes = corpus.sizes
    unit = "characters" if corpus.format == "text" else "items"
    counts = ", ".join(f"{name} {size:,}" for name, size in sizes.items())
    source = source or config.input_file or "the names shipped with charlm"
    console.print(
        f"{'standard input or a pipe' if source == STREAM else source}: {sum(sizes.values()):,} {unit} "
        f"({corpus.format} format{guessed}); {counts}; {len(corpus.vocabulary)} tokens",
        soft_wrap=True,
    )
    if corpus.duplicates_removed:
        console.print(f"{corpus.duplicates_removed:,} duplicates removed")
    overlap = corpus.overlap()
    if overlap is not None:
        console.print(f"{overlap:,} of {sizes['dev']:,} dev items ({overlap / sizes['dev']:.1%}) also occur in train")


def print_model(console: Console, trainer: Trainer) -> None:
    """Prints what a run trains: its size, steps and memory."""
    config, corpus, parallel = trainer.config, trainer.corpus, trainer.parallel
    tokens = corpus.tokens("dev")
    if tokens > config.eval_tokens:
        console.print(
            f"evaluations during training take a fixed sample of about {config.eval_tokens:,} of the {tokens:,} dev "
            "tokens, ± is its standard error; the last one takes all",
            soft_wrap=True,
        )
    parameters = sum(p.numel() for p in trainer.model.parameters())
    start = f", resumed at step {trainer.step}" if trainer.step else ""
    work = "a count model"
    if parameters:
        memory = format_bytes(estimate_bytes(config, corpus, trainer.processes.launch, parallel))
        work = f"{parameters:,} parameters, {config.max_steps:,} steps on {config.device}, about {memory} of memory"
    if trainer.processes.size > 1:
        work += f", {trainer.processes.size} processes ({parallel})"
    console.print(f"{config.label}: {work}{start}", soft_wrap=True)
    for sentence in trainer.origin.values():
        console.print(f"from {visible(sentence)}", soft_wrap=True)
    if parameters and trainer.step >= config.max_steps:
        console.print(f"these were all its steps: more --max-steps than {config.max_steps} continue it")


def sampling_every(console: Console, trainer: Trainer, steps: int) -> Callable[[], None] | None:
    """A function that prints samples after every `steps` steps, for `Trainer.run`; None for 0.

    The seed is always the same, so that the samples of two steps can be compared.

    Raises:
        UserError: `steps` is negative, or the model is divided among processes, which would have to sample together.
    """
    if steps < 0:
        raise UserError(f"sample_every is {steps}, but must be at least 0")
    if not steps:
        return None
    if is_sharded(trainer.model):
        raise UserError("--sample-every cannot sample from a model that --parallel fsdp has divided: leave it out")
    is_line = trainer.corpus.format == "line"
    options = SamplingOptions(PRINTED_ITEMS if is_line else 1, max_new_tokens=None if is_line else PRINTED_CHARACTERS)

    def print_samples() -> None:
        if trainer.step % steps == 0 and trainer.processes.rank == 0:
            samples = sample(trainer.model, trainer.corpus.vocabulary, options, trainer.device)
            shown = ", ".join(samples) if is_line else repr(samples[0])
            console.print(f"step {trainer.step}: {visible(shown)}", soft_wrap=True)
            if trainer.board is not None:
                trainer.board.samples(trainer.step, samples)

    return print_samples


def print_losses(console: Console, title: str, rows: dict[str, Evaluation]) -> None:
    """Prints a title and a table of the losses of models on one split."""
    print_line(console, title)
    table = {
        "model": [visible(name) for name in rows],
        "nats": [f"{row.nats:.4f}" for row in rows.values()],
        "bits per character": [f"{row.bits_per_char:.4f}" for row in rows.values()],
        "perplexity": [f"{row.perplexity:.3f}" for row in rows.values()],
    }
    print_table(console, table, folded="model")


def print_comparison(console: Console, rows: list[Comparison], units: str) -> None:
    """Prints a table that compares models on one split; `units` names the units of the standard error."""
    evaluation = rows[0].evaluation
    print_line(
        console,
        f"loss on {evaluation.split}, {evaluation.tokens:,} tokens; ± is one standard error over {units}; "
        "seconds are the time of this evaluation",
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
    """Prints a row per context length, from 0 on, in bits per character; "-" where there is no value."""
    pairs = list(zip_longest(in_sample, held_out))
    shown = [["-" if bits is None else f"{bits:.4f}" for bits in column] for column in zip(*pairs, strict=True)]
    lengths = [str(length) for length in range(len(pairs))]
    print_table(console, {"context": lengths, "in-sample, whole file": shown[0], "held-out on dev": shown[1]})


def print_items(console: Console, samples: list[str], splits: list[str] | None) -> None:
    """Prints sampled items, one per line; each is marked with its entry in `splits` if the data is known."""
    shown = [visible(text) for text in samples]
    if splits is None:
        for text in shown:
            console.print(Text(text), soft_wrap=True)
        return
    width = min(max(map(cell_len, shown)), SAMPLE_COLUMN)
    for text, mark in zip(shown, splits, strict=True):
        gap = " " * (max(0, width - cell_len(text)) + 2)
        console.print(Text.assemble(text, gap, (mark, "green" if mark == "new" else "dim")), soft_wrap=True)


def print_passages(console: Console, samples: list[str]) -> None:
    """Prints samples of running text, with a rule above each."""
    for text in samples:
        console.rule(characters="-")
        console.print(Text(visible(text, keep="\n\t")), soft_wrap=True)


# ---- heatmap


def print_surprisals(console: Console, characters: list[str], bits: list[float], max_bits: float) -> None:
    """Prints `characters` with their `bits` below them, in rows as wide as the console; a newline ends a row.

    A cell is green for 0 bits, and red for `max_bits` or more.
    """
    columns = max(1, console.width // CELL_WIDTH)
    for start, stop in _rows(characters, columns):
        styles = [heat(value / max_bits) for value in bits[start:stop]]
        above = [_cell(glyph(character)) for character in characters[start:stop]]
        below = [_cell(f"{value:.1f}") for value in bits[start:stop]]
        for line in (above, below):
            console.print(Text.assemble(*zip(line, styles, strict=True)), no_wrap=True, soft_wrap=True)


def legend(max_bits: float, vocab_size: int) -> Text:
    """The legend of the colours."""
    values = [max_bits * step / (LEGEND_STEPS - 1) for step in range(LEGEND_STEPS)]
    cells = [(_cell(f"{value:.1f}"), heat(value / max_bits)) for value in values]
    return Text.assemble("bits: ", *cells, f" or more; {max_bits:.1f} is a guess among {vocab_size} tokens")


def heat(share: float) -> Style:
    """Black on a colour between green (share 0), yellow and red (share 1 or more)."""
    hue = (1 - max(min(1.0, share), 0.0)) / 3  # NaN, of a diverged model, counts as 1
    rgb = (round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.55, 0.95))
    return Style(color="black", bgcolor=Color.from_rgb(*rgb))


def glyph(character: str) -> str:
    """A visible form of `character` that does not affect the terminal."""
    if character in GLYPHS:
        return GLYPHS[character]
    if len(character) == 1 and not character.isprintable():
        return f"U+{ord(character):04X}"
    return f"◌{character}" if unicodedata.combining(character[0]) else character


def _cell(text: str) -> str:
    """Centres `text` in a cell; wide characters count as two columns."""
    free = max(0, CELL_WIDTH - cell_len(text))
    return " " * (free - free // 2) + text + " " * (free // 2)


def _rows(characters: list[str], columns: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of each row: at most `columns` characters, with a newline only at the end."""
    start = 0
    for index, character in enumerate(characters, 1):
        if character == "\n" or index - start == columns or index == len(characters):
            yield start, index
            start = index
