"""Corpora: reading, format, vocabulary, split, examples."""

from __future__ import annotations

import hashlib
import random
from importlib import resources
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm._errors import UserError
from charlm.lm.data import (
    SPLITS,
    TextCorpus,
    Vocabulary,
    build_corpus,
    guess_format,
    read_corpus,
    read_text,
    split_bounds,
)
from charlm.lm.examples import line_examples

MAKEMORE = Path(__file__).resolve().parents[2] / "shared" / "data" / "names_makemore.txt"
needs_makemore = pytest.mark.skipif(
    not MAKEMORE.exists(), reason="makemore's names.txt is not beside the checkout (../shared/data/names_makemore.txt)"
)


def write(tmp_path: Path, data: bytes) -> Path:
    path = tmp_path / "corpus.txt"
    path.write_bytes(data)
    return path


def all_items(corpus: TextCorpus) -> list[str]:
    return sorted(item for part in corpus.parts.values() for item in part)


# ---- the shipped names


def test_shipped_names_are_32000_distinct_lowercase_names():
    names = read_text(None).splitlines()
    assert len(names) == len(set(names)) == 32_000
    assert set("".join(names)) == set("abcdefghijklmnopqrstuvwxyz")
    assert names[:3] == ["james", "john", "robert"]


def test_shipped_names_have_the_hash_that_their_readme_states():
    folder = resources.files("charlm.data")
    digest = hashlib.sha256(folder.joinpath("names.txt").read_bytes()).hexdigest()
    assert digest in folder.joinpath("README.md").read_text(encoding="utf-8")


# ---- reading


def test_byte_order_mark_is_no_character(tmp_path):
    assert read_text(write(tmp_path, b"\xef\xbb\xbfada\nbea\n")) == "ada\nbea\n"


@pytest.mark.parametrize("newline", [b"\n", b"\r\n", b"\r"])
def test_every_newline_ends_an_item(tmp_path, newline):
    path = write(tmp_path, newline.join([b"ada", b"bea", b"cleo", b""]))
    assert all_items(read_corpus(path)) == ["ada", "bea", "cleo"]


@pytest.mark.parametrize("prefix", [b"", b"\xef\xbb\xbf"])
def test_invalid_utf8_names_its_byte_offset_in_the_file(tmp_path, prefix):
    path = write(tmp_path, prefix + b"ada\nb\xffa\n")
    with pytest.raises(UserError, match=rf"corpus.txt is not UTF-8: byte 0xff at offset {len(prefix) + 5} "):
        read_text(path)


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nowhere\.txt: No such file"):
        read_text(tmp_path / "nowhere.txt")


@pytest.mark.parametrize("text", ["", "\n\n", "  \n"])
def test_empty_file_is_a_user_error(text):
    with pytest.raises(UserError, match="is empty"):
        build_corpus(text)


@pytest.mark.parametrize(("text", "found"), [("ada\n", "1 item,"), ("ada\nbea", "2 items,")])
def test_too_few_items_are_a_user_error(text, found):
    with pytest.raises(UserError, match=found):
        build_corpus(text)


def test_items_lose_their_margins_and_empty_lines_are_dropped():
    corpus = build_corpus("  ada \n\n bea\t\n \ncleo\n", format="line")
    assert all_items(corpus) == ["ada", "bea", "cleo"]


# ---- format

VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


@pytest.mark.parametrize(
    ("text", "format"),
    [
        ("ada\nbea\ncleo\n", "line"),
        ("New York\nSan Juan de la Cruz\nUlm\n", "line"),
        ("東京\n京都\n大阪\n", "line"),
        ("ada\n", "line"),
        (VERSE, "text"),
        ("one\n\ntwo\n\nthree\n", "text"),
        ("x" * 500, "text"),
    ],
)
def test_format_is_guessed(text, format):
    assert guess_format(text) == format


def test_format_can_be_chosen_against_the_guess():
    assert build_corpus(VERSE * 3, format="line").format == "line"
    assert build_corpus("ada\nbea\ncleo\n", format="text").format == "text"


def test_unknown_format_is_a_user_error():
    with pytest.raises(UserError, match="unknown format 'csv': it must be one of line, text"):
        build_corpus("ada\nbea\ncleo\n", format="csv")


# ---- vocabulary


def test_full_stop_in_the_data_is_not_the_separator():
    vocabulary = build_corpus("st.ives\nulm\nrom\n").vocabulary
    assert vocabulary.stoi["."] != 0
    assert vocabulary.itos[0] == vocabulary.itos[vocabulary.stoi["."]] == "."
    assert vocabulary.decode(vocabulary.encode("st.ives").tolist()) == "st.ives"
    assert 0 not in vocabulary.encode("st.ives").tolist()


def test_running_text_has_no_separator_and_keeps_newlines():
    vocabulary = build_corpus(VERSE, format="text").vocabulary
    assert len(vocabulary) == len(set(VERSE))
    assert vocabulary.pad_token == vocabulary.stoi["\n"] == 0
    assert vocabulary.stop_token is None


