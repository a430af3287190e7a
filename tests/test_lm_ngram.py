"""The n-gram model: against a slow and plain one of dicts, as a distribution, through a checkpoint."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.config import Config
from charlm.lm.data import build_corpus, read_corpus
from charlm.lm.evaluate import evaluate
from charlm.lm.examples import Examples, text_examples
from charlm.lm.models import Bigram, NGram, Unigram, ngram
from charlm.lm.models.ngram import TABLES, pack, unpack
from charlm.lm.stream import Stream
from charlm.lm.train import Trainer

NAMES = "anna\nada\nbea\nbab\nnan\nabba\ndaphne\nhannah\n" * 3 + "zoe\nemma\nmia\nada\nalexandra\n"
TEXT = "the cat sat on the mat.\nthe dog sat on the log.\n\nthat cat and that dog sat\n" * 3
CORPORA = {
    "line": build_corpus(NAMES, format="line"),
    "text": build_corpus(TEXT, format="text"),
    "text of one line": build_corpus(TEXT.replace("\n", " ") + "\n", format="text"),
}


def sized(order: int) -> int:
    return max(1, order - 1)


def fitted(corpus, order: int, **options) -> NGram:
    size = len(corpus.vocabulary)
    model = NGram(size, sized(order), corpus.vocabulary.pad_token, order=order, **options)
    model.fit(corpus.examples("train", sized(order)))
    return model


class PlainKneserNey:
    """The formula, word for word, over dicts; contexts as tuples that end at the item's beginning."""

    def __init__(self, examples: Examples, order: int, vocab_size: int, item_pad: int | None) -> None:
        self.order, self.vocab_size, self.item_pad = order, vocab_size, item_pad
        count, in_front = [Counter() for _ in range(order + 1)], [defaultdict(set) for _ in range(order + 1)]
        for context, target in zip(examples.contexts.tolist(), examples.targets.tolist(), strict=True):
            context = self.visible(context)
            for length in range(1, min(order, len(context) + 1) + 1):
                gram = (*context[len(context) - length + 1 :], target)
                count[length][gram] += 1
                if length <= len(context):
                    in_front[length][gram].add(context[-length])
        self.a = [{} for _ in range(order + 1)]
        self.discount = [0.0] * (order + 1)
        for length in range(1, order + 1):
            for gram, n in count[length].items():
                shorter_speaks = length < order and in_front[length][gram]
                self.a[length][gram] = len(in_front[length][gram]) if shorter_speaks else n
            once, twice = (sum(a == n for a in self.a[length].values()) for n in (1, 2))
            self.discount[length] = once / (once + 2 * twice) if once else 0.5

    def visible(self, context: list[int]) -> tuple[int, ...]:
        """The context's last order - 1 tokens, no further back than the item's beginning."""
        seen = []
        for token in reversed(context[len(context) - self.order + 1 :] if self.order > 1 else []):
            seen.append(token)
            if token == self.item_pad:
                break
        return tuple(reversed(seen))

    def probability(self, context: list[int], x: int) -> float:
        context = self.visible(context)
        p = 1 / self.vocab_size
        for length in range(1, len(context) + 2):
            c = context[len(context) - length + 1 :]
            after = {gram: a for gram, a in self.a[length].items() if gram[:-1] == c}
            if after:
                total = sum(after.values())
                d = self.discount[length]
                p = max(after.get((*c, x), d) - d, 0) / total + d * len(after) / total * p
        return p


