"""Prepared corpora: equal to the in-memory path in vocabulary, split, order, digest and losses; damage is refused."""

from __future__ import annotations

import errno
import json
import os
import random
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import _ext
from charlm._errors import UserError
from charlm.lm import prepare as prepare_module
from charlm.lm import prepare_items, shard_writer, shards
from charlm.lm.config import Config
from charlm.lm.data import SPLITS, TextCorpus, build_corpus, decode_text, guess_format
from charlm.lm.prepare import Options, prepare, scan
from charlm.lm.shards import MANIFEST, ShardedCorpus, checksum, load
from charlm.lm.train import Trainer

pytestmark = pytest.mark.skipif(_ext._C is None, reason="preparing needs the compiled module")

NAMES = "".join(f"{a}{b * n}\n" for n in range(1, 9) for a in "abcde" for b in "vwxyz")
VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" * 60
HAN = "".join(chr(0x4E00 + i) for i in range(300))
TEXTS = {
    "names": NAMES,
    "names with margins": "\n\n".join(f"  {name}\t" for name in NAMES.split()) + "\n \n x  y ",
    "text": VERSE,
    "text of many bytes": "né à 東京 🎉\n" * 200,
    "text of 300 symbols": HAN * 7,
    "items of 300 symbols": "\n".join(HAN[i] + HAN[-i] for i in range(300)),
    "duplicates": NAMES + NAMES[::-1] + NAMES,
}


@pytest.fixture(autouse=True)
def small_shards(monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 4096)


def in_pieces(text: str, seed: int = 0):
    """`text` as a function that returns it in pieces of random sizes."""

    def pieces():
        chance, at = random.Random(seed), 0
        while at < len(text):
            size = chance.randint(0, 700)
            yield text[at : at + size].encode()
            at += size

    return pieces


def both(text: str, directory: Path, **options) -> tuple[TextCorpus, ShardedCorpus]:
    """The corpus of `text` in memory and in shards."""
    prepare(in_pieces(text), directory, Options(**options))
    return build_corpus(text, **options), load(directory)


def assert_equal(memory: TextCorpus, sharded: ShardedCorpus) -> None:
    assert sharded.format == memory.format
    assert sharded.vocabulary == memory.vocabulary
    assert sharded.digest == memory.digest
    assert sharded.sizes == memory.sizes
    assert sharded.overlap() == memory.overlap()
    assert sharded.duplicates_removed == memory.duplicates_removed
    for split in SPLITS:
        assert sharded.longest_item(split) == memory.longest_item(split)
        assert sharded.tokens(split) == memory.tokens(split)
        kinds = ("examples", "sequences", *(("windows", "examples_in_windows") if memory.format == "text" else ()))
        for kind in kinds:
            for size in (1, 4, 70):
                ours, theirs = (getattr(corpus, kind)(split, size) for corpus in (sharded, memory))
                assert len(ours) == len(theirs)
                assert ours.tokens == theirs.tokens
                rows = torch.arange(len(ours))
                for a, b in zip(ours.select(rows), theirs.select(rows), strict=True):
                    assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
                    assert not isinstance(a, torch.Tensor) or a.dtype == b.dtype


@pytest.mark.parametrize("name", TEXTS)
def test_a_prepared_corpus_is_the_one_in_memory(name, tmp_path):
    assert_equal(*both(TEXTS[name], tmp_path / "corpus"))


@pytest.mark.parametrize("options", [{"dedup": True}, {"seed": 7}, {"format": "text"}, {"seed": -3, "dedup": True}])
def test_options_split_as_in_memory(options, tmp_path):
    assert_equal(*both(TEXTS["duplicates"], tmp_path / "corpus", **options))


@settings(max_examples=60, deadline=None)
@given(st.text(st.sampled_from(" ab\t\n\x1f\u2003é"), max_size=60), st.integers(0, 9))
def test_the_format_is_guessed_as_in_memory(text, seed):
    text = decode_text((text + "abc").encode(), "the input")
    assert scan(in_pieces(text, seed), Options(), "the input", lambda *_: None).format == guess_format(text)


@pytest.mark.parametrize("count", [1, 2, 3, 1000, 70_000])
@pytest.mark.parametrize("dtype", [np.uint32, np.int64])
def test_the_native_shuffle_is_pythons(count, dtype):
    expected, ours = list(range(count)), np.arange(count, dtype=dtype)
    random.Random(11).shuffle(expected)
    _ext._C.shuffle_indices(ours, list(random.Random(11).getstate()[1]))
    assert ours.tolist() == expected


