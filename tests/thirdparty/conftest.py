"""Writes what a run found to the file that `--record` names."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections import Counter
from pathlib import Path

import pytest

LIBRARIES = ["torch", "transformers", "accelerate", "peft", "lightning", "litgpt"]
HEAD = """# charlm under other libraries

What the last recorded run of `make thirdparty` found: {date}, Python {python}, {versions}.

| group | passed | failed | skipped |
|---|---|---|---|
"""


def version(library: str) -> str:
    try:
        return f"{library} {importlib.metadata.version(library)}"
    except importlib.metadata.PackageNotFoundError:
        return f"{library} not installed"


class Recorder:
    def __init__(self, file: Path) -> None:
        self.file = file
        self.counts: dict[str, Counter] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or not report.passed:
            group = Path(report.nodeid.split("::")[0]).stem.removeprefix("test_")
            self.counts.setdefault(group, Counter())[report.outcome] += 1

    def pytest_sessionfinish(self) -> None:
        versions = ", ".join(map(version, LIBRARIES))
        head = HEAD.format(date=datetime.date.today(), python=platform.python_version(), versions=versions)
        rows = [
            f"| {group} | {found['passed']} | {found['failed']} | {found['skipped']} |\n"
            for group, found in sorted(self.counts.items())
        ]
        self.file.write_text(head + "".join(rows), encoding="utf-8")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record", type=Path, metavar="FILE", help="write the counts of this run and the versions to FILE"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("record") is not None:
        config.pluginmanager.register(Recorder(config.getoption("record")))
