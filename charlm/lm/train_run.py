"""What `charlm.train` does: reads the data that a program or a notebook gives, and trains in this process.

Data are a path, as `charlm train -i` takes it, or documents. The text of documents is kept in the folder of the run, so
that the commands and `resume` find it; from cache.MIN_BYTES on it is prepared in a folder beside it, as by `charlm
prepare`.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import re
import shutil
import signal
import tempfile
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from charlm._errors import UserError
from charlm.lm import cache, shards
from charlm.lm.command import python_call
from charlm.lm.config import SWITCHES, Config, RunOptions
from charlm.lm.corpus import Corpus
from charlm.lm.data import build_corpus, decode_text
from charlm.lm.display import ProgressReport, progress_bar, sampling_every
from charlm.lm.prepare import Options, encoded, prepare_documents
from charlm.lm.processes import Launch, Processes
from charlm.lm.run import Run, corpus_folder, remove_other_documents
from charlm.lm.start import DOCUMENTS, Start, converted, field_values, unknown_option
from charlm.lm.stop import StopRequest
from charlm.lm.terminal import new_console
from charlm.lm.train import Trainer

SHOWN = 80  # characters of a wrong path
IN_PYTHON = {"input_file": "data", "work_dir": "directory"}  # the arguments of charlm.train for options of the command
OF_CONFIG = [name for name in Config.names() if name not in IN_PYTHON]
OTHERS = tuple(vars(RunOptions()))


def train_run(
    data: Any,
    directory: str | os.PathLike[str] | None,
    separator: str,
    progress: bool,
    given: dict[str, Any],
    options: RunOptions,
) -> Run:
    """`charlm.train`, which documents the arguments; `given` are the fields of `Config` among them."""
    with _in_python_terms(), ExitStack() as on_error:
        given = _checked(given)
        if Launch.from_environment().size > 1:
            raise UserError(
                "train() trains in one process: write the documents with `charlm prepare`, and train on them with "
                "torchrun -m charlm train -i DIR"
            )
        path, documents = _source(data)
        options = RunOptions(**field_values(RunOptions, vars(options)))
        converted("progress", progress, bool)
        converted("separator", separator, str)
        defaults = vars(RunOptions())
        arguments = {
            **({} if directory is None else {"directory": os.fspath(directory)}),
            **given,
            **({} if separator == "\n" else {"separator": separator}),
            **{name: value for name, value in vars(options).items() if value != defaults[name]},
        }
        if directory is None:
            if options.resume:
                raise UserError("--resume continues the run in a folder: give the directory")
            temporary = Path(tempfile.mkdtemp(prefix="charlm-")).resolve()
            on_error.callback(shutil.rmtree, temporary, ignore_errors=True)
            folder = temporary / "run"
        else:
            folder = Path(directory).resolve()
        read = None if documents is None else partial(_read, documents, separator, folder, options)
        start = Start(given, options, folder, python_call(data, arguments), path, read)
        console = new_console()
        console.quiet = not progress
        with start.trainer(console, Processes()) as trainer:
            run = _run(console, trainer, options.sample_every)
        on_error.pop_all()
    if directory is None:
        weakref.finalize(run, shutil.rmtree, temporary, ignore_errors=True)
    return run


def _checked(given: dict[str, Any]) -> dict[str, Any]:
    """The fields of `Config` with values of their types; UserError for those that do not exist."""
    for name in given:
        if name in IN_PYTHON:
            raise UserError(f"there is no option {name!r}: it is the argument {IN_PYTHON[name]}")
        if name not in OF_CONFIG:
            raise UserError(unknown_option(name, [*OF_CONFIG, *OTHERS, "directory", "separator", "progress"]))
    if isinstance(given.get("device"), torch.device):
        given = {**given, "device": str(given["device"])}
    paths = {name: os.fspath(value) for name, value in given.items() if isinstance(value, os.PathLike)}
    return field_values(Config, {**given, **paths})


def _source(data: Any) -> tuple[Path | None, Iterable[str] | None]:
    """The path or the documents that `data` is; neither for None.

    Raises:
        UserError: There is no file at the path.
        TypeError: It is neither, or iterating over it would not give documents in a fixed order.
    """
    if data is None:
        return None, None
    if isinstance(data, (str, os.PathLike)):
        name = os.fsdecode(data)
        if not os.path.exists(name):
            shown = name if len(name) <= SHOWN else f"{name[:SHOWN]}…"
            raise UserError(f"there is no file {shown!r}: a str is a path, and a text is given as a list, [text]")
        return Path(name), None
    kind = type(data).__name__
    if isinstance(data, (bytes, bytearray)) or not isinstance(data, Iterable):
        raise TypeError(f"data is of type {kind}, but must be a path or an iterable of str")
    if isinstance(data, Mapping) or hasattr(data, "columns") or hasattr(data, "column_names"):
        raise TypeError(f"data is a {kind}, of several columns: give one of them, such as data['text']")
    if isinstance(data, (set, frozenset)):
        raise TypeError(f"data is a {kind}, whose order differs from process to process: give sorted(data)")
    return None, data


def _read(
    documents: Iterable[str], separator: str, folder: Path, options: RunOptions, config: Config
) -> tuple[Corpus, Path, bytes | None]:
    """The corpus of documents, in memory or prepared, and what `Start` takes beside it."""
    split = Options(config.format, config.split_seed, config.dedup)
    size, taken, rest = 0, [], iter(documents)
    for document in rest:
        taken.append(document)
        size += len(document) if isinstance(document, str) else 0
        if size >= cache.MIN_BYTES:
            break
    else:
        raw = b"".join(encoded(taken, separator))
        text = decode_text(raw, DOCUMENTS)
        corpus = build_corpus(text, format=split.format, seed=split.seed, dedup=split.dedup, name=DOCUMENTS)
        return corpus, folder / f"documents-{hashlib.sha256(raw).hexdigest()[:16]}.txt", raw
    path = corpus_folder(folder)
    if options.resume:
        raise UserError(f"the data of the run are in {path}: leave the data out")
    if path.exists() and not options.overwrite:
        raise UserError(f"{path} is that of an earlier run: --overwrite replaces it")
    everything = itertools.chain(taken, rest)
    prepare_documents(everything, path, split, separator=separator, overwrite=options.overwrite)
    return shards.load(path), path, None


def _run(console: Console, trainer: Trainer, sample_every: int) -> Run:
    """Trains until the end or an interrupt."""
    config, corpus, folder = trainer.config, trainer.corpus, trainer.directory
    on_step = sampling_every(console, trainer, sample_every)
    stop = StopRequest()
    with (
        nullcontext() if trainer.optimizer is None else stop.listening(),  # a count model can save only its end
        ProgressReport(console, config.max_steps, trainer.step) as report,
    ):
        finished = trainer.run(report, stop, lambda text: console.print(in_python(text), soft_wrap=True), on_step)
        report.stopped_at(trainer.step)
    if stop.signal not in (None, signal.SIGINT):  # the state is saved: what the program does with the signal
        signal.raise_signal(stop.signal)
    evaluation = None
    if finished:
        with suppress(KeyboardInterrupt), progress_bar("dev", silent=console.quiet) as bar:
            evaluation = trainer.evaluate_best(partial(bar, "evaluating"))
    run = Run.read(folder, config.device, corpus, finished, evaluation)
    # Documents may be those of a run that was replaced, or of one that had no steps left.
    remove_other_documents(folder, run.config)
    return run


@contextmanager
def _in_python_terms() -> Iterator[None]:
    """Names the arguments of `charlm.train` in a UserError, in place of the options of the command."""
    try:
        yield
    except UserError as error:
        error.args = (in_python(str(error)),)
        raise


def in_python(sentence: str) -> str:
    """A sentence with the options of the command as arguments of `charlm.train`: --max-steps becomes max_steps."""

    def argument(found: re.Match[str]) -> str:
        name = found[1].replace("-", "_")
        if name in SWITCHES:
            return f"{name}=True"
        return IN_PYTHON.get(name, name) if name in (*OF_CONFIG, *OTHERS, *IN_PYTHON) else found[0]

    sentence = re.sub(r"(?<![\w/-])--([a-z]+(?:-[a-z]+)*)(?![\w-])", argument, sentence)
    return re.sub(r" with -[oi]\b", "", sentence)
