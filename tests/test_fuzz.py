"""The fuzz finds nothing in our ops, and finds an error that is put in."""

from __future__ import annotations

import pytest
import torch

from tests import fuzz


@pytest.fixture(autouse=True)
def threads():
    found = torch.get_num_threads()
    yield
    torch.set_num_threads(found)


@pytest.mark.filterwarnings("ignore")
def test_some_seconds_of_a_known_seed_find_nothing(capsys):
    assert fuzz.main(["--seconds", "3", "--seed", "1"]) == 0
    assert " 0 failures" in capsys.readouterr().out


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_wrong_divisor_is_found_with_the_line_that_repeats_it(capsys, monkeypatch):
    right = fuzz.F.cross_entropy

    def wrong(x, y, *args, **options):  # a mean over all targets, ignored ones too
        loss = right(x, y, *args, **options)
        is_mean = isinstance(loss, torch.Tensor) and options["reduction"] == "mean"  # or a tuple, with metrics
        if is_mean and not y.is_floating_point() and y.numel() > 1:
            return loss * (y != options["ignore_index"]).double().mean()
        return loss

    monkeypatch.setattr(fuzz.F, "cross_entropy", wrong)
    assert fuzz.main(["--seconds", "20", "--seed", "1", "--op", "cross_entropy"]) == 1
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith("python -m tests.fuzz --seed 1 --case ")
    monkeypatch.undo()
    number = line.split("--case ")[1].split()[0]
    assert fuzz.main(["--seed", "1", "--op", "cross_entropy", "--case", number]) == 0