@pytest.mark.parametrize("format", CORPORA)
@pytest.mark.parametrize("order", [1, 2, 3, 4, 5])
def test_kneser_ney_is_the_formula_over_dicts(format, order):
    corpus = CORPORA[format]
    size, pad = len(corpus.vocabulary), corpus.vocabulary.pad_token
    plain = PlainKneserNey(corpus.examples("train", sized(order)), order, size, pad if format == "line" else None)
    dev = corpus.examples("dev", sized(order))
    expected = torch.tensor(
        [[plain.probability(context, x) for x in range(size)] for context in dev.contexts.tolist()],
        dtype=torch.float64,
    )
    model = fitted(corpus, order)
    logits, loss = model(dev.contexts, dev.targets)
    torch.testing.assert_close(logits.exp(), expected, rtol=1e-12, atol=0)
    surprisals = -expected.log().gather(1, dev.targets.long()[:, None]).squeeze(1)
    torch.testing.assert_close(model.loss(dev.contexts, dev.targets, "none"), surprisals, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(model.loss(dev.contexts, dev.targets), loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(model.loss(dev.contexts, dev.targets, "sum"), surprisals.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("smoothing", ["kneser-ney", "add-k"])
@pytest.mark.parametrize("format", CORPORA)
def test_after_any_context_probabilities_sum_to_one_and_none_is_zero(format, smoothing):
    corpus = CORPORA[format]
    model = fitted(corpus, 4, smoothing=smoothing)
    size = len(corpus.vocabulary)
    every = torch.cartesian_prod(*[torch.arange(size)] * 3)  # seen, half seen and unseen; pads in odd places too
    p = model(every)[0].exp()
    torch.testing.assert_close(p.sum(1), torch.ones(len(every), dtype=torch.float64), rtol=1e-13, atol=0)
    assert p.min().item() > 0


@pytest.mark.parametrize("format", CORPORA)
@pytest.mark.parametrize(("order", "kind"), [(1, Unigram), (2, Bigram)])
def test_add_k_of_orders_one_and_two_is_the_unigram_and_the_bigram(format, order, kind):
    corpus = CORPORA[format]
    size, pad = len(corpus.vocabulary), corpus.vocabulary.pad_token
    table = kind(size, pad_token=pad, add_k=0.3)
    table.fit(corpus.examples("train", 1))
    model = fitted(corpus, order, smoothing="add-k", add_k=0.3)
    contexts = torch.arange(size)[:, None]
    torch.testing.assert_close(model(contexts)[0], table(contexts)[0], rtol=1e-13, atol=0)


@pytest.mark.parametrize("format", CORPORA)
def test_add_k_of_a_higher_order_is_the_smoothed_counts_of_whole_contexts(format):
    corpus = CORPORA[format]
    train, dev = corpus.examples("train", 3), corpus.examples("dev", 3)
    size, k = len(corpus.vocabulary), 0.5
    pairs = Counter((tuple(c), x) for c, x in zip(train.contexts.tolist(), train.targets.tolist(), strict=True))
    whole = Counter(map(tuple, train.contexts.tolist()))
    model = fitted(corpus, 4, smoothing="add-k", add_k=k)
    logits = model(dev.contexts)[0].exp()
    for row, context in enumerate(map(tuple, dev.contexts.tolist())):
        for x in range(size):
            expected = (pairs[context, x] + k) / (whole[context] + k * size)
            assert logits[row, x].item() == pytest.approx(expected, rel=1e-12)
    losses = model.loss(dev.contexts, dev.targets, "none")
    torch.testing.assert_close(losses, -logits.log().gather(1, dev.targets.long()[:, None]).squeeze(1))


def test_an_order_beyond_the_longest_item_adds_nothing():
    corpus = CORPORA["line"]
    longest = max(map(len, corpus.parts["train"])) + 2
    results = []
    for order in (longest, 100):
        # Below the order a count is of distinct tokens in front, and at the beginning of an item there is none.
        dev = corpus.examples("dev", order - 1)
        results.append(evaluate(fitted(corpus, order), dev, "dev").nats)
    assert results[0] == results[1]


def test_before_it_has_counted_every_token_is_as_probable():
    model = NGram(27, 3)
    idx, targets = torch.randint(27, (5, 3)), torch.randint(27, (5,))
    assert model(idx)[0].tolist() == [[pytest.approx(-math.log(27))] * 27] * 5
    assert model.loss(idx, targets).item() == pytest.approx(math.log(27))


def test_without_singles_something_is_left_for_what_was_never_seen():
    corpus = build_corpus("ab\n" * 30)
    model = fitted(corpus, 3)
    assert model(torch.tensor([[0, 1]]))[0].exp()[0].min().item() > 0


@pytest.mark.parametrize("smoothing", ["kneser-ney", "add-k"])
def test_a_trained_model_comes_back_from_its_checkpoint(tmp_path, smoothing):
    corpus = CORPORA["line"]
    config = Config(type="ngram", order=4, smoothing=smoothing, add_k=0.1, format="line")
    trainer = Trainer(config, corpus, tmp_path)
    assert trainer.run()
    model = checkpoint.load(tmp_path).build_model()
    dev = corpus.examples("dev", config.block_size)
    assert torch.equal(model(dev.contexts)[0], trainer.model(dev.contexts)[0])
    assert evaluate(model, dev, "dev").nats == trainer.best_nats
    model.fit(corpus.examples("train", config.block_size))  # again, over what was loaded
    assert evaluate(model, dev, "dev").nats == trainer.best_nats


def test_two_trainings_and_any_threads_give_the_same_bits(n_threads):
    models = [fitted(CORPORA["text"], 5) for _ in range(2)]
    torch.set_num_threads(1)
    models.append(fitted(CORPORA["text"], 5))
    states = [model.state_dict() for model in models]
    for state in states[1:]:
        assert all(torch.equal(tensor, states[0][name]) for name, tensor in state.items())


def test_examples_hold_the_tokens_once():
    examples = CORPORA["text"].examples("train", 5)
    assert examples.stream.tokens.untyped_storage().nbytes() == len(examples)
    model = NGram(len(CORPORA["text"].vocabulary), 5, CORPORA["text"].vocabulary.pad_token)
    model.fit(examples)
    assert model.ngram_counts.sum().item() > 0


@pytest.mark.parametrize("smoothing", ["kneser-ney", "add-k"])
@pytest.mark.parametrize("format", CORPORA)
def test_a_model_that_is_counted_on_disk_has_the_same_tables(format, smoothing, monkeypatch, tmp_path):
    corpus = CORPORA[format]
    size, pad = len(corpus.vocabulary), corpus.vocabulary.pad_token
    expected = fitted(corpus, 4, smoothing=smoothing).state_dict()
    monkeypatch.setattr(ngram, "SCANNED_EXAMPLES", 7)
    model = NGram(size, 3, pad, order=4, smoothing=smoothing)
    model.fit(corpus.examples("train", 3), memory=2**26, directory=tmp_path)
    state = model.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())
    assert list(tmp_path.iterdir()) == []


def test_tables_that_do_not_fit_in_the_memory_are_refused_with_their_size():
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, 256, 400_000).astype(np.uint8))
    model = NGram(256, 2, order=3)
    examples = text_examples(Stream(tokens, 0, 0), 2)
    with pytest.raises(UserError, match="460,836 distinct n-grams, whose tables need 51,613,632 bytes, but memory"):
        model.fit(examples, memory=2**25)
    assert len(model.ngram_keys) == 0


