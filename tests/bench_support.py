"""The benchmark's command line, run in this process, on a machine on which nothing else seems to run."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from bench import clock
from bench.__main__ import app
from bench.clock import Budget

TINY_BUDGET = Budget(0.0, 2)


def run(*arguments: str | Path):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which nothing else seems to run: tests share theirs."""
    monkeypatch.setattr(clock.EmptyRegion, "__call__", lambda self: None)
    monkeypatch.setattr(clock, "DISTURBED", 10.0)
