"""The packages that only the language model and the command line need: the extra `lm` of charlm-kernels."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from charlm._errors import UserError

PACKAGES = ("typer", "rich", "safetensors")


class MissingExtraError(ImportError, UserError):
    """A package of an extra is not installed. The message is one sentence that says what to install."""


def require_lm() -> None:
    """Raises MissingExtraError unless every package of the extra `lm` is installed."""
    require_packages("charlm's language model and command line", "lm", PACKAGES, verb="need")


def require_packages(what: str, extra: str, packages: Sequence[str], verb: str = "needs") -> None:
    """Raises MissingExtraError unless the `packages` of an extra are installed, which `what` needs."""
    if missing := [name for name in packages if not _is_installed(name)]:
        sentence = f"{what} {verb} {' and '.join(missing)}, which the extra {extra} installs: {install_command(extra)}"
        raise MissingExtraError(sentence, name=missing[0])


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ImportError:
        return False


def install_command(extra: str, parent: Path = Path(__file__).parents[1]) -> str:
    """The pip command that installs `extra`, for a charlm in the folder `parent`."""
    if (parent / "setup.py").exists():
        return f'pip install --no-build-isolation -e "{parent}[{extra}]"'
    return f'pip install "charlm-kernels[{extra}]"'