def test_examples_out_of_order_are_refused():
    examples = CORPORA["line"].examples("train", 3)
    shuffled = examples.take(torch.arange(len(examples)).flip(0))
    with pytest.raises(ValueError, match="context of example 1 does not end in the target"):
        NGram(27, 3).fit(shuffled)


@pytest.mark.parametrize("options", [{"order": 0}, {"order": 5}, {"smoothing": "laplace"}])
def test_a_model_that_cannot_be_built_is_refused(options):
    name, value = next(iter(options.items()))
    with pytest.raises(ValueError, match=f"^{name} is {value!r}, but must be"):
        NGram(27, 3, **options)


@pytest.mark.parametrize("options", [{"order": 0}, {"order": 1001}, {"smoothing": "laplace"}])
def test_a_config_that_cannot_be_run_is_one_sentence(options):
    name, value = next(iter(options.items()))
    with pytest.raises(UserError, match=f"^{name} is {value}, but must be"):
        Config(type="ngram", **options)


def test_the_block_size_of_an_ngram_model_is_its_context():
    config = Config(type="ngram", order=4, block_size=8)
    assert config.block_size == 3
    assert replace(config, order=1).block_size == 1
    assert Config(order=4).block_size == Config().block_size


# ---- the packed tables


@pytest.mark.parametrize("smoothing", ["kneser-ney", "add-k"])
def test_a_state_dict_of_bytes_gives_the_same_tables(smoothing):
    corpus = read_corpus(None)
    model = NGram(len(corpus.vocabulary), 4, order=5, smoothing=smoothing)
    model.fit(corpus.examples("train", 4))
    state = model.state_dict()
    assert set(state) == {"items", "tables"}
    assert len(state["tables"]) < 2 * len(model.ngram_keys)  # bytes
    loaded = NGram(len(corpus.vocabulary), 4, order=5, smoothing=smoothing)
    loaded.load_state_dict(state)
    for name in TABLES:
        assert torch.equal(getattr(loaded, name), getattr(model, name))
    idx, targets = next(corpus.examples("dev", 4).chunks(1000))
    assert torch.equal(loaded.loss(idx, targets, "none"), model.loss(idx, targets, "none"))


def test_a_state_dict_of_an_earlier_version_is_read():
    corpus = build_corpus("ab\nabc\nba\nbac\nabab", format="line")
    model = NGram(len(corpus.vocabulary), 2, order=3)
    model.fit(corpus.examples("train", 2))
    old = {name: getattr(model, name) for name in (*TABLES, "items")}
    loaded = NGram(len(corpus.vocabulary), 2, order=3)
    loaded.load_state_dict(old)
    assert torch.equal(loaded.state_dict()["tables"], model.state_dict()["tables"])
    assert torch.equal(loaded.share, model.share)


def packed(context_keys=(0, 2), ngram_keys=(0, 4, 7), counts=(1, 2, 3), lengths=None, cut=None) -> np.ndarray:
    arrays = [np.array(array, np.int64) for array in (context_keys, ngram_keys, counts)]
    data = pack(tuple(arrays))
    if lengths is not None:
        data = np.concatenate([np.array(lengths, "<i8").view(np.uint8), data[16:]])
    return data[:cut]


def test_packed_tables_come_back():
    assert [array.tolist() for array in unpack(packed(), 3)] == [[0, 2], [0, 4, 7], [1, 2, 3]]


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (packed(cut=-4), "too short|damaged"),
        (packed(cut=20), "too short|damaged"),
        (np.concatenate([packed()[:16], np.zeros(40, np.uint8)]), "damaged"),
        (packed(lengths=(2, 2**40)), "contexts and 1099511627776 n-grams"),
        (packed(lengths=(-1, 3)), "name -1 contexts"),
        (packed(lengths=(2, 4)), "too short"),
        (packed(ngram_keys=(0, 7, 4)), "not sorted"),
        (packed(context_keys=(-3, 2)), "not sorted"),
        (packed(ngram_keys=(0, 4, 9)), "contexts that do not exist"),
        (packed(counts=(1, 0, 3)), "not sorted, or"),
    ],
)
def test_damaged_tables_are_a_value_error(data, words):
    with pytest.raises(ValueError, match=words):
        unpack(np.ascontiguousarray(data), 3)
