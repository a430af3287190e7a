"""Checkpoints are loaded as saved, and interrupted saves leave the old one."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.checkpoint import MANIFEST, Checkpoint
from charlm.lm.config import Config
from charlm.lm.models import build_model
from charlm.lm.vocabulary import Vocabulary

CONFIG = Config(block_size=2, n_embd=3, n_hidden=4)


def a_checkpoint(step: int = 5) -> Checkpoint:
    vocabulary = Vocabulary(".aé😀", separator=True)
    model_config = CONFIG.model_config(len(vocabulary), vocabulary.pad_token)
    torch.manual_seed(step)
    model = build_model(**model_config)
    return Checkpoint(
        step=step,
        config=CONFIG,
        model=model_config,
        vocabulary=vocabulary,
        digest="0" * 64,
        best_step=step,
        best_nats=1 / 3,
        weights=model.state_dict(),
        training={"random.cpu": torch.get_rng_state(), "loss_sum": torch.tensor(0.1)},
    )


def assert_is(loaded: Checkpoint, saved: Checkpoint) -> None:
    same = {"weights": {}, "training": {}}
    assert replace(loaded, **same) == replace(saved, **same)
    for ours, theirs in ((loaded.weights, saved.weights), (loaded.training, saved.training)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_is_saved_is_loaded(tmp_path):
    checkpoint.save(tmp_path / "new" / "folder", a_checkpoint())
    assert_is(checkpoint.load(tmp_path / "new" / "folder"), a_checkpoint())


def test_the_folder_holds_json_and_safetensors_and_only_the_last_save(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, a_checkpoint(step))
    names = sorted(re.sub(r"-[0-9a-f]{16}\.", ".", path.name) for path in tmp_path.iterdir())
    assert names == ["checkpoint.json", "model.safetensors", "training.safetensors"]
    assert json.loads((tmp_path / MANIFEST).read_text())["step"] == 3


@pytest.mark.parametrize("fail_at", [1, 2, 3])
@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_an_interrupted_save_leaves_the_old_checkpoint(tmp_path, monkeypatch, fail_at, function):
    checkpoint.save(tmp_path, a_checkpoint(1))
    calls = []

    def failing(original):
        def call(*arguments):
            calls.append(arguments)
            if len(calls) == fail_at:
                raise OSError(28, "No space left on device")
            return original(*arguments)

        return call

    with monkeypatch.context() as patch:
        if function == "fsync":
            patch.setattr(os, "fsync", failing(os.fsync))
        else:
            patch.setattr(Path, "replace", failing(Path.replace))
        with pytest.raises(OSError, match="No space left"):
            checkpoint.save(tmp_path, a_checkpoint(2))
    assert_is(checkpoint.load(tmp_path), a_checkpoint(1))
    assert not list(tmp_path.glob(".*"))
    checkpoint.save(tmp_path, a_checkpoint(3))
    assert_is(checkpoint.load(tmp_path), a_checkpoint(3))
    assert len(list(tmp_path.iterdir())) == 3


def test_a_missing_checkpoint_is_a_user_error(tmp_path):
    assert not checkpoint.exists(tmp_path)
    with pytest.raises(UserError, match=r"there is no checkpoint in .*nowhere"):
        checkpoint.load(tmp_path / "nowhere")


@pytest.mark.parametrize("part", ["model", "training"])
def test_a_truncated_altered_or_missing_tensor_file_is_a_user_error(tmp_path, part):
    checkpoint.save(tmp_path, a_checkpoint())
    path = next(tmp_path.glob(f"{part}-*"))
    data = path.read_bytes()
    for damaged, words in ((data[:-1], "is truncated"), (data[:-1] + bytes([data[-1] ^ 1]), "is altered")):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=f"{path.name} {words}"):
            checkpoint.load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match="a part of the checkpoint: No such file"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("text", ["", '{"version"', "[]", "{}", "\x00", '{"version": 1}'])
def test_a_damaged_manifest_is_a_user_error(tmp_path, text):
    (tmp_path / MANIFEST).write_text(text)
    with pytest.raises(UserError, match=f"{MANIFEST} is damaged"):
        checkpoint.load(tmp_path)


@pytest.mark.parametrize("name", ["block_size", "batch_size", "max_steps", "eval_tokens"])
def test_a_null_for_a_number_of_the_config_is_a_user_error(tmp_path, name):
    checkpoint.save(tmp_path, a_checkpoint())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    manifest["config"][name] = None
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=f"{MANIFEST} is damaged"):
        checkpoint.load(tmp_path)


def test_a_newer_checkpoint_is_a_user_error(tmp_path):
    checkpoint.save(tmp_path, a_checkpoint())
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    (tmp_path / MANIFEST).write_text(json.dumps({**manifest, "version": 3}))
    with pytest.raises(UserError, match=r"written by a newer charlm .checkpoint version 3; .* up to version 2"):
        checkpoint.load(tmp_path)


def test_the_model_is_rebuilt_without_any_flag(tmp_path):
    saved = a_checkpoint()
    checkpoint.save(tmp_path, saved)
    model = checkpoint.load(tmp_path).build_model()
    assert not model.training
    idx = torch.zeros(1, 2, dtype=torch.uint8)
    expected = build_model(**saved.model)
    expected.load_state_dict(saved.weights)
    assert torch.equal(model(idx)[0], expected.eval()(idx)[0])


def test_saving_removes_what_killed_processes_have_left_half_written(tmp_path):
    for name in (".checkpoint.json.1.tmp", ".metrics.jsonl.1.tmp", ".model-0123456789abcdef.safetensors.1.tmp"):
        (tmp_path / name).write_text("half")
    checkpoint.save(tmp_path, a_checkpoint())
    assert not list(tmp_path.glob(".*"))
