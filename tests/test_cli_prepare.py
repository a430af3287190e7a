"""`charlm prepare`, and the commands that read what it wrote."""

from __future__ import annotations

import errno
import gzip
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
from lm_support import fails, run, succeeds

from charlm import _ext
from charlm.lm import cache
from charlm.lm.data import build_corpus
from charlm.lm.prepare import identify
from charlm.lm.shards import MANIFEST, load

pytestmark = pytest.mark.skipif(_ext._C is None, reason="preparing needs the compiled module")

NAMES = "".join(f"{a}{b * n}\n" for n in range(1, 9) for a in "abcde" for b in "vwxyz")
VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" * 60
TINY = ("--type", "mlp", "--n-hidden", "8", "--n-embd", "2", "--max-steps", "4", "--log-interval", "1")


@pytest.fixture
def names(tmp_path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text(NAMES)
    return path


@pytest.fixture
def verse(tmp_path) -> Path:
    path = tmp_path / "verse.txt"
    path.write_text(VERSE)
    return path


@pytest.fixture
def own_cache(tmp_path, monkeypatch) -> Path:
    """A cache of its own, for which every file is large."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_BYTES", 1)
    return tmp_path / "cache" / "charlm" / "corpora"


def prepared(cache: Path) -> list[Path]:
    return [path.parent for path in cache.glob(f"*/{MANIFEST}")]


def losses(run: Path) -> list[float]:
    """The losses of a run, in order."""
    return [json.loads(line)["nats"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_training_on_a_prepared_folder_has_the_losses_of_the_file(names, tmp_path):
    assert "200 items (line format)" in succeeds("prepare", names, "-o", tmp_path / "corpus")
    for number, source in enumerate((names, tmp_path / "corpus")):
        succeeds("train", "-i", source, "-o", tmp_path / f"run{number}", *TINY)
    assert losses(tmp_path / "run0") == losses(tmp_path / "run1")
    assert len(losses(tmp_path / "run0")) >= 4
    for source in (names, tmp_path / "corpus"):
        found = json.loads(succeeds("eval", tmp_path / "run0", "-i", source, "--json"))
        assert found["split"] == "dev"
        assert "mlp" in succeeds("compare", tmp_path / "run0", "-i", source)
    succeeds("train", "-o", tmp_path / "run1", "--resume", "--max-steps", "6")
    assert len(losses(tmp_path / "run1")) > len(losses(tmp_path / "run0"))


@pytest.mark.parametrize("kind", ["gz", "zst", "stdin", "glob"])
def test_every_kind_of_input_gives_the_same_corpus(verse, tmp_path, kind):
    output, data = tmp_path / "corpus", VERSE.encode()
    options = {}
    source: str | Path = tmp_path / f"verse.txt.{kind}"
    if kind == "gz":
        source.write_bytes(gzip.compress(data[:999]) + gzip.compress(data[999:]))
    elif kind == "zst":
        zstandard = pytest.importorskip("zstandard")
        source.write_bytes(zstandard.compress(data))
    elif kind == "stdin":
        source, options = "-", {"input": VERSE}
    else:
        source = tmp_path / "ver*.txt"
    succeeds("prepare", source, "-o", output, **options)
    assert load(output).digest == build_corpus(VERSE).digest
    assert {path.name for path in tmp_path.iterdir()} <= {"corpus", "verse.txt", f"verse.txt.{kind}"}


def test_several_files_are_joined_by_newlines(tmp_path):
    (tmp_path / "a.txt").write_text("ada\nbea")
    (tmp_path / "b.txt").write_text("cleo\ndora\n")
    succeeds("prepare", tmp_path / "a.txt", tmp_path / "b.txt", "-o", tmp_path / "corpus")
    assert load(tmp_path / "corpus").digest == build_corpus("ada\nbea\ncleo\ndora\n").digest


@pytest.mark.parametrize(
    ("files", "error"),
    [
        (["nowhere.txt"], "cannot read nowhere.txt: No such file"),
        (["nowhere*.txt"], "no file matches nowhere*.txt"),
        (["-", "names.txt"], "- reads standard input"),
        (["empty.txt"], "empty.txt is empty"),
        (["latin.txt"], "latin.txt is not UTF-8: byte 0xe9 at offset 3 "),
        (["broken.gz"], "broken.gz is damaged or not a .gz file"),
        ([], "give the files to prepare"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(names, tmp_path, monkeypatch, files, error):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text("\n")
    Path("latin.txt").write_bytes(b"abc\xe9\n")
    Path("broken.gz").write_bytes(gzip.compress(NAMES.encode())[:-9])
    before = sorted(path.name for path in tmp_path.iterdir())
    assert error in fails("prepare", *files, "-o", "corpus")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_folder_with_other_files_is_left_alone(names, tmp_path):
    assert "exists and is no prepared corpus" in fails("prepare", names, "-o", tmp_path)
    succeeds("prepare", names, "-o", tmp_path / "corpus")
    digest = load(tmp_path / "corpus").digest
    assert "add --overwrite to replace it" in fails("prepare", names, "-o", tmp_path / "corpus", "--split-seed", "1")
    assert load(tmp_path / "corpus").digest == digest
    succeeds("prepare", names, "-o", tmp_path / "corpus", "--split-seed", "1", "--overwrite")
    assert load(tmp_path / "corpus").digest == build_corpus(NAMES, seed=1).digest


def test_a_failed_replacement_leaves_the_corpus_as_it_was(names, tmp_path):
    succeeds("prepare", names, "-o", tmp_path / "corpus")
    digest = load(tmp_path / "corpus").digest
    names.write_bytes(b"\xff")
    fails("prepare", names, "-o", tmp_path / "corpus", "--overwrite")
    assert load(tmp_path / "corpus").digest == digest


def test_training_with_other_options_than_those_of_the_folder_is_refused(names, tmp_path):
    succeeds("prepare", names, "-o", tmp_path / "corpus")
    error = fails("train", "-i", tmp_path / "corpus", "-o", tmp_path / "run", *TINY, "--split-seed", "1")
    assert "was prepared with --split-seed 42, not 1" in error
    assert "a folder without a prepared corpus" in fails("train", "-i", tmp_path, "-o", tmp_path / "run", *TINY)


def test_evaluation_on_a_folder_of_other_data_is_refused(names, verse, tmp_path):
    succeeds("train", "-i", names, "-o", tmp_path / "run", *TINY)
    succeeds("prepare", verse, "-o", tmp_path / "corpus")
    assert "was not trained on the corpus in" in fails("eval", tmp_path / "run", "-i", tmp_path / "corpus")


@pytest.mark.parametrize("name", ["tokens-00000.bin", "ends-00000.bin"])
def test_a_damaged_file_is_found_by_check(names, tmp_path, name):
    succeeds("prepare", names, "-o", tmp_path / "corpus")
    assert "corpus: ok" in succeeds("prepare", "--check", tmp_path / "corpus")
    data = bytearray((tmp_path / "corpus" / name).read_bytes())
    data[100] ^= 1
    (tmp_path / "corpus" / name).write_bytes(data)
    assert f"{name} was changed after it was written" in fails("prepare", "--check", tmp_path / "corpus")
    (tmp_path / "corpus" / name).unlink()
    assert f"{name} is missing" in fails("prepare", "--check", tmp_path / "corpus")


# ---- the disk


def test_a_full_disk_is_found_before_anything_is_written(names, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 10**6))
    assert "but only 1 MB are free" in fails("prepare", names, "-o", tmp_path / "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["names.txt"]


def test_a_disk_that_the_copy_of_a_stream_fills_is_not_an_error_of_the_stream(tmp_path, monkeypatch):
    class Full(io.BytesIO):
        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("charlm.lm.prepare.tempfile.TemporaryFile", lambda dir: Full())
    error = fails("prepare", "-", "-o", tmp_path / "corpus", input=VERSE)
    assert f"cannot write {tmp_path / 'corpus'}: No space left on device" in error


@pytest.mark.exhaustive
@pytest.mark.parametrize("text", [VERSE * 20, NAMES * 100], ids=["text", "items"])
def test_a_disk_that_fills_is_one_sentence_and_leaves_nothing(tmp_path, text):
    (tmp_path / "data.txt").write_text(text)

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    found = subprocess.run(
        [sys.executable, "-m", "charlm", "prepare", tmp_path / "data.txt", "-o", tmp_path / "corpus"],
        capture_output=True, text=True, preexec_fn=limited, check=False,
    )  # fmt: skip
    assert found.returncode == 2
    assert found.stderr.startswith("charlm: cannot write ")
    assert found.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["data.txt"]


@pytest.mark.exhaustive
def test_a_killed_call_is_finished_by_the_next(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(VERSE * 2500)  # 12 MB
    code = "from charlm.lm import shards; shards.SHARD_BYTES = 1 << 20; from charlm.cli import main; main()"
    command = [sys.executable, "-c", code, "prepare", str(path), "-o", str(tmp_path / "corpus")]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"})
    partial = tmp_path / ".corpus.partial"
    while process.poll() is None and not (partial / "tokens-00003.bin").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "corpus").exists()
    inodes = {path.name: path.stat().st_ino for path in partial.glob("tokens-*.bin")}
    inodes.pop(max(inodes))  # its hash may not have been recorded
    assert len(inodes) >= 3
    subprocess.run(command, check=True, capture_output=True)
    assert inodes.items() <= {path.name: path.stat().st_ino for path in (tmp_path / "corpus").iterdir()}.items()
    assert load(tmp_path / "corpus").digest == build_corpus(VERSE * 2500).digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "data.txt"]


# ---- the cache


def test_a_large_file_is_prepared_once_and_one_command_removes_it(verse, tmp_path, own_cache):
    first = run("train", "-i", verse, "-o", tmp_path / "a", *TINY)
    assert f"preparing {verse} once, in {own_cache}" in first.stderr
    (folder,) = prepared(own_cache)
    written = (folder / MANIFEST).stat().st_mtime_ns
    second = run("train", "-i", verse, "-o", tmp_path / "b", *TINY)
    assert (first.exit_code, second.exit_code, second.stderr) == (0, 0, "")
    assert (folder / MANIFEST).stat().st_mtime_ns == written
    assert losses(tmp_path / "a") == losses(tmp_path / "b")
    assert "dev" in succeeds("eval", tmp_path / "a", "-i", verse)
    assert f"removed {own_cache}" in succeeds("prepare", "--clear-cache").replace("\n", "")
    assert not own_cache.exists()


def test_a_changed_file_and_another_seed_are_prepared_again(names, tmp_path, own_cache):
    succeeds("train", "-i", names, "-o", tmp_path / "a", *TINY)
    succeeds("train", "-i", names, "-o", tmp_path / "b", *TINY, "--split-seed", "1")
    names.write_text(NAMES + "zoe\n")
    succeeds("train", "-i", names, "-o", tmp_path / "c", *TINY)
    assert len(prepared(own_cache)) == 3


def test_a_copy_of_a_file_is_not_prepared_again(names, tmp_path, own_cache):
    succeeds("train", "-i", names, "-o", tmp_path / "a", *TINY)
    copy = tmp_path / "copy.txt"
    copy.write_text(NAMES)
    assert run("train", "-i", copy, "-o", tmp_path / "b", *TINY).stderr == ""
    assert len(prepared(own_cache)) == 1


def test_a_file_that_changes_while_it_is_hashed_is_refused(names, tmp_path, own_cache, monkeypatch):
    states = iter([identify(names), identify(names) | {"modified": 0}])
    monkeypatch.setattr(cache, "identify", lambda path: next(states))
    result = run("train", "-i", names, "-o", tmp_path / "a", *TINY)
    assert result.exit_code == 2
    assert f"{names} changed while it was read" in result.stderr
    assert not own_cache.exists()


def test_a_damaged_entry_is_prepared_again(names, tmp_path, own_cache):
    succeeds("train", "-i", names, "-o", tmp_path / "a", *TINY)
    (shard,) = own_cache.glob("*/tokens-*.bin")
    shard.write_bytes(b"")
    succeeds("train", "-i", names, "-o", tmp_path / "b", *TINY)
    assert losses(tmp_path / "a") == losses(tmp_path / "b")


def test_a_damaged_entry_that_cannot_be_removed_is_named(names, tmp_path, own_cache):
    succeeds("train", "-i", names, "-o", tmp_path / "a", *TINY)
    (folder,) = prepared(own_cache)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")  # rmtree refuses a link
    (tmp_path / "elsewhere" / MANIFEST).write_text("{}")
    result = run("train", "-i", names, "-o", tmp_path / "b", *TINY)
    assert result.exit_code == 2
    assert "cannot be used or removed" in result.stderr


def test_a_file_that_changes_while_it_is_prepared_is_refused(names, tmp_path, monkeypatch):
    states = iter([identify(names), identify(names) | {"modified": 0}])
    monkeypatch.setattr("charlm.lm.prepare.identify", lambda path: next(states))
    assert f"{names} changed while it was read" in fails("prepare", names, "-o", tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_overwriting_that_was_killed_is_finished(names, tmp_path, monkeypatch):
    succeeds("prepare", names, "-o", tmp_path / "corpus")
    with monkeypatch.context() as patch:
        patch.setattr("charlm.lm.prepare.shutil.rmtree", lambda *arguments, **options: None)
        succeeds("prepare", names, "-o", tmp_path / "corpus", "--overwrite")  # as if killed before the old one is gone
    assert len(list(tmp_path.glob(".corpus.old-*"))) == 1
    succeeds("prepare", names, "-o", tmp_path / "corpus", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", names.name]
    assert load(tmp_path / "corpus").digest == build_corpus(names.read_text()).digest


@pytest.mark.exhaustive
def test_of_two_processes_one_prepares_a_file_and_both_train_on_it(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text(VERSE * 300)
    code = "from charlm.lm import cache; cache.MIN_BYTES = 1; from charlm.cli import main; main()"
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, "train", "-i", str(path), *TINY, "--eval-tokens", "1000", "-o"]
    processes = [
        subprocess.Popen([*command, str(tmp_path / f"run{i}")], env=environment, stdout=subprocess.DEVNULL)
        for i in range(2)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    assert losses(tmp_path / "run0") == losses(tmp_path / "run1")
    (folder,) = prepared(tmp_path / "cache" / "charlm" / "corpora")
    assert load(folder).digest == build_corpus(VERSE * 300).digest


def test_no_cache_reads_the_file_into_memory(names, tmp_path, own_cache):
    succeeds("train", "-i", names, "-o", tmp_path / "a", *TINY, "--no-cache")
    assert not own_cache.exists()


# ---- a large dev split


def test_a_large_dev_is_sampled_during_training_and_evaluated_whole_at_the_end(tmp_path):
    words = random.Random(3).choices(["to", "be", "or", "not", "that", "is", "the", "question"], k=20_000)
    (tmp_path / "data.txt").write_text(" ".join(words))
    settings = ("-i", tmp_path / "data.txt", *TINY, "--eval-interval", "2")
    whole = succeeds("train", "-o", tmp_path / "whole", *settings)
    sampled = succeeds("train", "-o", tmp_path / "sampled", *settings, "--eval-tokens", "2000")
    tokens = len(" ".join(words)) // 10
    assert "±" not in whole
    assert "take a fixed sample of about 2,000 of the" in sampled
    found = re.findall(r"step \d/4 · .*dev (\S+) ± (\S+) nats", sampled)
    assert len(found) == 2
    exact = re.findall(r"step \d/4 · .*dev (\S+) nats", whole)
    for (nats, error), expected in zip(found, exact, strict=True):
        assert 0 < abs(float(nats) - float(expected)) < 4 * float(error)
    for output in (whole, sampled):
        assert re.search(rf"loss on dev, {tokens:,}\d* tokens", output)
    assert (
        whole.partition("loss on dev")[2].split("step 4")[0] == sampled.partition("loss on dev")[2].split("step 4")[0]
    )
