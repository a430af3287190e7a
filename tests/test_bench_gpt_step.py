"""`python -m bench gpt_step`: what embeddings and loss cost in a GPT's step, and what is left of that."""

from __future__ import annotations

from pathlib import Path

import bench_support
import pytest

from bench import gpt_step, record
from charlm.lm.models import GPT

quiet = bench_support.quiet  # a fixture


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt_step, "BATCH", 2)
    monkeypatch.setattr(gpt_step, "LAYERS", 1)
    monkeypatch.setattr(gpt_step, "QUICK", bench_support.TINY_BUDGET)


def test_gpt_step_times_three_steps_and_records_the_share(quiet: None, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    result = bench_support.run("gpt_step", "--quick", "--json", path)
    (point,) = record.read(path)["gpt_step"]
    assert point["vocabulary"] == 65
    assert set(point["seconds"]) == {"ours", "torch", "without"}
    assert point["ends"].keys() == point["seconds"].keys()
    assert all(seconds > 0 for part in ("seconds", "ends") for seconds in point[part].values())
    assert point["share"] == gpt_step.share(point["ends"])
    assert gpt_step.summary([point]) in result.output


def test_the_share_is_of_what_deleting_would_save() -> None:
    assert gpt_step.share({"torch": 10.0, "without": 6.0, "ours": 7.0}) == pytest.approx(0.75)
    assert gpt_step.share({"torch": 10.0, "without": 6.0, "ours": 10.0}) == 0


def test_gpt_step_times_nothing_that_is_wrong(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = GPT.loss_of
    monkeypatch.setattr(GPT, "loss_of", lambda self, *args, **options: 1.001 * right(self, *args, **options))
    result = bench_support.run("gpt_step", "--quick")
    assert result.exit_code == 1
    assert "V 65: WRONG: loss: relative error 1.0e-03" in result.stderr
