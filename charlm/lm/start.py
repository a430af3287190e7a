"""How a run begins, for `charlm train` and `charlm.train`: its options, its folder and its configuration."""

from __future__ import annotations

import difflib
import numbers
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_type_hints

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.config import Config
from charlm.lm.corpus import Corpus
from charlm.lm.inputs import flag
from charlm.lm.shards import ShardedCorpus

# Options that may change on --resume, because they do not affect what the run computes in each step.
FREE_ON_RESUME = {"input_file", "device", "max_steps", "eval_interval", "patience", "log_interval"}
KINDS = {int: "an integer", float: "a number", str: "a string", bool: "true or false"}


def unknown_option(name: str, known: Iterable[str]) -> str:
    """A sentence about an option that is none of `known`, which suggests the nearest."""
    nearest = difflib.get_close_matches(name, known, 1)
    return f"there is no option {name!r}" + (f": did you mean {nearest[0]}?" if nearest else "")


def converted(name: str, value: Any, kind: type) -> Any:
    """`value` as an int, float, str or bool; numbers of numpy are converted.

    Raises:
        UserError: It is of another kind.
    """
    if kind is bool or isinstance(value, bool):
        fits = kind is bool and isinstance(value, bool)
    elif kind is str:
        fits = isinstance(value, str)
    else:
        fits = isinstance(value, numbers.Integral if kind is int else numbers.Real)
    if not fits:
        raise UserError(f"{name} is {value!r}, but must be {KINDS[kind]}")
    try:
        return kind(value)
    except OverflowError as error:  # an integer beyond the numbers of float
        raise UserError(f"{name} is too large: it must be a number of less than 309 digits") from error


def config_values(given: Mapping[str, Any]) -> dict[str, Any]:
    """The values of fields of `Config`, each of its type; None where the field allows it.

    Raises:
        UserError: A value has another type.
    """
    kinds = get_type_hints(Config)
    values = {}
    for name, value in given.items():
        allowed = getattr(kinds[name], "__args__", (kinds[name],))  # (str, NoneType) of str | None
        values[name] = None if value is None and type(None) in allowed else converted(name, value, allowed[0])
    return values


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
