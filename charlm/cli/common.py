"""Shared parts of the commands: common options, error handling, the corpus of a checkpoint, the console."""

from __future__ import annotations

import codecs
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charlm._errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from charlm.lm.data import Corpus

EXIT_USER_ERROR = 2
# Replacements of our own non-ASCII characters on an output that cannot encode them; others become escapes.
ASCII_REPLACEMENTS = {"·": "-", "…": "...", "±": "+-", "×": "x", "–": "-"}


def prepare_streams() -> None:
    """Makes the standard streams encode every character and flush every line, and replaces closed ones.

    Python sets a stream to None if it was closed when the process started; here it becomes the null device.
    """
    codecs.register_error("charlm", _replace_unencodable)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the process lasts)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="charlm", line_buffering=True)


def _replace_unencodable(error: UnicodeError) -> tuple[str, int]:
    """The replacement of characters that the output cannot encode: an error handler for codecs.register_error."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(ASCII_REPLACEMENTS.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def reports_user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns a UserError or a failed write into one sentence on stderr and exit code 2.

    A closed pipe, as in `charlm score … | head -1`, is silent: typer ends with exit code 1.
    """

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except UserError as error:
            _print_error(str(error))
            raise typer.Exit(EXIT_USER_ERROR) from error
        except OSError as error:
            if error.filename is None:
                discard_stdout()
                if error.errno == errno.EPIPE:
                    raise
            _print_error(f"cannot write {error.filename or 'the output'}: {error.strerror}")
            raise typer.Exit(EXIT_USER_ERROR) from error

    return guarded


def _print_error(sentence: str) -> None:
    """Prints a sentence on stderr, with control characters of file names and texts escaped."""
    from charlm.lm.terminal import visible

    typer.echo(f"charlm: {visible(sentence)}", err=True)


def discard_stdout() -> None:
    """Redirects stdout to the null device; otherwise Python flushes it again at exit and reports the same error."""
    with suppress(OSError, ValueError):  # a stdout that is not a file is not flushed again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


InputFile = Annotated[Path | None, typer.Option("-i", "--input-file", help="UTF-8 text file; - reads standard input.")]
TrainingData = Annotated[
    Path | None, typer.Option("-i", "--input-file", help="The training data, if they have moved since the run.")
]
Column = Annotated[
    str | None, typer.Option(help="Column of a .jsonl, .parquet, .csv or .tsv file. Default: that of the run.")
]
Device = Annotated[str, typer.Option(help="Device to run on, such as cpu, cuda or cuda:1.")]
Unknown = Annotated[
    str,
    typer.Option(help="Treatment of characters outside the vocabulary: error, or escape, which costs about 32 bits."),
]
Directory = Annotated[Path, typer.Argument(help="Folder of a trained model, written by `charlm train -o`.")]


def protocol_option(default: str) -> Any:
    """The option for the context of predictions, whose help says what it is by default."""
    return typer.Option(
        help="Context of a prediction in running text: sliding (the full context before it) or fixed "
        f"(consecutive windows, as in nanoGPT). Default: {default}."
    )


@contextmanager
def unknown_characters_named() -> Iterator[None]:
    """Adds the option that allows unknown characters to the error about one."""
    from charlm.lm.vocabulary import UnknownCharacterError

    try:
        yield
    except UnknownCharacterError as error:
        raise UserError(f"{error}; --unknown escape scores unknown characters instead") from error


def check_split(split: str) -> None:
    """Raises UserError unless `split` is the name of a split."""
    from charlm.lm.data import SPLITS

    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: it must be one of {', '.join(SPLITS)}")


def new_console() -> Console:
    """The console on standard output; rich is imported only here."""
    from charlm.lm import terminal

    return terminal.new_console()


def print_samples(console: Console, samples: list[str], format: str, corpus: Corpus | None) -> None:
    """Prints samples; items are marked "new" or with their splits if `corpus` is given."""
    from charlm.lm.display import print_items, print_passages
    from charlm.lm.sample import containing_splits

    if format == "line":
        print_items(console, samples, None if corpus is None else containing_splits(samples, corpus))
    else:
        print_passages(console, samples)
