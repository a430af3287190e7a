"""`python -m bench fold`: the two plans of embedding_linear against N, and the document that shows them."""

from __future__ import annotations

from pathlib import Path

import bench_support
import pytest

from bench import fold, record
from charlm import functional

quiet = bench_support.quiet  # a fixture
ROOT = Path(__file__).parent.parent
FOLD_RECORD = ROOT / "bench" / "results" / "skip_the_matmul.json"


def test_fold_measures_and_records(quiet: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(fold, "QUICK_ROWS", (1, 64))
    monkeypatch.setattr(fold, "QUICK", bench_support.TINY_BUDGET)
    path = tmp_path / "fold.json"
    result = bench_support.run("fold", "--quick", "--json", path)
    assert result.exit_code == 0, (result.output, result.exception)
    assert result.stdout == bench_support.run("table", path).stdout
    for panel, vocabulary in zip(record.read(path)["fold"], fold.VOCABULARIES, strict=True):
        assert (panel["vocabulary"], panel["rows"]) == (vocabulary, [1, 64])
        assert panel["seconds"].keys() == {"folded", "gathered", "auto", "torch"}
        assert all(seconds > 0 for line in panel["seconds"].values() for seconds in line)


def test_fold_draws_what_was_recorded(quiet: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(fold, "measure", lambda quick: record.read(FOLD_RECORD)["fold"])
    result = bench_support.run("fold", "--plot", tmp_path / "fold.png")
    assert result.exit_code == 0, (result.output, result.exception)
    assert (tmp_path / "fold.png").read_bytes().startswith(b"\x89PNG")


def test_fold_times_nothing_that_is_wrong(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.embedding_linear
    monkeypatch.setattr(functional, "embedding_linear", lambda *args, **options: right(*args, **options) * 1.0001)
    result = bench_support.run("fold", "--quick")
    assert result.exit_code == 1
    assert result.stderr.startswith('bench: plan "folded", N = 1, V = 27: WRONG: output: relative error 1.0e-04')


@pytest.mark.parametrize(
    ("folded", "gathered", "expected"),
    [
        ([2.0, 2.0, 2.0], [1.0, 4.0, 16.0], 2.0),  # half-way between 1 and 4 in the logarithm
        ([2.0, 8.0, 2.0], [4.0, 4.0, 4.0], 8.0),  # faster at 1 too, but not from there on
        ([1.0, 1.0, 1.0], [2.0, 2.0, 2.0], 1.0),
        ([2.0, 2.0, 2.0], [1.0, 1.0, 1.0], None),
    ],
)
def test_the_break_even_is_interpolated(folded: list[float], gathered: list[float], expected: float | None) -> None:
    assert fold.break_even((1, 4, 16), folded, gathered) == pytest.approx(expected)


def test_the_first_number_of_contexts_that_auto_folds_is_found() -> None:
    for vocabulary in fold.VOCABULARIES:
        for name, which in (("forward", "plan"), ("backward", "backward_plan")):
            n = fold.auto_folds_from(vocabulary, 16384)[name]
            for rows, expected in ((n - 1, "gathered"), (n, "folded")):
                tokens, (*parameters, _) = fold._inputs(rows, vocabulary)
                output = functional.embedding_linear(tokens, *parameters, activation="tanh", return_plan=True)
                assert getattr(output, which) == expected


def test_the_documents_table_is_the_recorded_one() -> None:
    result = bench_support.run("table", FOLD_RECORD)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() in (ROOT / "docs" / "skip_the_matmul.md").read_text(encoding="utf-8")


def test_the_record_of_fold_holds_every_point_and_follows_from_its_times() -> None:
    for panel, vocabulary in zip(record.read(FOLD_RECORD)["fold"], fold.VOCABULARIES, strict=True):
        seconds = panel["seconds"]
        assert (panel["vocabulary"], tuple(panel["rows"])) == (vocabulary, fold.ROWS)
        assert all(len(seconds[name]) == len(fold.ROWS) for name in (*fold.PLANS, "torch"))
        break_even = fold.break_even(fold.ROWS, seconds["folded"], seconds["gathered"])
        assert panel["break_even"] == pytest.approx(break_even)
