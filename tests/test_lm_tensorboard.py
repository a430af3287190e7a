"""metrics.csv and `--tensorboard`: what they hold, also after a resume and a kill."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from lm_support import StopAt, fails, succeeds

import charlm
from charlm import UserError
from charlm.lm import tensorboard as boards
from charlm.lm.config import Config
from charlm.lm.data import build_corpus
from charlm.lm.metrics import CSV, METRICS, MetricsLog, read_metrics
from charlm.lm.optimizer import learning_rate_at
from charlm.lm.train import Trainer

NAMES = [f"{a}{b * n}" for n in range(1, 9) for a in "abcde" for b in "vwxyz"]
TINY = {"n_embd": 2, "n_hidden": 8, "log_interval": 2, "max_steps": 8, "eval_interval": 4, "progress": False}
CONFIG = Config.of_type("mlp", format="line", **{name: value for name, value in TINY.items() if name != "progress"})


def rows(folder: Path) -> list[dict[str, object]]:
    with (folder / CSV).open(newline="") as file:
        return [{**row, "step": int(row["step"]), "nats": float(row["nats"])} for row in csv.DictReader(file)]


def keys(folder: Path) -> list[tuple[object, object]]:
    return [(row["step"], row["split"]) for row in rows(folder)]


def curves(folder: Path) -> dict[str, list[tuple[int, Any]]]:
    """The points of every curve by its name, as TensorBoard reads them."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator
    from tensorboard.util.tensor_util import make_ndarray

    events = EventAccumulator(str(folder / boards.FOLDER)).Reload()
    points = {
        tag: [(e.step, make_ndarray(e.tensor_proto)) for e in events.Tensors(tag)] for tag in events.Tags()["tensors"]
    }
    return {
        tag.removesuffix("/text_summary"): [
            (step, value.item() if value.ndim == 0 else value[0].decode()) for step, value in found
        ]
        for tag, found in points.items()
    }


EXPECTED = [(2, "train"), (4, "train"), (4, "dev"), (6, "train"), (8, "train"), (8, "dev")]


def test_the_table_has_the_numbers_of_metrics_jsonl(tmp_path):
    run = charlm.train(NAMES, tmp_path / "run", **TINY)
    assert keys(run.directory) == EXPECTED
    for row, record in zip(rows(run.directory), run.history, strict=True):
        assert {name: str(value) for name, value in record.items()} == {name: str(value) for name, value in row.items()}
    run.save(tmp_path / "copy")
    assert (tmp_path / "copy" / CSV).read_bytes() == (run.directory / CSV).read_bytes()
    charlm.train(NAMES, run.directory, overwrite=True, **{**TINY, "max_steps": 2})
    assert keys(run.directory) == [(2, "train"), (2, "dev")]


