"""How a run begins, for `charlm train` and `charlm.train`: its options, its folder and its configuration."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

import torch
from rich.console import Console

from charlm._errors import UserError
from charlm._version import __version__
from charlm.lm import checkpoint
from charlm.lm.checkpoint import Checkpoint
from charlm.lm.command import describe, started_by
from charlm.lm.config import Config, RunOptions, check_options
from charlm.lm.corpus import Corpus
from charlm.lm.defaults import config_for
from charlm.lm.display import print_data, print_model
from charlm.lm.files import locked, write_atomically
from charlm.lm.init_from import options_of
from charlm.lm.inputs import corpus_of, flag, path_to_save
from charlm.lm.memory import check_fits, parse_bytes
from charlm.lm.parallel import check_parallel
from charlm.lm.processes import Processes
from charlm.lm.shards import ShardedCorpus
from charlm.lm.sources import check_column
from charlm.lm.tensorboard import require_tensorboard
from charlm.lm.threads import using_threads
from charlm.lm.train import Trainer, usable_device

DOCUMENTS = "the data"  # what messages call documents, which are in no file
# Options that may change on --resume, because they do not affect what the run computes in each step.
FREE_ON_RESUME = {"input_file", "device", "max_steps", "eval_interval", "patience", "log_interval"}
KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


class Start:
    """The start of a run. What can be checked before anything is read or written is checked here.

    Args:
        given: The options of the run that are given, fields of `Config`.
        options: The other options.
        directory: The folder of the run.
        command: The line that starts it, for its checkpoints.
        path: The data, as `charlm train -i` takes them; None is those of the resumed run, or the shipped names.
        read: Reads documents, which are then the data: it returns their corpus, the path that they are to have in a
            checkpoint, and the content of a file to be written there, or None.
        parallel: As for `Trainer`.

    Raises:
        UserError: Two options contradict each other, or one is out of its range.
    """

    def __init__(
        self,
        given: Mapping[str, Any],
        options: RunOptions,
        directory: Path,
        command: str,
        path: Path | None = None,
        read: Callable[[Config], tuple[Corpus, Path, bytes | None]] | None = None,
        parallel: str = "ddp",
    ) -> None:
        if options.tensorboard:
            require_tensorboard()
        if options.resume and options.overwrite:
            raise UserError("--resume and --overwrite exclude each other")
        self.given, self.options, self.directory, self.command = dict(given), options, directory, command
        self.path, self.read, self.parallel = path, read, parallel
        self.initial: Checkpoint | None = None  # that of init_from
        self.config: Config | None = None  # of a new run, as far as it is known without the data
        if path is not None:
            self.given["input_file"] = path_to_save(path)
        init_from = given.get("init_from")
        if init_from is not None:
            self.given["init_from"] = str(Path(init_from).resolve())
        if not options.resume:
            if init_from is not None:
                self.initial, self.given = options_of(Path(init_from), self.given)
            if "type" in self.given:
                check_options(self.given["type"], self.given)
            self.config = Config.of_type(**{"type": Config.type, **self.given})

    @contextmanager
    def trainer(self, console: Console, processes: Processes) -> Iterator[Trainer]:
        """Locks the folder, reads the data, prints what the run trains on and what it trains, and makes its trainer.

        Raises:
            UserError: The data or the folder cannot be used, the model does not fit them, the device or the memory.
        """
        resume = self.options.resume
        with using_threads(self.options.threads), ExitStack() as stack:
            if processes.rank == 0:
                # Processes that torchrun has restarted go on from what they have saved themselves.
                resume = resume or not processes.first_time("manifest", checkpoint.fingerprint(self.directory))
                stack.enter_context(claimed(self.directory, resume, self.options.overwrite))
            yield self._trainer(console, processes, bool(processes.from_first(resume)))

    def _trainer(self, console: Console, processes: Processes, resume: bool) -> Trainer:
        given, options, resumed, initial = self.given, self.options, None, self.initial
        self.initial = None  # and so, at the end of this call, its files, which the next checkpoint may replace
        config = self.config
        if resume:
            resumed, initial = checkpoint.load(self.directory, mapped=True), None
            check_options(resumed.config.type, given)
            config = resumed_config(resumed.config, given)
        assert config is not None
        check_parallel(self.parallel, config, processes)
        if options.memory is not None and config.type != "ngram":
            raise UserError(f"--memory bounds the counting of type ngram; the {config.type} does not have it")
        memory = None if options.memory is None else parse_bytes(options.memory)
        name = None if self.read is None else DOCUMENTS
        check_column(given, self.path or config.input_file, name)
        path, content = None, None
        if self.read is None:
            corpus = corpus_of(config, self.path, cache=not options.no_cache, silent=console.quiet)
        else:
            corpus, path, content = self.read(config)
            config = replace(config, input_file=str(path))
        guessed = ", guessed" if config.format is None else ""
        if resumed is None:
            config = config_for(corpus, {**given, "input_file": config.input_file})
        config = config_on(config, corpus)
        entry = started_by(self.command)
        console.print(describe(entry), soft_wrap=True)
        print_data(console, config, corpus, guessed, name)
        if not options.force:
            device = usable_device(processes.device(config.device))
            check_fits(config, corpus, device, processes.launch, self.parallel)
        processes.check_equal(self._what_must_be_equal(config, corpus, resumed or initial))
        trainer = Trainer(
            config,
            corpus,
            self.directory,
            resumed,
            processes=processes,
            parallel=self.parallel,
            memory=memory,
            diagnostics=not options.no_diagnostics,
            initial=initial,
            tensorboard=options.tensorboard,
        )
        trainer.commands = (*trainer.commands, entry | trainer.origin)
        if path is not None and content is not None:
            write_atomically(path, content)
        print_model(console, trainer)
        return trainer

    def _what_must_be_equal(self, config: Config, corpus: Corpus, loaded: Checkpoint | None) -> dict[str, str]:
        """What the processes of a run must agree on, by the name of it in an error."""
        return {
            "data": corpus.digest,
            "options": repr({**config.to_dict(), "input_file": None, "parallel": self.parallel}),
            "checkpoints": "" if loaded is None else repr((loaded.step, loaded.digest, loaded.best_nats)),
            "versions of charlm or torch": f"{__version__} {torch.__version__}",
        }


def unknown_option(name: str, known: Iterable[str]) -> str:
    """A sentence about an option that is none of `known`, which suggests the nearest."""
    nearest = difflib.get_close_matches(name, known, 1)
    return f"there is no option {name!r}" + (f": did you mean {nearest[0]}?" if nearest else "")


def converted(name: str, value: Any, kind: type) -> Any:
    """`value` as an int, float, str or bool; numbers of numpy are converted.

    Raises:
        UserError: It is of another kind.
    """
    accepted = {int: numbers.Integral, float: numbers.Real}.get(kind, kind)
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise UserError(f"{name} is {value!r}, but must be {KINDS[kind]}")
    try:
        return kind(value)
    except OverflowError as error:  # an integer beyond the numbers of float
        raise UserError(f"{name} is too large: it must be a number of less than 309 digits") from error


def field_values(of: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of fields of the dataclass `of`, each of its type; None where the field allows it.

    Raises:
        UserError: A value has another type.
    """
    kinds = get_type_hints(of)
    values = {}
    for name, value in given.items():
        allowed = getattr(kinds[name], "__args__", (kinds[name],))  # (str, NoneType) of str | None
        values[name] = None if value is None and type(None) in allowed else converted(name, value, allowed[0])
    return values


