"""What started a run, as its checkpoint keeps it: the exact command and the versions."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from charlm._version import __version__
from charlm.lm.config import SWITCHES
from charlm.lm.inputs import flag

ONE_FORM = (*SWITCHES, "no_mix", "compile")  # options of the command that have no --no- form


def started_by(command: str) -> dict[str, str]:
    """The entry of a checkpoint for `command`, with the versions that run it."""
    return {"command": command, "charlm": __version__, "torch": torch.__version__, "python": platform.python_version()}


def shell_command(program: str, given: Mapping[str, Any]) -> str:
    """A line for a shell: `program` with the options `given` by name."""
    words = [program]
    for name, value in given.items():
        if value is False and name in ONE_FORM:
            continue
        if isinstance(value, bool):
            words.append(flag(name if value else f"no_{name}"))
        else:
            words += [flag(name), shlex.quote(str(value))]
    return " ".join(words)


def python_call(data: Any, given: Mapping[str, Any]) -> str:
    """A line of Python: `charlm.train` with the options `given`; the documents themselves are left out."""
    shown = [] if data is None else [repr(str(data)) if isinstance(data, (str, Path)) else "data"]
    arguments = (f"{name}={str(value) if isinstance(value, Path) else value!r}" for name, value in given.items())
    return f"charlm.train({', '.join([*shown, *arguments])})"


def describe(entry: Mapping[str, str]) -> str:
    """An entry as a line to print."""
    return f"{entry['command']}  # charlm {entry['charlm']}, torch {entry['torch']}, Python {entry['python']}"
