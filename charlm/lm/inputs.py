"""The corpus of a run, from what the user names: a file, a prepared folder, or nothing for the shipped names."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from charlm._errors import UserError
from charlm.lm.config import Config

if TYPE_CHECKING:
    from charlm.lm.checkpoint import Checkpoint
    from charlm.lm.corpus import Corpus

STREAM = "-"  # the path of standard input; in a checkpoint, data from standard input or a pipe


def flag(name: str) -> str:
    """The command-line option of a parameter: "n_layer" → "--n-layer"."""
    return f"--{name.replace('_', '-')}"


def path_to_save(path: Path) -> str:
    """The path of the data as a checkpoint stores it: STREAM for a pipe or a terminal, which can be read only once."""
    resolved = path.resolve()
    if path == Path(STREAM) or (os.path.exists(path) and not (resolved.is_file() or resolved.is_dir())):
        return STREAM
    return str(resolved)


def corpus_of(config: Config, given: Path | None = None, cache: bool = True, silent: bool = False) -> Corpus:
    """Reads the corpus of `config`, from the file or the prepared folder `given` instead of its own if there is one.

    With `cache` a large file is prepared once, in a folder that is printed unless `silent`.
    """
    from charlm.lm.data import read_corpus

    if given is None and config.input_file == STREAM:
        raise UserError("the run read its data from standard input or a pipe: give the data again with -i")
    path = given or (None if config.input_file is None else Path(config.input_file))
    if path is not None and path.is_dir():
        return _prepared_corpus(config, path)
    if path is not None and cache:
        from charlm.lm.cache import is_worth_it

        if is_worth_it(path):
            return _cached_corpus(config, path, silent)
    return read_corpus(path, format=config.format, seed=config.split_seed, dedup=config.dedup, column=config.column)


def trained_corpus(saved: Checkpoint, input_file: Path | None) -> Corpus:
    """Reads the corpus that `saved` was trained on, from its recorded path or from `input_file`."""
    corpus = corpus_of(saved.config, input_file)
    if corpus.digest != saved.digest:
        name = input_file or saved.config.input_file or "names.txt"
        raise UserError(
            f"{name} is not the data that the model was trained on (its split differs): give that data with -i"
        )
    return corpus


def _prepared_corpus(config: Config, directory: Path) -> Corpus:
    """The prepared corpus in `directory`; UserError if it was prepared with other options than those of `config`."""
    from charlm.lm.shards import load

    corpus = load(directory)
    prepared = {"format": corpus.format, "split_seed": corpus.manifest["split_seed"], "dedup": corpus.manifest["dedup"]}
    for name, value in prepared.items():
        wanted = getattr(config, name)
        if wanted not in (getattr(Config, name), value):
            raise UserError(f"{directory} was prepared with {flag(name)} {value}, not {wanted}: leave the option out")
    return corpus


def _cached_corpus(config: Config, path: Path, silent: bool) -> Corpus:
    from charlm.lm.cache import cached_corpus
    from charlm.lm.display import progress_bar
    from charlm.lm.prepare import Options
    from charlm.lm.terminal import visible

    def announce(directory: Path) -> None:
        if not silent:
            text = f"charlm: preparing {path} once, in {directory}; `charlm prepare --clear-cache` removes it"
            print(visible(text), file=sys.stderr)

    options = Options(config.format, config.split_seed, config.dedup)
    with progress_bar(path.name, silent) as report:
        return cached_corpus(path, options, column=config.column, announce=announce, report=report)