def test_what_is_behind_the_checkpoint_or_torn_is_gone_after_a_resume(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(2, "train", 2.0, 1.0)
        assert not (tmp_path / CSV).exists()  # the table of an earlier run stays until the first checkpoint
        log.checkpointed()
        log.write(4, "train", 1.5, 1.0)
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 4, "spl')
    (tmp_path / CSV).write_text("step,split\n4,tra")
    with MetricsLog(tmp_path, 2) as log:
        log.write(4, "train", 1.25, 1.0)
        log.checkpointed()
    assert [(row["step"], row["nats"]) for row in rows(tmp_path)] == [(2, 2.0), (4, 1.25)]
    assert [record["nats"] for record in read_metrics(tmp_path)] == [2.0, 1.25]


@pytest.mark.exhaustive
def test_a_killed_run_has_a_whole_table_and_its_resume_no_row_twice(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    code = (
        "import os, sys, charlm\nfrom charlm.lm.train import Trainer\nbackward = Trainer._backward\n"
        "def killed(self, *a):\n    if self.step == 7:\n        self.finish_saving()\n        os.kill(os.getpid(), 9)\n"
        f"    return backward(self, *a)\nTrainer._backward = killed\ncharlm.train(*sys.argv[1:], **{TINY})"
    )
    command = [sys.executable, "-c", code, tmp_path / "names.txt", tmp_path / "run"]
    assert subprocess.run(command, timeout=300, check=False).returncode == -9
    found = keys(tmp_path / "run")
    assert len(found) in (3, 4)  # the checkpoint of step 4 is written while training goes on
    assert found == EXPECTED[: len(found)]
    charlm.train(directory=tmp_path / "run", resume=True, **TINY)
    assert keys(tmp_path / "run") == EXPECTED


# ---- TensorBoard


def test_the_curves_are_those_of_the_run_and_go_on_after_a_resume(tmp_path):
    pytest.importorskip("tensorboard")
    corpus = build_corpus("\n".join(NAMES))
    with pytest.MonkeyPatch.context() as patch:
        save = Trainer.save
        patch.setattr(Trainer, "save", lambda self: None if self.step > 4 else save(self))
        trainer = Trainer(CONFIG, corpus, tmp_path, tensorboard=True)
        trainer.run(stop=StopAt(trainer, 7), on_step=lambda: trainer.board.samples(trainer.step, ["a<b>\nc"]))
    assert [step for step, _ in curves(tmp_path)["loss/train"]] == [2, 4, 6]  # the checkpoint is of step 4
    succeeds("train", "-i", _written(tmp_path.parent / "names.txt"), "-o", tmp_path, "--resume", "--tensorboard")
    found = curves(tmp_path)
    metrics = read_metrics(tmp_path)
    for split in ("train", "dev"):
        wanted = [(record["step"], record["nats"]) for record in metrics if record["split"] == split]
        assert found[f"loss/{split}"] == [(step, pytest.approx(nats, rel=1e-6)) for step, nats in wanted]
        assert len(found[f"tokens_per_second/{split}"]) == len(wanted)
    rates = [(step, pytest.approx(learning_rate_at(CONFIG, step - 1), rel=1e-6)) for step in (2, 4, 6, 8)]
    assert found["learning_rate"] == rates
    assert [step for step, norm in found["gradient_norm"] if norm > 0] == [2, 4, 6, 8]
    assert [step for step, _ in found["samples"]] == [1, 2, 3, 4]
    assert {text for _, text in found["samples"]} == {"    a<b>\n    c"}


def _written(path: Path) -> Path:
    path.write_text("\n".join(NAMES))
    return path


def test_a_new_run_replaces_the_curves_and_changes_no_number(tmp_path):
    pytest.importorskip("tensorboard")
    options = {**TINY, "grad_clip": 0.5, "tensorboard": True, "sample_every": 4}
    charlm.train(NAMES, tmp_path / "run", **{**options, "seed": 1})
    run = charlm.train(NAMES, tmp_path / "run", overwrite=True, **options)
    assert len(list((tmp_path / "run" / boards.FOLDER).iterdir())) == 1
    found = curves(tmp_path / "run")
    assert [step for step, _ in found["loss/train"]] == [2, 4, 6, 8]
    assert [step for step, _ in found["samples"]] == [4, 8]
    silent = charlm.train(NAMES, tmp_path / "silent", **{**options, "tensorboard": False, "sample_every": 0})
    assert [record["nats"] for record in run.history] == [record["nats"] for record in silent.history]
    assert not (tmp_path / "silent" / boards.FOLDER).exists()
    charlm.train(NAMES, tmp_path / "run", overwrite=True, **TINY)
    assert not list((tmp_path / "run" / boards.FOLDER).iterdir())  # those of the replaced run


def test_without_the_package_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    message = fails("train", "--tensorboard", "-o", tmp_path / "run")
    assert "--tensorboard needs the package tensorboard: pip install" in message
    with pytest.raises(UserError, match=r"^tensorboard=True needs the package tensorboard: pip install"):
        charlm.train(NAMES, tmp_path / "run", tensorboard=True, **TINY)
    assert not (tmp_path / "run").exists()
