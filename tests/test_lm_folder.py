"""The folder of a run: its lock, concurrent readers, and files that must not be overwritten."""

from __future__ import annotations

import fcntl
import subprocess
import sys

import pytest
from lm_support import fails, succeeds, untrained_checkpoint

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.checkpoint import MANIFEST
from charlm.lm.data import build_corpus
from charlm.lm.files import LOCK, locked

NAMES = "emma\nolivia\nava\nisabella\n" * 10
CORPUS = build_corpus(NAMES)
TINY = ["--n-hidden", "8", "--n-embd", "2", "--block-size", "3", "--batch-size", "8", "--max-steps", "2"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(NAMES)
    return path


@pytest.fixture
def run(tmp_path, data):
    checkpoint.save(tmp_path / "run", untrained_checkpoint(CORPUS, input_file=str(data)))
    return tmp_path / "run"


# ---- the lock


@pytest.mark.parametrize("flags", [("--overwrite",), ("--resume",)])
def test_a_second_run_in_a_folder_is_refused_and_reading_goes_on(run, data, flags):
    with locked(run):
        before = {path.name: path.read_bytes() for path in run.iterdir()}
        assert f"another charlm is training in {run}" in fails("train", "-i", data, "-o", run, *flags)
        for command in (("sample", run), ("eval", run), ("score", run, "emma"), ("compare", run)):
            succeeds(*command)
        assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    succeeds("train", "-i", data, "-o", run, "--overwrite", *TINY)
    assert not (run / LOCK).exists()


def test_a_second_run_is_refused_before_the_first_has_saved(tmp_path, data):
    with locked(tmp_path / "run"):
        assert "another charlm is training" in fails("train", "-i", data, "-o", tmp_path / "run", *TINY)
    assert not (tmp_path / "run").exists()  # nothing came of either


def test_a_killed_run_leaves_no_lock(tmp_path):
    code = "import os, sys; from pathlib import Path; from charlm.lm.files import locked\n"
    code += "with locked(Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "run"], check=False)
    assert (tmp_path / "run" / LOCK).exists()  # the file, which locks nothing
    with locked(tmp_path / "run"):
        pass


def test_a_lock_file_removed_while_it_was_waited_for_is_not_taken(tmp_path, monkeypatch):
    flock, calls = fcntl.flock, []

    def late(descriptor, how):
        if not calls:
            (tmp_path / LOCK).unlink()  # as the holder does when it ends
        calls.append(descriptor)
        flock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with locked(tmp_path), pytest.raises(UserError, match="another charlm"), locked(tmp_path):
        pass
    assert len(calls) == 3


@pytest.mark.parametrize("world_size", ["1", ""])
def test_a_world_of_one_process_is_a_run_as_any_other(tmp_path, data, monkeypatch, world_size):
    monkeypatch.setenv("WORLD_SIZE", world_size)
    succeeds("train", "-i", data, "-o", tmp_path / "run", *TINY)


def test_a_reader_whose_files_a_run_replaces_reads_the_new_ones(run, monkeypatch):
    read, saved = checkpoint._read_tensors, []

    def overtaken(directory, *arguments):
        if not saved:
            saved.append(untrained_checkpoint(build_corpus(NAMES), n_hidden=9))
            checkpoint.save(directory, saved[0])
        return read(directory, *arguments)

    monkeypatch.setattr(checkpoint, "_read_tensors", overtaken)
    assert checkpoint.load(run).model["n_hidden"] == 9


# ---- files of other programs


@pytest.mark.parametrize("flags", [(), ("--overwrite",)])
def test_a_folder_of_other_files_is_not_written_into(tmp_path, data, flags):
    (tmp_path / "kept").mkdir()
    for name in ("a.txt", "b.txt", "c.txt", "d.txt"):
        (tmp_path / "kept" / name).write_text("kept")
    message = fails("train", "-i", data, "-o", tmp_path / "kept", *TINY, *flags)
    assert "contains files that charlm did not write (a.txt, b.txt, c.txt and 1 more)" in message
    assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == ["a.txt", "b.txt", "c.txt", "d.txt"]


@pytest.mark.parametrize("text", ["{}", '{"format": "another", "version": 1}', "[1]"])
def test_a_checkpoint_json_of_another_program_is_not_overwritten(tmp_path, data, text):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / MANIFEST).write_text(text)
    message = fails("train", "-i", data, "-o", tmp_path / "run", "--overwrite", *TINY)
    assert f"charlm did not write ({MANIFEST})" in message
    assert (tmp_path / "run" / MANIFEST).read_text() == text


def test_an_empty_folder_and_one_of_a_run_that_never_saved_are_written_into(tmp_path, data):
    leftovers = (LOCK, "metrics.jsonl", "metrics.csv", "diagnostics.jsonl", "model-0123456789abcdef.safetensors")
    for leftover in (None, *leftovers, ".checkpoint.json.77.tmp"):
        folder = tmp_path / f"run {leftover}"
        folder.mkdir()
        if leftover is not None:
            (folder / leftover).write_text("")
        succeeds("train", "-i", data, "-o", folder, *TINY)
        checkpoint.load(folder).build_model()


def test_a_run_is_overwritten_beside_what_its_owner_keeps_there(run, data):
    names = ("notes.txt", "model-before-tuning.safetensors", "training-notes.safetensors")
    for name in names:
        (run / name).write_text("kept")
    succeeds("train", "-i", data, "-o", run, "--overwrite", *TINY)
    assert [(run / name).read_text() for name in names] == ["kept"] * 3
    assert len(list(run.glob("model-*.safetensors"))) == 2
