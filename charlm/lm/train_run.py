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
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from charlm._errors import UserError
from charlm.lm import cache, checkpoint, shards
from charlm.lm.command import SWITCHES, describe, python_call, started_by
from charlm.lm.config import Config, check_options
from charlm.lm.corpus import Corpus
from charlm.lm.data import build_corpus, decode_text
from charlm.lm.defaults import config_for
from charlm.lm.display import ProgressReport, print_data, print_model, progress_bar, sampling_every
from charlm.lm.files import locked, write_atomically
from charlm.lm.init_from import options_of
from charlm.lm.inputs import corpus_of, path_to_save
from charlm.lm.memory import check_fits, parse_bytes
from charlm.lm.prepare import Options, encoded, prepare_documents
from charlm.lm.processes import Launch
from charlm.lm.run import Run, corpus_folder
from charlm.lm.sources import check_column
from charlm.lm.start import check_folder, config_on, config_values, converted, resumed_config, unknown_option
from charlm.lm.stop import StopRequest
from charlm.lm.tensorboard import require_tensorboard
from charlm.lm.terminal import new_console
from charlm.lm.threads import using_threads
from charlm.lm.train import Trainer, usable_device

NAME = "the data"  # what error messages call documents
SHOWN = 80  # characters of a wrong path
IN_PYTHON = {"input_file": "data", "work_dir": "directory"}  # the arguments of charlm.train for options of the command
OTHERS = ("threads", "memory", "sample_every")


def train_run(
    data: Any,
    directory: str | os.PathLike[str] | None,
    *,
    type: str | None,
    separator: str,
    resume: bool,
    overwrite: bool,
    force: bool,
    no_cache: bool,
    no_diagnostics: bool,
    tensorboard: bool,
    threads: int | None,
    memory: int | str | None,
    sample_every: int,
    progress: bool,
    options: dict[str, Any],
) -> Run:
    """`charlm.train`, which documents the arguments."""
    with _in_python_terms():
        given = _checked({**options, **({} if type is None else {"type": type})})
        if tensorboard:
            require_tensorboard()
        if resume and overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        if Launch.from_environment().size > 1:
            raise UserError(
                "train() trains in one process: write the documents with `charlm prepare`, and train on them with "
                "torchrun -m charlm train -i DIR"
            )
        path, documents = _source(data)
        switches = resume, overwrite, force, no_cache, no_diagnostics, tensorboard
        for name, value in (*zip(SWITCHES, switches, strict=True), ("progress", progress)):
            converted(name, value, bool)
        for name, value in (("sample_every", sample_every), ("threads", 1 if threads is None else threads)):
            converted(name, value, int)
        converted("separator", separator, str)
        arguments = {
            **({} if directory is None else {"directory": os.fspath(directory)}),
            **given,
            **({} if separator == "\n" else {"separator": separator}),
            **{name: True for name, is_on in zip(SWITCHES, switches, strict=True) if is_on},
            **({"sample_every": sample_every} if sample_every else {}),
            **{name: value for name, value in (("threads", threads), ("memory", memory)) if value is not None},
        }
        line = python_call(data, arguments)
        with ExitStack() as on_error:
            if directory is None:
                if resume:
                    raise UserError("--resume continues the run in a folder: give the directory")
                temporary = Path(tempfile.mkdtemp(prefix="charlm-")).resolve()
                on_error.callback(shutil.rmtree, temporary, ignore_errors=True)
                folder = temporary / "run"
            else:
                folder = Path(directory).resolve()
            with ExitStack() as stack:
                stack.enter_context(using_threads(threads))
                check_folder(folder, resume, overwrite)
                stack.enter_context(locked(folder))
                check_folder(folder, resume, overwrite)  # it may have changed before it was locked
                resumed = checkpoint.load(folder, mapped=True) if resume else None
                call = _Call(
                    folder,
                    given,
                    resumed,
                    overwrite,
                    force,
                    no_cache,
                    no_diagnostics,
                    tensorboard,
                    memory,
                    sample_every,
                    progress,
                    separator,
                    line,
                )
                del resumed
                run = call.run(path, documents)
            on_error.pop_all()
        if directory is None:
            weakref.finalize(run, shutil.rmtree, temporary, ignore_errors=True)
        return run


def _checked(options: dict[str, Any]) -> dict[str, Any]:
    """The options with values of their types; UserError for those that do not exist."""
    known = [name for name in Config.names() if name not in IN_PYTHON]
    for name in options:
        if name in IN_PYTHON:
            raise UserError(f"there is no option {name!r}: it is the argument {IN_PYTHON[name]}")
        if name not in known:
            raise UserError(unknown_option(name, [*known, *SWITCHES, *OTHERS, "directory", "separator", "progress"]))
    if isinstance(options.get("device"), torch.device):
        options = {**options, "device": str(options["device"])}
    return config_values({name: os.fspath(v) if isinstance(v, os.PathLike) else v for name, v in options.items()})


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