def test_unknown_character_is_named_with_its_position():
    vocabulary = Vocabulary.of("abc", separator=True)
    with pytest.raises(UserError, match=r"'ß' at position 2 of the prompt"):
        vocabulary.encode("abß", "the prompt")


def test_more_than_256_tokens_do_not_fit_a_byte():
    chars = "".join(chr(0x4E00 + i) for i in range(300))
    vocabulary = Vocabulary.of(chars, separator=True)
    assert vocabulary.dtype == torch.int32
    assert vocabulary.encode(chars).tolist() == list(range(1, 301))


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_encoding_is_undone_by_decoding(text):
    vocabulary = Vocabulary.of(text, separator=False)
    assert vocabulary.decode(vocabulary.encode(text).tolist()) == text


# ---- split


@needs_makemore
def test_seed_42_gives_makemores_split():
    words = MAKEMORE.read_text().splitlines()
    random.seed(42)
    random.shuffle(words)
    corpus = read_corpus(MAKEMORE, seed=42)
    n1, n2 = int(0.8 * len(words)), int(0.9 * len(words))
    assert corpus.parts == {"train": words[:n1], "dev": words[n1:n2], "test": words[n2:]}
    assert [len(corpus.examples(split, 3)) for split in SPLITS] == [182_625, 22_655, 22_866]


@needs_makemore
def test_first_examples_are_those_of_the_lecture():
    corpus = read_corpus(MAKEMORE, seed=42)
    examples = corpus.examples("train", 3)
    assert examples.contexts.dtype == examples.targets.dtype == torch.uint8
    shown = [
        corpus.vocabulary.decode(row) + corpus.vocabulary.decode([target])
        for row, target in zip(examples.contexts[:5].tolist(), examples.targets[:5].tolist(), strict=True)
    ]
    assert shown == ["...y", "..yu", ".yuh", "yuhe", "uhen"]


@given(st.integers(3, 10_000))
def test_every_split_has_an_item_and_large_ones_are_makemores(count):
    train_end, dev_end = split_bounds(count)
    assert 0 < train_end < dev_end < count
    if count >= 10:
        assert (train_end, dev_end) == (int(0.8 * count), int(0.9 * count))


def test_running_text_is_split_without_a_shuffle():
    text = (VERSE * 20)[:1000]
    parts = build_corpus(text, format="text").parts
    assert "".join(parts[split][0] for split in SPLITS) == text
    assert [len(parts[split][0]) for split in SPLITS] == [800, 100, 100]


def test_dedup_keeps_the_first_of_equal_items():
    corpus = build_corpus("bea\nada\nbea\ncleo\nada\n", dedup=True)
    assert all_items(corpus) == ["ada", "bea", "cleo"]
    assert corpus.duplicates_removed == 2


def test_dedup_of_running_text_is_a_user_error():
    with pytest.raises(UserError, match="no items to deduplicate"):
        build_corpus(VERSE, dedup=True)


def test_overlap_counts_dev_items_that_occur_in_train():
    corpus = build_corpus("ada\n" * 20)
    assert corpus.overlap() == len(corpus.parts["dev"]) == 2
    assert build_corpus(VERSE).overlap() is None


def test_digest_tells_data_and_split_apart():
    text = "".join(f"{a}{b}\n" for a in "abcdef" for b in "ghijkl")
    digests = {
        build_corpus(text).digest,
        build_corpus(text, seed=1).digest,
        build_corpus(text + "zz\n").digest,
        build_corpus(text, format="text").digest,
    }
    assert len(digests) == 4
    assert build_corpus(text).digest == build_corpus(text.replace("\n", " \n\n"), format="line").digest


# ---- examples


def plain_line_examples(items, vocabulary, block_size):
    """The lecture's loop."""
    contexts, targets = [], []
    for item in items:
        context = [0] * block_size
        for token in [*vocabulary.encode(item).tolist(), 0]:
            contexts.append(context)
            targets.append(token)
            context = [*context[1:], token]
    return contexts, targets


@given(st.lists(st.text("ab.", min_size=1, max_size=7), min_size=1, max_size=9), st.integers(1, 9))
def test_line_examples_are_those_of_the_plain_loop(items, block_size):
    vocabulary = Vocabulary.of("ab.", separator=True)
    examples = line_examples(items, vocabulary, block_size)
    contexts, targets = plain_line_examples(items, vocabulary, block_size)
    assert examples.contexts.tolist() == contexts
    assert examples.targets.tolist() == targets


@given(st.text("ab\n", min_size=3, max_size=60).filter(str.strip), st.integers(1, 12))
def test_text_examples_are_those_of_the_plain_loop(text, block_size):
    corpus = build_corpus(text, format="text")
    tokens = [corpus.vocabulary.pad_token] * block_size + corpus.vocabulary.encode(text).tolist()
    contexts, targets = [], []
    for split in SPLITS:
        examples = corpus.examples(split, block_size)
        contexts += examples.contexts.tolist()
        targets += examples.targets.tolist()
    assert contexts == [tokens[i : i + block_size] for i in range(len(text))]
    assert targets == tokens[block_size:]
