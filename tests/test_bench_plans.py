"""`python -m bench plans`: is the plan that embedding_linear chooses the faster one?"""

from __future__ import annotations

from pathlib import Path

import bench_support
import pytest

from bench import plans, record
from charlm import functional

quiet = bench_support.quiet  # a fixture
RECORD = Path(__file__).parent.parent / "bench" / "results" / "plans.json"


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans, "QUICK_ROWS", (4, 512))
    monkeypatch.setattr(plans, "VOCABULARIES", (27,))
    monkeypatch.setattr(plans, "LAYERS", ((8, 24, 200),))
    monkeypatch.setattr(plans, "BUDGET", bench_support.TINY_BUDGET)
    monkeypatch.setattr(plans, "LONGER", bench_support.TINY_BUDGET)


def test_plans_measures_both_and_records_the_regret(quiet: None, tmp_path: Path) -> None:
    path = tmp_path / "plans.json"
    result = bench_support.run("plans", "--quick", "--json", path)
    points = record.read(path)["plans"]
    assert [(point["pass"], point["shape"][0], point["plan"]) for point in points] == [
        ("forward", 4, "gathered"),
        ("backward", 4, "gathered"),
        ("forward", 512, "folded"),
        ("backward", 512, "folded"),
    ]
    assert plans.summary(points) in result.output
    assert all(seconds > 0 for point in points for seconds in point["seconds"].values())


def test_a_bad_choice_is_said_and_fails(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    regrets = iter([0.3, 0.2, 0.0, 0.3, 0.05, 0.1])  # a bad one is timed again
    monkeypatch.setattr(plans, "_times", lambda *args: {"seconds": {}, "regret": next(regrets)})
    result = bench_support.run("plans", "--quick")
    assert result.exit_code == 1
    assert result.stderr == "bench: forward, N 4, T 8, D 24, H 200, V 27: gathered takes 20% more\n"
    assert result.stdout == (
        "4 choices of a plan: 1 are the faster one, 2 take up to 10% more than the other, 1 more than that\n"
    )


def test_plans_times_nothing_that_is_wrong(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.embedding_linear
    monkeypatch.setattr(
        functional,
        "embedding_linear",
        lambda *args, plan, **options: right(*args, plan=plan, **options) * (1.001 if plan == "folded" else 1),
    )
    result = bench_support.run("plans", "--quick")
    assert result.exit_code == 1
    assert result.stderr.startswith("bench: N 4, T 8, D 24, H 200, V 27: WRONG: the plans differ by 1.0e-03")


def test_no_choice_of_the_record_takes_10_percent_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the whole grid
    points = record.read(RECORD)["plans"]
    sizes = {(n, *layer, v) for n in plans.ROWS for layer in plans.LAYERS for v in plans.VOCABULARIES}
    assert {(point["pass"], *point["shape"]) for point in points} == {
        (name, *size) for name in ("forward", "backward") for size in sizes
    }
    assert [plans.describe(point) for point in points if point["regret"] > plans.MOST_REGRET] == []
