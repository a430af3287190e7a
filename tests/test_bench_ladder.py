"""The ladder of bench/ladder: every rung is compiled, right and short; a wrong one is not timed."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import bench_support
import pytest

from bench import record, timer
from bench.ladder import __main__ as ladder

quiet = bench_support.quiet  # a fixture
ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "ladder.md").read_text(encoding="utf-8")
RUNGS = [*ladder.CPU, *ladder.CUDA]


@pytest.mark.parametrize("source", RUNGS, ids=lambda source: source.name)
def test_a_rung_is_short_and_begins_with_its_command_and_what_it_changes(source: Path) -> None:
    lines = source.read_text(encoding="utf-8").splitlines()
    compiler = "g++" if source.suffix == ".cpp" else "nvcc"
    assert re.fullmatch(rf"// {re.escape(compiler)} -O3 .*-shared .*{source.name} -o {source.stem}\.so", lines[0])
    assert re.fullmatch(r"// [A-Z].*[.:,a-z]", lines[1])
    assert len(lines) <= 80
    assert f"[{source.name}](../bench/ladder/{source.name})" in PAGE


def test_the_headers_of_the_rungs_are_short() -> None:
    for header in ladder.FOLDER.glob("*.h"):
        assert len(header.read_text(encoding="utf-8").splitlines()) <= 80


@pytest.mark.skipif(shutil.which("g++") is None, reason="the rungs are compiled by g++")
def test_the_last_rung_of_the_cpu_is_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "CPU", ladder.CPU[-1:])
    assert ladder.climb("5x4099", "cpu", False, tmp_path) == {}


@pytest.mark.exhaustive
@pytest.mark.parametrize("shape", ["1x1", "33x257"])
def test_every_rung_of_the_cpu_is_right(shape: str, tmp_path: Path) -> None:
    assert ladder.climb(shape, "cpu", False, tmp_path) == {}


@pytest.mark.exhaustive
def test_every_rung_for_cuda_is_right_in_the_emulator(tmp_path: Path) -> None:
    ladder.check_by_emulator(tmp_path)


@pytest.mark.exhaustive
def test_the_command_measures_and_records(quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "BUDGET", bench_support.TINY_BUDGET)
    monkeypatch.setattr(ladder, "check_by_emulator", lambda folder: None)
    path = tmp_path / "ladder.json"
    result = bench_support.run("--shape", "33x257", "--json", path, main=ladder.main)
    assert result.exit_code == 0, result
    assert bench_support.run("--show", path, main=ladder.main).stdout.strip() in result.stdout
    rows = record.read(path)["rows"]
    assert [row["name"] for row in rows] == [*(source.name for source in ladder.CPU), *ladder.OTHERS]
    assert all(row["median"] > 0 for row in rows)
    assert rows[-1]["copies"] == 1


def wrong_rung(folder: Path, change: tuple[str, str]) -> Path:
    source = shutil.copy(ladder.CPU[1], folder)
    text = Path(source).read_text(encoding="utf-8")
    assert text.count(change[0]) == 1
    Path(source).write_text(text.replace(*change), encoding="utf-8")
    return Path(source)


@pytest.mark.skipif(shutil.which("g++") is None, reason="the rungs are compiled by g++")
def test_a_wrong_rung_is_reported_and_not_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ladder, "FOLDER", tmp_path)
    monkeypatch.setattr(ladder, "CPU", [wrong_rung(tmp_path, ("factor = share / sum", "factor = share / (sum + 1)"))])
    monkeypatch.setattr(timer.Timer, "rounds", lambda *_: pytest.fail("timed"))
    result = bench_support.run("--shape", "5x7", main=ladder.main)
    assert result.exit_code == 1
    assert "cpu2_one_row.cpp: WRONG: gradient: RMS error" in result.stderr


def test_a_rung_that_does_not_compile_is_one_line_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ladder, "FOLDER", tmp_path)
    monkeypatch.setattr(ladder, "CPU", [wrong_rung(tmp_path, ("#include <cmath>", "#include <no_such_file>"))])
    result = bench_support.run("--shape", "5x7", main=ladder.main)
    assert result.exit_code == 1
    assert "bench: cpu2_one_row.cpp does not compile" in result.stderr
    assert "no_such_file" in result.stderr


def test_a_shape_that_is_none_is_refused() -> None:
    result = bench_support.run("--shape", "5", "--check", main=ladder.main)
    assert (result.exit_code, "impossible shape '5'" in result.stderr) == (1, True)


def test_the_table_of_the_page_is_the_recorded_one() -> None:
    assert ladder.table(record.read(record.RESULTS / "ladder.json")) in PAGE
