"""Predictions at every position: each token is predicted once, from the context that the protocol allows."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm._errors import UserError
from charlm.lm.data import SPLITS, build_corpus
from charlm.lm.evaluate import evaluate, predictions, surprisals
from charlm.lm.examples import IGNORED, line_examples, line_sequences
from charlm.lm.models import build_model
from charlm.lm.vocabulary import Vocabulary

VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n" * 4
SMALL = {
    "bigram": {},
    "mlp": {"n_embd": 4, "n_hidden": 8},
    "wavenet": {"n_embd": 4, "n_hidden": 8},
    "bow": {"n_embd": 4, "n_hidden": 8, "dropout": 0.5},
    "rnn": {"n_embd": 4, "n_hidden": 8, "dropout": 0.5},
    "gru": {"n_embd": 4, "n_hidden": 8, "n_layer": 2, "dropout": 0.5},
    "lstm": {"n_embd": 4, "n_hidden": 8, "n_layer": 2, "dropout": 0.5},
    "gpt": {"n_layer": 2, "n_head": 2, "n_embd": 8, "dropout": 0.5},
}


def predicted(idx, targets, block_size):
    """(visible context, target) of each prediction, in order."""
    return [
        (row[: t + 1], target)
        for row, wanted in zip(idx.tolist(), targets.tolist(), strict=True)
        for t, target in enumerate(wanted)
        if target != IGNORED
    ]


@given(st.lists(st.text("ab.", min_size=1, max_size=7), min_size=1, max_size=9), st.integers(1, 9))
def test_sequences_of_items_make_the_predictions_of_examples(items, block_size):
    vocabulary = Vocabulary.of("ab.", separator=True)
    sequences = line_sequences(items, vocabulary, block_size)
    examples = line_examples(items, vocabulary, block_size)
    ours = predicted(sequences.idx, sequences.targets, block_size)
    assert [target for _, target in ours] == examples.targets.tolist()
    # The same window, without the separators that fill it: a sequence has one.
    for (seen, _), context in zip(ours, examples.contexts.tolist(), strict=True):
        assert [0] * (block_size - len(seen)) + seen == context
    assert sequences.tokens == examples.tokens == len(ours)
    assert sequences.counts.tolist() == (sequences.targets != IGNORED).sum(1).tolist()
    for row, length in zip(sequences.targets.tolist(), sequences.lengths.tolist(), strict=True):
        assert set(row[length:]) <= {IGNORED}


@given(st.text("ab\n", min_size=3, max_size=60).filter(str.strip), st.integers(1, 12))
def test_windows_predict_each_character_once_and_see_nothing_before_them(text, block_size):
    corpus = build_corpus(text, format="text")
    tokens = [corpus.vocabulary.pad_token, *corpus.vocabulary.encode(text).tolist()]
    start = 0
    for split in SPLITS:
        windows = corpus.windows(split, block_size)
        ours = predicted(windows.idx, windows.targets, block_size)
        length = len(corpus.parts[split][0])
        assert [target for _, target in ours] == tokens[start + 1 : start + length + 1]
        for i, (seen, _) in enumerate(ours):
            first = start + i // block_size * block_size
            assert seen == tokens[first : start + i + 1]
        # The examples have the same contexts, padded on the left.
        examples = corpus.examples_in_windows(split, block_size)
        assert examples.targets.tolist() == [target for _, target in ours]
        for context, (seen, _) in zip(examples.contexts.tolist(), ours, strict=True):
            assert context == [corpus.vocabulary.pad_token] * (block_size - len(seen)) + seen
        start += length


def test_training_sequences_of_text_are_every_run_of_a_block():
    corpus = build_corpus(VERSE, format="text")
    train = corpus.sequences("train", 8)
    text = corpus.vocabulary.encode(corpus.parts["train"][0]).tolist()
    stream = [corpus.vocabulary.pad_token, *text]
    assert train.idx.tolist() == [stream[i : i + 8] for i in range(len(text) - 7)]
    assert train.targets.tolist() == [stream[i + 1 : i + 9] for i in range(len(text) - 7)]


def test_a_selection_is_as_wide_as_its_longest_row_and_counts_its_predictions():
    vocabulary = Vocabulary.of("ab", separator=True)
    sequences = line_sequences(["a", "abab", "ab"], vocabulary, 8)
    idx, targets, count = sequences.select(torch.tensor([2, 0]))
    assert idx.tolist() == [[0, 1, 2], [0, 1, 0]]
    assert targets.tolist() == [[1, 2, 0], [1, 0, IGNORED]]
    assert count == 5


@pytest.mark.parametrize("type", SMALL)
@pytest.mark.parametrize("protocol", ["sliding", "fixed"])
def test_both_protocols_evaluate_every_model_exactly(type, protocol):
    corpus = build_corpus(VERSE, format="text")
    torch.manual_seed(0)
    model = build_model(type, vocab_size=len(corpus.vocabulary), block_size=8, **SMALL[type])
    model.train()
    result = evaluate(model, predictions(model, corpus, "dev", protocol), "dev")
    assert model.training
    assert (result.protocol, result.tokens) == (protocol, len(corpus.parts["dev"][0]))
    model.eval()
    stream = corpus.vocabulary.encode(VERSE).tolist()
    start = len(corpus.parts["train"][0])
    total = 0.0
    for i in range(result.tokens):
        begin = start + i - 8 if protocol == "sliding" else start + i // 8 * 8 - 1
        context = torch.tensor([stream[begin : start + i]])
        if not model.predicts_every_position:
            padding = torch.full((1, 8 - context.shape[1]), model.pad_token)
            context = torch.cat([padding, context], dim=1)
        logits = model(context)[0].detach()
        total -= logits.reshape(-1, model.vocab_size)[-1].double().log_softmax(-1)[stream[start + i]].item()
    assert result.nats == pytest.approx(total / result.tokens, rel=1e-6)


@pytest.mark.parametrize(("text", "protocol"), [("ada\nbea\ncleo\n", "fixed"), (VERSE, "items"), (VERSE, "random")])
def test_a_protocol_that_does_not_fit_is_a_user_error(text, protocol):
    corpus = build_corpus(text)
    model = build_model("bigram", vocab_size=len(corpus.vocabulary), block_size=1)
    with pytest.raises(UserError, match=repr(protocol)):
        predictions(model, corpus, "dev", protocol)


def test_surprisals_are_in_the_order_of_the_file():
    corpus = build_corpus("ada\nbea\ncleo\ndora\n" * 5)
    model = build_model("bigram", vocab_size=len(corpus.vocabulary), block_size=1)
    model.fit(predictions(model, corpus, "train"))
    expected = []
    for item in corpus.parts["dev"]:
        tokens = [0, *corpus.vocabulary.encode(item).tolist(), 0]
        expected += [-model.log_probs[a, b].item() for a, b in pairwise(tokens)]
    assert surprisals(model, predictions(model, corpus, "dev")).tolist() == pytest.approx(expected)
