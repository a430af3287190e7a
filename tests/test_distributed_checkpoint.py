"""Checkpoints that several processes write together: the bits of one file, and never half of a checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_support import processes, results_of_processes
from lm_support import StopAt, fails, succeeds
from safetensors.torch import load_file
from torch import Tensor

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.checkpoint import MANIFEST
from charlm.lm.config import Config
from charlm.lm.data import build_corpus, read_text
from charlm.lm.parallel import gathered
from charlm.lm.train import Trainer

TEXT = "\n".join(read_text(None).split("\n")[:300])
CORPUS = build_corpus(TEXT)
# Of a tensor of four rows the third of three processes has none.
CONFIG = Config.of_type(
    "gpt", n_embd=4, n_head=2, n_layer=2, block_size=6, batch_size=6, dropout=0.2, max_steps=40, eval_interval=10
)
Tensors = dict[str, Tensor]


class Recording(Trainer):
    """A trainer that gathers the state that it saves."""

    saved: tuple[Tensors, Tensors]

    def save(self) -> None:
        super().save()
        self.saved = self.state()

    def state(self) -> tuple[Tensors, Tensors]:
        return gathered(self.best_weights, self.processes), gathered(self._training_state(), self.processes)


def trainer_in(run: str | Path) -> Recording:
    resumed = checkpoint.load(Path(run), mapped=True) if checkpoint.exists(Path(run)) else None
    parallel = "fsdp" if torch.distributed.is_initialized() else "ddp"
    return Recording(CONFIG, CORPUS, Path(run), resumed, processes=processes(), parallel=parallel)


def train(run: str, stop: int) -> tuple[Any, Any]:
    """Begins or resumes a run and stops it at a step; the state that it restored first, and that it saved last."""
    trainer = trainer_in(run)
    restored = trainer.state()
    trainer.run(stop=StopAt(trainer, stop))
    return restored, trainer.saved


def assert_equal(ours: Tensors, theirs: Tensors) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.shape) == (theirs[name].dtype, theirs[name].shape)
        assert tensor.equal(theirs[name])


@pytest.fixture(scope="module")
def saved_by_two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[Tensors, Tensors]]:
    """A run that two processes have stopped at step 13, and the state that they saved."""
    folder = tmp_path_factory.mktemp("two")
    (_, saved), _ = results_of_processes(2, folder / "group", train, str(folder / "run"), 13)
    return folder / "run", saved


@pytest.fixture
def run(saved_by_two: tuple[Path, tuple[Tensors, Tensors]], tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved_by_two[0], tmp_path / "run"))


def files_of(run: Path) -> dict[str, list[dict[str, Any]]]:
    return json.loads((run / MANIFEST).read_text())["files"]


@pytest.mark.exhaustive
def test_one_process_loads_what_two_have_saved(saved_by_two: tuple[Path, tuple[Tensors, Tensors]]) -> None:
    run, (weights, training) = saved_by_two
    loaded = checkpoint.load(run)
    assert_equal(loaded.weights, weights)
    assert_equal(loaded.training, training)


@pytest.mark.exhaustive
def test_each_process_writes_its_rows_and_the_first_one_the_rest(
    saved_by_two: tuple[Path, tuple[Tensors, Tensors]],
) -> None:
    run, wholes = saved_by_two
    for entries, whole in zip(files_of(run).values(), wholes, strict=True):
        for rank, entry in enumerate(entries):
            for name, part in load_file(run / entry["name"]).items():
                is_sharded = whole[name].ndim > 0 and name != "random.batches"
                assert part.equal(whole[name].chunk(2)[rank] if is_sharded else whole[name])
                assert is_sharded or rank == 0
    assert len(list(run.glob("*.safetensors"))) == 4
    assert {path.suffix for path in run.iterdir()} == {".json", ".jsonl", ".csv", ".safetensors"}


@pytest.mark.exhaustive
def test_a_run_goes_on_with_the_same_bits_in_one_process_and_in_three(run: Path, tmp_path: Path) -> None:
    before = checkpoint.load(run)
    restored, _ = train(str(run), 17)
    assert_equal(restored[0], before.weights)
    assert_equal(restored[1], before.training)
    assert json.loads((run / MANIFEST).read_text())["version"] == 1
    before = checkpoint.load(run)
    (restored, saved), *_ = results_of_processes(3, tmp_path / "group", train, str(run), 23)
    assert_equal(restored[0], before.weights)
    assert_equal(restored[1], before.training)
    loaded = checkpoint.load(run)
    assert loaded.step >= 23
    assert_equal(loaded.training, saved[1])
    assert len(list(run.glob("*.safetensors"))) == 6


def test_every_command_reads_it(run: Path, tmp_path: Path) -> None:
    data = tmp_path / "names.txt"
    data.write_text(TEXT)
    assert "dev" in succeeds("eval", run, "-i", data)
    assert succeeds("sample", run, "--num-samples", 2).count("\n") == 2
    assert "5 characters" in succeeds("score", run, "emma")
    assert "run" in succeeds("compare", run, "-i", data)
    (run / files_of(run)["model"][1]["name"]).unlink()
    assert "a part of the checkpoint: No such file" in fails("sample", run)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("part", ["model", "training"])
@pytest.mark.parametrize("mapped", [False, True])
def test_a_damaged_file_of_any_rank_is_a_user_error(run: Path, part: str, rank: int, mapped: bool) -> None:
    path = run / files_of(run)[part][rank]["name"]
    data = path.read_bytes()
    for damaged, words in ((data[:-1], "is truncated"), (data[:-1] + bytes([data[-1] ^ 1]), "is altered")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name} {words}"):
            checkpoint.load(run, mapped=mapped)
    path.unlink()
    with pytest.raises(UserError, match="a part of the checkpoint: No such file"):
        checkpoint.load(run, mapped=mapped)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda entries: entries[:1], "do not fit its model"),
        (lambda entries: [*entries, entries[1]], "is the file of rank 1, in the place of that of rank 2"),
        (lambda entries: [], "do not fit its model"),
        (lambda entries: entries[::-1], "is the file of rank 1, in the place of that of rank 0"),
        (lambda entries: "model", "is damaged: model is 'model'"),
        (lambda entries: ["model"], "is damaged"),
        (
            lambda entries: [entries[0], {**entries[1], "name": "../model"}],
            "'../model' is not the name of a model file",
        ),
    ],
)
def test_a_manifest_with_other_files_is_a_user_error(run: Path, change: Callable[[Any], Any], words: str) -> None:
    manifest = json.loads((run / MANIFEST).read_text())
    manifest["files"]["model"] = change(manifest["files"]["model"])
    (run / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=words):
        checkpoint.load(run).build_model()


def changed(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    """`tensors` with the first moment of the first parameter that has more than one row changed."""
    name = next(name for name, tensor in tensors.items() if name.endswith("exp_avg") and len(tensor) > 1)
    return {**tensors, name: change(tensors[name])}


@pytest.mark.parametrize("change", [lambda t: t[:-1].clone(), lambda t: torch.cat([t, t]), Tensor.int, Tensor.sum])
def test_moments_that_do_not_fit_are_a_user_error(run: Path, change: Callable[[Tensor], Tensor]) -> None:
    train(str(run), 17)  # in one process: a file of each part
    saved = checkpoint.load(run)
    checkpoint.save(run, replace(saved, training=changed(dict(saved.training), change)))
    with pytest.raises(UserError, match="does not fit its own config"):
        trainer_in(run)


# ---- a save that takes long, or fails


def steps_while_rank_1_writes(run: str) -> int:
    """The most steps that this process has made while rank 1 wrote a file, which waits for three of them."""
    trainer, write, made = trainer_in(run), checkpoint.write_atomically, [0]

    def slow(path: Path, data: bytes) -> None:
        begun, end = trainer.step, time.monotonic() + 30
        while trainer.step < min(begun + 3, CONFIG.max_steps) and time.monotonic() < end:
            time.sleep(0.001)
        made.append(trainer.step - begun)
        write(path, data)

    with pytest.MonkeyPatch.context() as patch:
        if torch.distributed.get_rank() == 1:
            patch.setattr(checkpoint, "write_atomically", slow)
        assert trainer.run()
    return max(made)


@pytest.mark.exhaustive
def test_all_ranks_train_on_while_one_writes(tmp_path: Path) -> None:
    steps = results_of_processes(2, tmp_path / "group", steps_while_rank_1_writes, str(tmp_path / "run"))
    assert steps[0] == 0
    assert steps[1] >= 3
    assert checkpoint.load(tmp_path / "run").step == CONFIG.max_steps


def save_twice(folders: list[str], patched: Callable[[pytest.MonkeyPatch, int], None]) -> str:
    """Saves, and again under `patched`, each rank in its own of `folders`; the error of the second time."""
    rank = torch.distributed.get_rank()
    trainer = trainer_in(folders[rank])
    trainer.best_weights = trainer.model.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        for _ in range(2):
            try:
                trainer.save()
                trainer.finish_saving()
            except (OSError, UserError) as error:
                return str(error)
            patched(patch, rank)
            trainer.step += 1
    return ""


def full_disk(patch: pytest.MonkeyPatch, rank: int) -> None:
    def full(_: int) -> None:
        raise OSError(28, os.strerror(28))

    if rank == 1:
        patch.setattr(os, "fsync", full)


def no_change(patch: pytest.MonkeyPatch, rank: int) -> None:
    pass


@pytest.mark.exhaustive
def test_a_full_disk_of_one_rank_ends_all_and_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first, second = results_of_processes(2, tmp_path / "group", save_twice, [str(run)] * 2, full_disk)
    assert first.startswith(f"rank 1: cannot write {run}/model-")
    assert first.endswith(": No space left on device")
    assert second.startswith("[Errno 28] No space left on device")
    assert checkpoint.load(run).step == 0
    assert len(list(run.glob("*.safetensors"))) == 4
    assert not list(run.glob(".*"))


@pytest.mark.exhaustive
def test_ranks_that_do_not_share_a_folder_have_no_checkpoint(tmp_path: Path) -> None:
    folders = [str(tmp_path / "run"), str(tmp_path / "other")]
    first, second = results_of_processes(2, tmp_path / "group", save_twice, folders, no_change)
    assert first.endswith("of rank 1 is not here: the ranks must share the folder")
    assert second == f"rank 0: {first}"
    assert not checkpoint.exists(tmp_path / "run")