def random_items(dtype: str) -> tuple[list[str], np.ndarray]:
    """Items of which many are equal, and their tokens."""
    chance = random.Random(5)
    items = ["".join(chance.choices("ab", k=chance.randint(1, 13))) for _ in range(9000)]
    return items, np.array([ord(character) for item in items for character in f"{item}\0"], dtype)


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "uint32"])
@pytest.mark.parametrize("table_bytes", [1 << 13, 1 << 20])
def test_repeated_items_are_found_in_one_pass_and_in_many(table_bytes, dtype):
    items, tokens = random_items(dtype)
    found = _ext._C.repeated_items(tokens, len(items), table_bytes)
    first: dict[str, int] = {}
    expected = [first.setdefault(item, number) < number for number, item in enumerate(items)]
    assert np.unpackbits(found, count=len(items), bitorder="little").tolist() == expected


@pytest.mark.parametrize("wanted_items", [300, 10_000])
def test_dev_items_are_looked_for_at_once_and_in_parts(wanted_items, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_items, "WANTED_ITEMS", wanted_items)
    monkeypatch.setattr(shard_writer, "READ_TOKENS", 100)
    assert_equal(*both("\n".join([*random_items("uint8")[0], "ab" * 900]), tmp_path / "corpus"))


@pytest.mark.parametrize("type", ["mlp", "gru", "gpt", "ngram"])
@pytest.mark.parametrize("name", ["names", "text", "text of 300 symbols"])
def test_training_on_shards_has_the_losses_of_memory(type, name, tmp_path):
    losses = []
    for corpus in both(TEXTS[name], tmp_path / "corpus"):
        config = Config.of_type(type, block_size=8, n_embd=8, format=corpus.format, log_interval=1)
        if type != "ngram":
            config = replace(config, max_steps=6, batch_size=16, n_hidden=16, n_layer=1, token_noise=0.1)
        found: list[float] = []
        Trainer(config, corpus, tmp_path / "run").run(lambda progress, to=found: to.append(progress.nats))
        losses.append(found)
    assert losses[0] == losses[1]
    assert len(losses[0]) >= 1


def test_items_are_found_in_their_splits(tmp_path):
    memory, sharded = both(TEXTS["items of 300 symbols"], tmp_path / "corpus")
    asked = [memory.parts[split][place] for split in SPLITS for place in (0, -1, 1)]
    asked += ["zzz", HAN[5], HAN[5] + HAN[7], asked[0] + asked[1]]
    assert sharded.splits_containing(asked) == memory.splits_containing(asked)


# ---- resuming


def test_a_call_that_was_killed_goes_on_with_its_shards(tmp_path, monkeypatch):
    target = tmp_path / "corpus"
    calls = 0

    def report(stage: str, done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if stage == "encoding" and done > 3 * 4096:
            raise KeyboardInterrupt  # leaves what a kill leaves

    sources = [{"path": "x", "bytes": len(VERSE), "modified": 1}]
    text = in_pieces(VERSE * 10)
    with pytest.raises(KeyboardInterrupt):
        prepare(text, target, Options(), sources=sources, report=report)
    partial = tmp_path / ".corpus.partial"
    kept = {path.name: path.stat().st_mtime_ns for path in partial.glob("tokens-*.bin")}
    assert len(kept) >= 2
    assert not target.exists()
    damaged = kept.popitem()[0]
    (partial / damaged).write_bytes(b"\xff" * 4096)
    stages: list[str] = []
    prepare(text, target, Options(), sources=sources, report=lambda stage, *_: stages.append(stage))
    assert "reading" not in stages
    found = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    assert kept.items() <= found.items()
    assert not partial.exists()
    assert_equal(build_corpus(VERSE * 10), load(target))
    names = {entry["file"] for entry in load(target).manifest["tokens"]["shards"]}
    assert {path.name for path in target.iterdir()} == {*names, MANIFEST}


@pytest.mark.parametrize("name", ["tokens-00001.bin", "tokens-00002.bin"])  # the last is synced by close()
def test_a_shard_that_cannot_be_synced_is_an_error_and_leaves_nothing(tmp_path, monkeypatch, name):
    sync = os.fsync

    def fail(descriptor):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f"{name}.tmp"):
            raise OSError(errno.EIO, "Input/output error")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match=name):
        prepare(in_pieces(VERSE * 2), tmp_path / "out", Options())
    assert not list(tmp_path.iterdir())


