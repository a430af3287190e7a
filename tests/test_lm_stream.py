"""Rows are gathered from one stream of tokens: windows of it, parts of the rows, and the units of a sample."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm.lm import evaluate as evaluation
from charlm.lm.data import build_corpus
from charlm.lm.evaluate import evaluate, surprisals
from charlm.lm.examples import Predictions, line_sequences, sample_rows
from charlm.lm.models import build_model
from charlm.lm.stream import Stream
from charlm.lm.vocabulary import Vocabulary

WORDS = random.Random(1).choices(["to", "be", "or", "not", "that", "is", "the", "question\n"], k=10_000)
TEXT = build_corpus(" ".join(WORDS), format="text")
ITEMS = build_corpus("".join(f"{a}{b * n}\n" for n in range(9) for a in "abcde" for b in "vwxyz"), format="line")
KINDS = {
    "examples of text": lambda: TEXT.examples("dev", 5),
    "examples in windows": lambda: TEXT.examples_in_windows("dev", 5),
    "examples of items": lambda: ITEMS.examples("train", 5),
    "sequences of text": lambda: TEXT.sequences("dev", 5),
    "windows": lambda: TEXT.windows("dev", 5),
    "sequences of items": lambda: ITEMS.sequences("train", 5),
}


def rows_of(predictions: Predictions) -> list[tuple[list[int], list[int]]]:
    """Each row on its own, as a pair of lists."""
    found = [predictions.select(torch.tensor([row])) for row in range(len(predictions))]
    return [(inputs[0].tolist(), targets[0].tolist()) for inputs, targets, _ in found]


@given(
    st.lists(st.integers(0, 3), min_size=1, max_size=30),
    st.lists(st.integers(-12, 34), max_size=6),
    st.integers(1, 9),
    st.booleans(),
    st.sampled_from([torch.uint8, torch.int16, torch.int32]),
)
def test_native_windows_are_those_of_torch(tokens, first, width, by_item, dtype):
    stream = Stream(torch.tensor(tokens, dtype=dtype), pad_token=0)
    at = torch.tensor(first, dtype=torch.int64)
    ours, torchs = stream.windows(at, width, by_item), stream._windows_by_torch(at, width, by_item)
    assert ours.dtype == torchs.dtype
    assert ours.tolist() == torchs.tolist()
    assert ours.shape == (len(first), width)


def test_tokens_of_16_bits_are_unsigned():
    stream = Stream(torch.tensor([40000, 7]).to(torch.int16), pad_token=0)
    assert stream.windows(torch.tensor([-1]), 3).tolist() == [[0, 40000, 7]]
    assert stream.at(torch.tensor([0])).tolist() == stream.part(0, 1).tolist() == [40000]


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_rows_are_those_of_the_whole(kind):
    whole = KINDS[kind]()
    rows = rows_of(whole.slice(0, 60))
    part = whole.slice(3, 40)
    assert rows_of(part) == rows[3:40]
    assert rows_of(part.slice(2, 5)) == rows[5:8]
    chosen = torch.tensor([30, 2, 2, 17])
    assert rows_of(part.take(chosen)) == [rows[3 + row] for row in chosen.tolist()]
    assert rows_of(part.take(chosen).slice(1, 3)) == [rows[5], rows[5]]


@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_those_of_the_selection(kind):
    whole = KINDS[kind]()
    for rows in (whole.slice(0, 300), whole.slice(5, 33), whole.slice(4, 4), whole.take(torch.tensor([9, 0, 9]))):
        counts = rows.count(torch.arange(len(rows)))
        assert counts.sum().item() == rows.tokens
        assert counts.tolist() == [rows.select(torch.tensor([row]))[2] for row in range(len(rows))]


@pytest.mark.parametrize("block_size", [1, 2, 5, 50])
def test_every_row_of_long_and_short_items_is_found(block_size):
    vocabulary = Vocabulary.of("ab", separator=True)
    lengths = [1, 9, 2, 7, 7, 1, 1, 12, 3]
    sequences = line_sequences(["a" * length for length in lengths], vocabulary, block_size)
    widths = [min(n + 1, block_size) for n in lengths for _ in range(1 + max(0, n + 1 - block_size))]
    assert sequences.lengths.tolist() == widths
    assert sequences.tokens == sum(lengths) + len(lengths)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sequences of text"])
def test_units_are_consecutive_rows_that_cover_the_split(kind):
    whole = KINDS[kind]()
    first, end = whole.unit_rows(torch.arange(whole.n_units))
    assert first.tolist() == [0, *end.tolist()[:-1]]
    assert end[-1].item() == len(whole)


@pytest.mark.parametrize("kind", ["examples of text", "examples of items", "windows", "sequences of items"])
def test_a_sample_is_a_fixed_subset_of_about_the_size_asked_for(kind):
    whole = KINDS[kind]()
    wanted = whole.tokens // 3
    sample = sample_rows(whole, wanted)
    assert 0.5 * wanted < sample.tokens < 1.5 * wanted
    assert isinstance(sample.index, torch.Tensor)
    assert len(sample.index.unique()) == len(sample)
    assert torch.equal(sample.index, sample_rows(whole, wanted).index)
    assert sample_rows(whole, whole.tokens) is whole


def test_an_item_is_seen_whole_around_a_character_that_was_escaped():
    vocabulary = replace(Vocabulary.of("ab", separator=True), escapes=True)
    corpus = replace(build_corpus("abaß\nbßab\nab\n", format="line"), vocabulary=vocabulary)
    (item,) = corpus.parts["dev"]
    context = corpus.examples("dev", 8).contexts[-1].tolist()
    assert context == [0] * (8 - len(item)) + vocabulary.encode(item).tolist()


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "sequences of text"])
def test_the_unit_of_a_row_is_the_one_whose_rows_hold_it(kind):
    whole = KINDS[kind]()
    first, end = whole.unit_rows(torch.arange(whole.n_units))
    expected = torch.arange(whole.n_units).repeat_interleave(end - first)
    assert torch.equal(whole.row_units(torch.arange(len(whole))), expected)
    assert torch.equal(whole.slice(7, 20).row_units(torch.tensor([1, 0])), expected[[8, 7]])


@pytest.mark.parametrize("kind", ["examples of text", "examples of items", "windows", "sequences of items"])
def test_a_sampled_loss_lies_within_its_standard_error(kind):
    whole = KINDS[kind]()
    corpus = ITEMS if "items" in kind else TEXT
    torch.manual_seed(0)
    type = "gpt" if whole.select(torch.tensor([0]))[1].dim() == 2 else "mlp"
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8} if type == "gpt" else {"n_embd": 4, "n_hidden": 8}
    model = build_model(type, vocab_size=len(corpus.vocabulary), block_size=5, **sizes)
    exact, sampled = evaluate(model, whole, "dev"), evaluate(model, sample_rows(whole, whole.tokens // 3), "dev")
    assert exact.standard_error is None
    assert sampled.standard_error is not None
    assert 0 < abs(sampled.nats - exact.nats) < 3 * sampled.standard_error
    assert sampled.standard_error < 0.1


def test_the_sum_in_parts_is_the_mean_of_all(monkeypatch):
    torch.manual_seed(0)
    model = build_model("mlp", vocab_size=len(TEXT.vocabulary), block_size=5, n_embd=4, n_hidden=8)
    examples, seen = TEXT.examples("dev", 5), []
    monkeypatch.setattr(evaluation, "CHUNK", 100)
    monkeypatch.setattr(evaluation, "SUMMED", 300)
    found = evaluate(model, examples, "dev", lambda done, total: seen.append((done, total)))
    assert found.nats == pytest.approx(surprisals(model, examples).double().mean().item(), rel=1e-12)
    assert seen[-1] == (len(examples), len(examples))
    assert len(seen) == -(-len(examples) // 100)
