"""The benchmark's command line, run in this process, on a machine on which nothing else seems to run."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import NamedTuple

import pytest

from bench import __main__, timer
from bench.timer import Budget

TINY_BUDGET = Budget(0.0, 2)


class Ended(NamedTuple):
    exit_code: int
    stdout: str
    stderr: str


def run(*arguments: object, main: Callable[[list[str]], int] = __main__.main) -> Ended:
    """`python -m bench`, or the command of another `main`."""
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as ended:
            code = ended.code
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing else seems to run: tests share theirs."""
    monkeypatch.setattr(timer, "DISTURBED", 10.0)
