"""diagnostics.jsonl: what it records is right, and recording changes nothing."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_support import StopAt, succeeds

from charlm.lm import checkpoint, diagnostics
from charlm.lm.config import Config
from charlm.lm.data import build_corpus
from charlm.lm.diagnostics import BINS, DIAGNOSTICS, activations, histogram
from charlm.lm.train import Trainer

TEXT = "emma\nolivia\nava\nisabella\nsophia\n" * 30
CORPUS = build_corpus(TEXT)
SIZES = {"format": "line", "block_size": 4, "n_embd": 4, "n_hidden": 8, "n_head": 2, "n_layer": 2, "batch_size": 8}
SMALL: dict[str, Any] = {**SIZES, "max_steps": 12, "log_interval": 1, "eval_interval": 4, "warmup_steps": 2}
NETWORKS: list[dict[str, Any]] = [
    {"type": "mlp", "batch_norm": True, "dropout": 0.2, "grad_clip": 0.1},
    {"type": "mlp", "mix_ngram": 2, "token_noise": 0.1, "gradient_accumulation_steps": 2},
    {"type": "wavenet"},
    {"type": "gpt", "dropout": 0.2, "dtype": "bfloat16"},
    {"type": "bow", "mix_ngram": 3},
    {"type": "lstm", "n_layer": 2, "dropout": 0.2},
]


@pytest.fixture
def every_step(monkeypatch):
    """Records are free, so that every due step is recorded."""
    monkeypatch.setattr(diagnostics, "SHARE", float("inf"))


def losses_of(config: Config, folder: Path, **options: Any) -> list[tuple[str, float]]:
    found: list[tuple[str, float]] = []
    assert Trainer(config, CORPUS, folder, **options).run(
        lambda progress: found.append((progress.split, progress.nats))
    )
    return found


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / DIAGNOSTICS).read_text().splitlines()]


@pytest.mark.parametrize("options", NETWORKS, ids=lambda options: options["type"])
def test_recording_changes_no_loss_and_no_weight(tmp_path, every_step, options):
    config = Config(**{**SMALL, **options})
    assert losses_of(config, tmp_path / "with") == losses_of(config, tmp_path / "without", diagnostics=False)
    ours, theirs = checkpoint.load(tmp_path / "with"), checkpoint.load(tmp_path / "without")
    assert all(tensor.equal(theirs.training[name]) for name, tensor in ours.training.items())
    found = records(tmp_path / "with")
    assert [record["step"] for record in found] == list(range(1, 13))
    assert not (tmp_path / "without" / DIAGNOSTICS).exists()
    network = ours.build_model()
    names = {name.removeprefix("network.") for name, _ in network.named_parameters()}
    matrices = {name.removeprefix("network.") for name, p in network.named_parameters() if p.dim() > 1}
    for record in found:
        assert set(record["gradients"]) == names
        assert set(record["updates"]) == matrices
        assert len(record["activations"]) == {"mlp": 1, "wavenet": 2, "gpt": 2, "bow": 1, "lstm": 2}[options["type"]]


def test_an_update_and_a_gradient_are_those_of_the_step(tmp_path, every_step):
    config = Config(**{**SMALL, "optimizer": "sgd", "weight_decay": 0.0, "max_steps": 1, "schedule": "constant"})
    trainer = Trainer(config, CORPUS, tmp_path)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.run()
    (record,) = records(tmp_path)
    for name, p in trainer.model.named_parameters():
        update = p.detach() - before[name]
        gradient = -update / (config.learning_rate / (config.warmup_steps + 1))
        assert record["gradients"][name]["std"] == pytest.approx(gradient.std(correction=0).item(), rel=1e-2)
        assert sum(record["gradients"][name]["counts"]) == p.numel()
        if p.dim() > 1:
            assert record["updates"][name] == pytest.approx((update.std() / before[name].std()).item(), rel=1e-2)


def test_a_resumed_run_drops_the_records_beyond_its_step_and_an_overwritten_one_all(tmp_path, every_step):
    config = Config(**SMALL)
    trainer = Trainer(config, CORPUS, tmp_path)
    assert not trainer.run(stop=StopAt(trainer, 6))
    with (tmp_path / DIAGNOSTICS).open("a") as file:
        file.write('{"step": 7, "updates": {}}\n{"step": 8')  # of steps after the checkpoint, cut by a crash
    assert Trainer(config, CORPUS, tmp_path, checkpoint.load(tmp_path)).run()
    assert [record["step"] for record in records(tmp_path)] == list(range(1, 13))
    assert all(record["updates"] for record in records(tmp_path))
    Trainer(config, CORPUS, tmp_path, diagnostics=False).run()
    assert records(tmp_path) == []


def test_the_command_records_unless_told_not_to(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(TEXT)
    tiny = ("-i", path, "--n-hidden", 8, "--batch-size", 8, "--max-steps", 3)
    succeeds("train", "-o", tmp_path / "on", *tiny)
    succeeds("train", "-o", tmp_path / "off", *tiny, "--no-diagnostics")
    assert records(tmp_path / "on")[0]["step"] == 1
    assert not (tmp_path / "off" / DIAGNOSTICS).exists()


def test_records_are_few_and_stop_where_they_would_take_more_than_their_share(tmp_path, monkeypatch):
    config = Config(**{**SMALL, "max_steps": 300, "eval_interval": 300})
    ticks = itertools.count()  # the clock: a second between two looks at it, and no time in a step
    monkeypatch.setattr(diagnostics.time, "perf_counter", lambda: float(next(ticks)))
    Trainer(config, CORPUS, tmp_path).run()
    steps = [record["step"] for record in records(tmp_path)]
    assert steps[0] == 1
    assert 2 <= len(steps) <= 300 / 3 * 0.1  # of the 100 that are due
    assert all(step % 3 == 0 for step in steps[1:])


def test_a_histogram_counts_every_element_and_saturation_is_a_share():
    values = torch.tensor([-1.0, -0.98, -0.2, 0.0, 0.4, 0.99, 1.0])
    found = histogram(values, 1.0)
    assert len(found["counts"]) == BINS
    assert (found["counts"][0], found["counts"][-1], sum(found["counts"])) == (2, 2, 7)
    assert found["counts"][BINS // 2] == 1
    assert histogram(torch.zeros(3))["counts"][BINS // 2] == 3
    assert histogram(torch.tensor([1.0, float("nan")])) == {"mean": None, "std": None, "bound": None, "counts": []}
    assert histogram(torch.tensor([5.0]))["std"] == 0
    trainer = Trainer(Config(**SMALL), CORPUS, Path("unused"))
    with torch.no_grad():
        trainer.model.hidden.bias.fill_(1e3)
    (layer,) = activations(trainer.model, torch.zeros(2, 4, dtype=torch.uint8)).values()
    assert layer["saturated"] == 1
    assert trainer.model.training
