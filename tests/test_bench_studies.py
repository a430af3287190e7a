"""The studies of bench/studies: what they measure, what they refuse to time, and what their records hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_support
import pytest
import torch

from bench import record
from bench.studies import first_layer
from charlm import functional

quiet = bench_support.quiet  # a fixture
ROOT = Path(__file__).parent.parent
FOLD_RECORD, PLANS_RECORD = record.RESULTS / "skip_the_matmul.json", record.RESULTS / "plans.json"


def first_layer_command(*arguments: object) -> bench_support.Ended:
    return bench_support.run(*arguments, main=first_layer.main)


def fold_wrongly(monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.embedding_linear

    def wrong(*args: Any, plan: str, **options: Any) -> torch.Tensor:
        return right(*args, plan=plan, **options) * (1.001 if plan == "folded" else 1)

    monkeypatch.setattr(functional, "embedding_linear", wrong)


@pytest.fixture
def _small(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_layer, "ROWS", (1, 64))
    monkeypatch.setattr(first_layer, "GRID_ROWS", (4, 512))
    monkeypatch.setattr(first_layer, "GRID_VOCABULARIES", (27,))
    monkeypatch.setattr(first_layer, "GRID_LAYERS", ((8, 24, 200),))
    for name in ("BUDGET", "GRID_BUDGET", "LONGER"):
        monkeypatch.setattr(first_layer, name, bench_support.TINY_BUDGET)


@pytest.mark.usefixtures("_small")
def test_break_even_measures_and_records(tmp_path: Path) -> None:
    path = tmp_path / "fold.json"
    result = first_layer_command("break-even", "--json", path)
    assert result.exit_code == 0, result
    assert result.stdout == first_layer_command("break-even", "--show", path).stdout
    for panel, vocabulary in zip(record.read(path)["fold"], first_layer.VOCABULARIES, strict=True):
        assert (panel["vocabulary"], panel["rows"]) == (vocabulary, [1, 64])
        assert panel["seconds"].keys() == {"folded", "gathered", "auto", "torch"}
        assert all(seconds > 0 for line in panel["seconds"].values() for seconds in line)


def test_break_even_draws_what_was_recorded(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "fold.png"
    assert first_layer_command("break-even", "--show", FOLD_RECORD, "--plot", path).exit_code == 0
    assert path.read_bytes().startswith(b"\x89PNG")


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
    assert first_layer.break_even((1, 4, 16), folded, gathered) == pytest.approx(expected)


@pytest.mark.parametrize("vocabulary", first_layer.VOCABULARIES)
def test_the_first_number_of_contexts_that_auto_folds_is_found(vocabulary: int) -> None:
    found = first_layer.auto_folds_from(vocabulary, 16384)
    for name, which in first_layer.PASSES.items():
        for rows, expected in ((found[name] - 1, "gathered"), (found[name], "folded")):
            layer = first_layer.make_layer(rows, first_layer.T, first_layer.D, first_layer.H, vocabulary)
            assert getattr(layer.output("auto", return_plan=True), which) == expected


def test_the_table_of_the_document_is_the_recorded_one() -> None:
    result = first_layer_command("break-even", "--show", FOLD_RECORD)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() in (ROOT / "docs" / "skip_the_matmul.md").read_text(encoding="utf-8")


def test_the_record_of_break_even_holds_every_point_and_follows_from_its_times() -> None:
    for panel, vocabulary in zip(record.read(FOLD_RECORD)["fold"], first_layer.VOCABULARIES, strict=True):
        seconds = panel["seconds"]
        assert (panel["vocabulary"], tuple(panel["rows"])) == (vocabulary, first_layer.ROWS)
        assert all(len(seconds[name]) == len(first_layer.ROWS) for name in first_layer.LINES)
        break_even = first_layer.break_even(first_layer.ROWS, seconds["folded"], seconds["gathered"])
        assert panel["break_even"] == pytest.approx(break_even)


@pytest.mark.usefixtures("_small")
def test_regret_measures_both_plans_of_both_passes(tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    result = first_layer_command("regret", "--json", path)
    points = record.read(path)["plans"]
    assert [(point["pass"], point["shape"][0], point["plan"]) for point in points] == [
        ("forward", 4, "gathered"),
        ("backward", 4, "gathered"),
        ("forward", 512, "folded"),
        ("backward", 512, "folded"),
    ]
    assert first_layer.summary(points) in result.stdout
    assert all(seconds > 0 for point in points for seconds in point["seconds"].values())


@pytest.mark.usefixtures("_small")
def test_a_bad_choice_is_timed_twice_said_and_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    regrets = iter([0.3, 0.2, 0.0, 0.3, 0.05, 0.1])
    monkeypatch.setattr(first_layer, "_times", lambda *args: {"seconds": {}, "regret": next(regrets)})
    result = first_layer_command("regret")
    assert result.exit_code == 1
    assert result.stdout == (
        "forward, N 4, T 8, D 24, H 200, V 27: gathered takes 20% more\n"
        "4 choices of a plan: 1 are the faster one, 2 take up to 10% more than the other, 1 more than that\n"
    )


def test_no_choice_of_the_record_takes_10_percent_more() -> None:
    points = record.read(PLANS_RECORD)["plans"]
    layers, vocabularies = first_layer.GRID_LAYERS, first_layer.GRID_VOCABULARIES
    sizes = {(n, *layer, v) for n in first_layer.GRID_ROWS for layer in layers for v in vocabularies}
    assert {(point["pass"], *point["shape"]) for point in points} == {
        (name, *size) for name in ("forward", "backward") for size in sizes
    }
    assert first_layer.bad_choices(points) == []


@pytest.mark.usefixtures("_small")
def test_nothing_that_is_wrong_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    fold_wrongly(monkeypatch)
    for result, said in (
        (
            first_layer_command("break-even"),
            'bench: plan "folded", N = 1, V = 27: WRONG: output: relative error 1.0e-03\n',
        ),
        (
            first_layer_command("regret"),
            "bench: N 4, T 8, D 24, H 200, V 27: WRONG: output: relative error 1.0e-03\n",
        ),
    ):
        assert (result.exit_code, result.stderr) == (1, said)