@dataclass
class _Call:
    """One call of `charlm.train` with checked arguments, in a folder that is locked."""

    folder: Path
    given: dict[str, Any]
    resumed: checkpoint.Checkpoint | None
    overwrite: bool
    force: bool
    no_cache: bool
    no_diagnostics: bool
    tensorboard: bool
    memory: int | str | None
    sample_every: int
    progress: bool
    separator: str
    line: str  # the call
    initial: checkpoint.Checkpoint | None = None  # that of init_from
    kept: tuple[Path, bytes] | None = None  # the file of the documents and its content

    def run(self, path: Path | None, documents: Iterable[str] | None) -> Run:
        if path is not None:
            self.given["input_file"] = path_to_save(path)
        config = self._config()
        name = None if documents is None else NAME
        check_column(self.given, path or config.input_file, name)
        if documents is None:
            corpus = corpus_of(config, path, cache=not self.no_cache, silent=not self.progress)
        else:
            corpus, source = self._corpus_of(documents, config)
            config = replace(config, input_file=str(source))
        guessed = ", guessed" if config.format is None else ""
        if self.resumed is None:
            config = config_for(corpus, {**self.given, "input_file": config.input_file})
        config = config_on(config, corpus)
        if self.memory is not None and config.type != "ngram":
            raise UserError(f"--memory bounds the counting of type ngram; the {config.type} does not have it")
        bound = None if self.memory is None else parse_bytes(str(self.memory))
        if not self.force:
            check_fits(config, corpus, usable_device(config.device), Launch(), "ddp")
        trainer = Trainer(
            config,
            corpus,
            self.folder,
            self.resumed,
            memory=bound,
            diagnostics=not self.no_diagnostics,
            initial=self.initial,
            tensorboard=self.tensorboard,
        )
        trainer.commands = (*trainer.commands, started_by(self.line) | trainer.origin)
        self.resumed = self.initial = None  # and so its files, which the next checkpoint replaces
        if self.kept is not None:
            write_atomically(*self.kept)
        return self._train(trainer, guessed, name)

    def _config(self) -> Config:
        """The configuration of a new run, or of the resumed one."""
        if self.resumed is not None:
            if "init_from" in self.given:
                self.given["init_from"] = os.path.realpath(self.given["init_from"])
            check_options(self.resumed.config.type, self.given)
            return resumed_config(self.resumed.config, self.given)
        if "init_from" in self.given:
            self.initial, self.given = options_of(Path(self.given["init_from"]), self.given)
        if "type" in self.given:
            check_options(self.given["type"], self.given)
        return Config.of_type(**{"type": Config.type, **self.given})

    def _corpus_of(self, documents: Iterable[str], config: Config) -> tuple[Corpus, Path]:
        """The corpus of the documents, in memory or prepared, and the path where it will be."""
        split = Options(config.format, config.split_seed, config.dedup)
        size, taken, rest = 0, [], iter(documents)
        for document in rest:
            taken.append(document)
            size += len(document) if isinstance(document, str) else 0
            if size >= cache.MIN_BYTES:
                break
        else:
            raw = b"".join(encoded(taken, self.separator))
            text = decode_text(raw, NAME)
            corpus = build_corpus(text, format=split.format, seed=split.seed, dedup=split.dedup, name=NAME)
            path = self.folder / f"documents-{hashlib.sha256(raw).hexdigest()[:16]}.txt"
            self.kept = (path, raw)
            return corpus, path
        path = corpus_folder(self.folder)
        if self.resumed is not None:
            raise UserError(f"the data of the run are in {path}: leave the data out")
        if path.exists() and not self.overwrite:
            raise UserError(f"{path} is that of an earlier run: --overwrite replaces it")
        everything = itertools.chain(taken, rest)
        prepare_documents(everything, path, split, separator=self.separator, overwrite=self.overwrite)
        return shards.load(path), path

    def _train(self, trainer: Trainer, guessed: str, source: str | None) -> Run:
        config, corpus = trainer.config, trainer.corpus
        console = new_console()
        console.quiet = not self.progress
        console.print(describe(trainer.commands[-1]), soft_wrap=True)
        print_data(console, config, corpus, guessed, source)
        print_model(console, config, corpus, trainer, "ddp")
        on_step = sampling_every(console, trainer, self.sample_every)
        stop = StopRequest()
        # A count model has nothing to save before its end, and only the main thread may handle signals.
        listens = trainer.optimizer is not None and threading.current_thread() is threading.main_thread()
        with (
            stop.listening() if listens else nullcontext(),
            ProgressReport(console, config.max_steps, trainer.step) as report,
        ):
            finished = trainer.run(report, stop, lambda text: report.advise(in_python(text)), on_step)
            report.stopped_at(trainer.step)
        if stop.signal not in (None, signal.SIGINT):  # the state is saved: what the program does with the signal
            signal.raise_signal(stop.signal)
        evaluation = None
        if finished:
            with suppress(KeyboardInterrupt), progress_bar("dev", silent=not self.progress) as bar:
                evaluation = trainer.evaluate_best(lambda done, total: bar("evaluating", done, total))
        run = Run.read(self.folder, config.device, corpus, finished, evaluation)
        for path in self.folder.glob("documents-*.txt"):
            if str(path) != run.config.input_file:  # that of a run that was replaced, or of one that had no steps left
                path.unlink()
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
        return IN_PYTHON.get(name, name) if name in (*Config.names(), *OTHERS, *IN_PYTHON) else found[0]

    sentence = re.sub(r"(?<![\w/-])--([a-z]+(?:-[a-z]+)*)(?![\w-])", argument, sentence)
    return re.sub(r" with -[oi]\b", "", sentence)