@contextmanager
def claimed(directory: Path, resume: bool, overwrite: bool) -> Iterator[None]:
    """Locks the folder of a run inside. Raises UserError unless a run may start, or resume, in it."""
    check_folder(directory, resume, overwrite)
    with locked(directory):
        check_folder(directory, resume, overwrite)  # it may have changed before it was locked
        yield


def check_folder(directory: Path, resume: bool, overwrite: bool) -> None:
    """Raises UserError unless a run may start, or resume, in `directory`."""
    if resume:
        if not checkpoint.exists(directory):
            raise UserError(f"there is no checkpoint in {directory} to resume from")
        return
    names = checkpoint.foreign_files(directory)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise UserError(
            f"{directory} contains files that charlm did not write ({', '.join(names[:3])}{more}): choose a new or "
            "empty folder with -o"
        )
    if checkpoint.exists(directory) and not overwrite:
        raise UserError(
            f"{directory} already contains a trained model: add --resume to continue it, or --overwrite to replace it"
        )


def resumed_config(saved: Config, given: Mapping[str, Any]) -> Config:
    """The saved config, updated with the given options, of which only those in FREE_ON_RESUME may differ."""
    for name, value in given.items():
        if name not in FREE_ON_RESUME and value != getattr(saved, name):
            raise UserError(
                f"{flag(name)} {value} differs from the checkpoint's {getattr(saved, name)}, which --resume cannot "
                "change: leave the option out"
            )
    return replace(saved, **{name: value for name, value in given.items() if name in FREE_ON_RESUME})


def config_on(config: Config, corpus: Corpus) -> Config:
    """`config` with the format of `corpus`, and with the split of one that was prepared."""
    if isinstance(corpus, ShardedCorpus):
        split = {name: corpus.manifest[name] for name in ("split_seed", "dedup")}
        config = replace(config, **split)
    return replace(config, format=corpus.format)