def test_shards_of_another_text_are_not_taken_over(tmp_path):
    def stop(stage: str, done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(in_pieces(VERSE.upper()), tmp_path / "corpus", Options(), sources=[{"path": "a"}], report=stop)
    prepare(in_pieces(VERSE), tmp_path / "corpus", Options(), sources=[{"path": "b"}])
    assert_equal(build_corpus(VERSE), load(tmp_path / "corpus"))


def test_a_text_that_changes_between_the_passes_is_a_user_error(tmp_path):
    for first, second in ((VERSE, VERSE + "x"), (VERSE, VERSE.replace("T", "#")), (NAMES, NAMES.replace("a", "#"))):
        texts = iter([first, second])
        with pytest.raises(UserError, match="the input changed while it was read"):
            prepare(lambda texts=texts: iter([next(texts).encode()]), tmp_path / "corpus", Options())
        assert list(tmp_path.iterdir()) == []


# ---- damage


@pytest.fixture
def prepared(tmp_path) -> Path:
    prepare(in_pieces(VERSE), tmp_path / "corpus", Options())
    return tmp_path / "corpus"


def rewrite(directory: Path, change) -> None:
    """Changes the manifest, and its checksum, as one who means it would."""
    manifest = json.loads((directory / MANIFEST).read_text())
    change(manifest)
    manifest["checksum"] = checksum(manifest)
    (directory / MANIFEST).write_text(json.dumps(manifest))


def test_a_missing_or_cut_shard_is_a_user_error(prepared):
    shard = prepared / "tokens-00000.bin"
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(UserError, match=r"tokens-00000.bin has 4,095 bytes instead of 4,096"):
        load(prepared)
    shard.unlink()
    with pytest.raises(UserError, match=r"tokens-00000.bin is missing"):
        load(prepared)


def test_a_changed_vocabulary_is_a_user_error(prepared):
    text = (prepared / MANIFEST).read_text()
    (prepared / MANIFEST).write_text(text.replace("STacd", "SUacd"))
    assert text != (prepared / MANIFEST).read_text()
    with pytest.raises(UserError, match="was changed after it was written"):
        load(prepared)


@pytest.mark.parametrize("name", ["/etc/passwd", "../tokens", "a/../../tokens", "link"])
def test_a_shard_outside_of_the_folder_is_a_user_error(prepared, name):
    (prepared / "link").symlink_to("/etc/passwd")
    rewrite(prepared, lambda manifest: manifest["tokens"]["shards"][0].update(file=name))
    with pytest.raises(UserError, match="names a shard outside of its folder"):
        load(prepared)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}"])
def test_a_damaged_manifest_is_a_user_error(prepared, text):
    (prepared / MANIFEST).write_text(text)
    with pytest.raises(UserError, match="is damaged"):
        load(prepared)


def test_a_manifest_of_a_later_version_is_a_user_error(prepared):
    rewrite(prepared, lambda manifest: manifest.update(format_version=99))
    with pytest.raises(UserError, match="format version 99"):
        load(prepared)


# ---- what is not ours, and what is continued


def test_documents_that_differ_do_not_continue_a_preparation_that_was_killed(tmp_path, monkeypatch):
    documents = [f"document {i} of many" for i in range(3000)]

    class Killed(BaseException):
        pass

    def report(stage, done, total):
        if stage == "encoding" and done > 20_000:
            raise Killed

    folder = tmp_path / "corpus"
    with monkeypatch.context() as patch:
        patch.setattr(prepare_module, "prepare", partial(prepare, report=report))
        with pytest.raises(Killed):
            prepare_module.prepare_documents(iter(documents), folder, Options("text"))
    assert (tmp_path / ".corpus.partial").exists()
    prepare_module.prepare_documents(documents[::-1], folder, Options("text"))
    assert load(folder).digest == build_corpus("\n".join(documents[::-1]), format="text").digest
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_overwriting_keeps_what_is_not_a_part_of_the_corpus(prepared):
    (prepared / "out").mkdir()
    with pytest.raises(UserError, match="contains more than a prepared corpus, such as out"):
        prepare(in_pieces(NAMES), prepared, Options(), overwrite=True)
    (prepared / "out").rmdir()
    (prepared / MANIFEST).write_text("damaged")  # it can be replaced
    backup = prepared.with_name(f".{prepared.name}.old")
    backup.mkdir()
    prepare(in_pieces(VERSE), prepared, Options(), overwrite=True)
    assert load(prepared).format == "text"
    assert sorted(path.name for path in prepared.parent.iterdir()) == sorted([backup.name, prepared.name])


def test_a_link_to_a_folder_is_filled(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    prepare(in_pieces(VERSE), tmp_path / "link", Options())
    assert (tmp_path / "link").is_symlink()
    assert load(tmp_path / "disk").format == "text"


def test_few_items_are_taken_at_a_time_where_they_are_long(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_items, "TAKEN_TOKENS", 50)
    assert_equal(*both(NAMES + "x" * 300 + "\n", tmp_path / "corpus", format="line"))
