"""The packages that only the language model and the command line need: the extra `lm` of charlm-kernels."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from charlm._errors import UserError

PACKAGES = ("typer", "rich", "safetensors")


class MissingExtraError(ImportError):
    """A package of the extra `lm` is not installed. The message is one sentence that says what to install."""


def require_lm() -> None:
    """Raises MissingExtraError unless every package of the extra `lm` is installed."""
    missing = [name for name in PACKAGES if not _is_installed(name)]
    if missing:
        raise MissingExtraError(
            f"charlm's language model and command line need {' and '.join(missing)}, which the extra lm installs: "
            f"{install_command('lm')}",
            name=missing[0],
        )


def require_packages(what: str, extra: str, packages: Sequence[str]) -> None:
    """Raises UserError unless the `packages` of an extra are installed, which `what` needs."""
    if missing := [name for name in packages if not _is_installed(name)]:
        command = install_command(extra)
        raise UserError(f"{what} needs {' and '.join(missing)}, which the extra {extra} installs: {command}")


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
