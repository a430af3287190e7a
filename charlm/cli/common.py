"""What the commands share: their common flags, how an error ends them, the corpus of a checkpoint, the console."""

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

from charlm.lm.config import Config
from charlm.lm.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    from charlm.lm.checkpoint import Checkpoint
    from charlm.lm.data import Corpus

EXIT_USER_ERROR = 2
STREAM = "-"  # the path that means standard input; in a checkpoint, data that came from there or through a pipe
# What the commands print beyond ASCII, for an output that cannot show it; other characters are shown as escapes.
PLAIN = {"·": "-", "…": "...", "±": "+-", "×": "x", "–": "-"}


def prepare_streams() -> None:
    """Makes every command's output one that no character ends, that appears line by line, and that is there.

    A stream that was closed as the process began is None in Python: it becomes an empty one.
    """
    codecs.register_error("charlm", _plainly)
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 (for as long as the process lasts)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="charlm", line_buffering=True)


def _plainly(error: UnicodeError) -> tuple[str, int]:
    """Encodes what the output's encoding has no place for, as codecs.register_error asks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end]
    return "".join(PLAIN.get(c) or c.encode("ascii", "backslashreplace").decode() for c in text), error.end


def flag(name: str) -> str:
    """The option of a parameter: "n_layer" → "--n-layer"."""
    return f"--{name.replace('_', '-')}"


def reports_user_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Turns a UserError, or output that cannot be written, into one sentence on stderr and exit code 2.

    A reader that has gone (`charlm score … | head -1`) is no error to speak of: typer ends with exit code 1.
    """

    @wraps(command)
    def guarded(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
            sys.stdout.flush()
        except UserError as error:
            _say(str(error))
            raise typer.Exit(EXIT_USER_ERROR) from error
        except OSError as error:
            if error.filename is None:
                discard_stdout()
                if error.errno == errno.EPIPE:
                    raise
            _say(f"cannot write {error.filename or 'the output'}: {error.strerror}")
            raise typer.Exit(EXIT_USER_ERROR) from error

    return guarded


def _say(sentence: str) -> None:
    """Prints a sentence on stderr, in which a file name or a text cannot act on the terminal."""
    from charlm.lm.terminal import visible

    typer.echo(f"charlm: {visible(sentence)}", err=True)


def discard_stdout() -> None:
    """Lets what stdout still holds go nowhere: Python would try to write it again, and say so, as it ends."""
    with suppress(OSError, ValueError):  # where stdout is no file, it is not tried again
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


InputFile = Annotated[
    Path | None, typer.Option("-i", "--input-file", help="UTF-8 text; - is standard input.", show_default=False)
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")]
Unknown = Annotated[
    str, typer.Option(help="A character outside the vocabulary: error, or escape at its cost of about 32 bits.")
]
Directory = Annotated[Path, typer.Argument(help="The folder that `charlm train -o` wrote.")]


@contextmanager
def unknown_characters_named() -> Iterator[None]:
    """Adds to the error about an unknown character how to count it."""
    from charlm.lm.vocabulary import UnknownCharacterError

    try:
        yield
    except UnknownCharacterError as error:
        raise UserError(f"{error}; --unknown escape counts unknown characters at their cost") from error


def check_split(split: str) -> None:
    """Raises UserError unless `split` is one."""
    from charlm.lm.data import SPLITS

    if split not in SPLITS:
        raise UserError(f"unknown split {split!r}: it is one of {', '.join(SPLITS)}")


def new_console() -> Console:
    """Standard output, on which nothing that is printed acts."""
    from charlm.lm import terminal

    return terminal.new_console()


def where_it_stays(path: Path) -> str:
    """What a checkpoint keeps of the `path` of its data: STREAM for a pipe or a terminal, which is read only once."""
    resolved = path.resolve()
    if path == Path(STREAM) or (os.path.exists(path) and not (resolved.is_file() or resolved.is_dir())):
        return STREAM
    return str(resolved)


def corpus_of(config: Config, given: Path | None = None) -> Corpus:
    """The corpus that `config` asks for, read from the file `given` in the place of its own."""
    from charlm.lm.data import read_corpus

    if given is None and config.input_file == STREAM:
        raise UserError("the run read its data from standard input or a pipe: give it again with -i")
    path = given or (None if config.input_file is None else Path(config.input_file))
    return read_corpus(path, format=config.format, seed=config.split_seed, dedup=config.dedup)


def trained_corpus(saved: Checkpoint, input_file: Path | None) -> Corpus:
    """The corpus that `saved` was trained on, from where it was or from `input_file`."""
    corpus = corpus_of(saved.config, input_file)
    if corpus.digest != saved.digest:
        name = input_file or saved.config.input_file or "names.txt"
        raise UserError(f"{name} is not what the model was trained on: its split differs")
    return corpus


def print_samples(console: Console, samples: list[str], format: str, corpus: Corpus | None) -> None:
    """Items, marked new or with their splits where `corpus` is known; or passages."""
    from charlm.lm.display import print_items, print_passages
    from charlm.lm.sample import standing

    if format == "line":
        print_items(console, samples, None if corpus is None else standing(samples, corpus))
    else:
        print_passages(console, samples)
