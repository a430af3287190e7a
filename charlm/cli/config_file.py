"""`charlm train --config FILE`: options from a TOML file, which the command line overrides.

    type = "gpt"
    max_steps = 5000
    work_dir = "runs/gpt"

A key is the name of an option, with underscores or dashes. A value has the type of the option: nothing is converted.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any, get_type_hints

import typer

from charlm._errors import UserError
from charlm.cli.common import reports_user_errors

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

NOT_IN_A_FILE = ("context", "config_file")  # of the arguments of the command


@reports_user_errors
def use_config_file(context: typer.Context, path: Path | None) -> None:
    """Makes the options in the file at `path` the defaults of the command: the callback of --config."""
    if path is not None:
        from charlm.cli.train import train

        hints = {name: hint for name, hint in get_type_hints(train).items() if name not in NOT_IN_A_FILE}
        types = {name: getattr(hint, "__args__", (hint,))[0] for name, hint in hints.items()}  # str of str | None
        context.default_map = read_options(path, {name: str if of is Path else of for name, of in types.items()})


def read_options(path: Path, kinds: dict[str, type]) -> dict[str, Any]:
    """The options in a TOML file, whose types by name are `kinds`: int, float, bool or str.

    Raises:
        UserError: The file cannot be read, is not TOML, names an option twice or one that does not exist, or a value
            has another type than its option; the message names the file, the line and the key.
    """
    from charlm.lm.start import converted, unknown_option

    try:
        text = path.read_bytes().decode("utf-8-sig")
        table = tomllib.loads(text)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8
        raise UserError(f"{path} is not TOML: {error}") from error
    options: dict[str, Any] = {}
    for key, value in table.items():
        name, where = key.replace("-", "_"), f"{path}{_line(text, key)}"
        if name not in kinds:
            raise UserError(f"{where}: {unknown_option(key, kinds)}")
        if name in options:
            raise UserError(f"{where}: {name} is given twice")
        try:
            options[name] = converted(key, value, kinds[name])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
    return options


def _line(text: str, key: str) -> str:
    """ ", line N" of a key of a TOML text, or nothing where it is not written as usual."""
    found = re.search(rf"""^[ \t]*(\[*)[ \t]*["']?{re.escape(key)}["']?[ \t]*[\].=]""", text, re.MULTILINE)
    return "" if found is None else f", line {text.count(chr(10), 0, found.start()) + 1}"
