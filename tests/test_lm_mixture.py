"""The mixture of a network and an n-gram: formula, weights, held-out part, training and invalid options."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from lm_support import StopAt

from charlm._errors import UserError
from charlm.lm import checkpoint, held_out
from charlm.lm.character_model import CharacterModel
from charlm.lm.config import Config
from charlm.lm.data import build_corpus, read_corpus
from charlm.lm.evaluate import evaluate, predictions
from charlm.lm.examples import IGNORED
from charlm.lm.held_out import before, behind, choose_order, fitted_ngram, training_end
from charlm.lm.models import Mixture, NGram, build_model
from charlm.lm.train import Trainer

NAMES = build_corpus("\n".join(["emma", "olivia", "ava", "isabella", "sophia", "mia", "emily"] * 20))
TEXT = build_corpus("the quick brown fox jumps over the lazy dog. " * 60, format="text")
# 201 tokens, among them 156: -100 as a number of one byte.
BYTES = build_corpus("".join(map(chr, range(0x100, 0x1C8))) * 12, format="text")
ORDER, T = 4, 6
NETWORKS = {
    "mlp": {"n_embd": 4, "n_hidden": 8},
    "wavenet": {"n_embd": 4, "n_hidden": 8, "block_size": 8},
    "bow": {"n_embd": 4, "n_hidden": 8},
    "rnn": {"n_embd": 4, "n_hidden": 8},
    "gru": {"n_embd": 4, "n_hidden": 8},
    "lstm": {"n_embd": 4, "n_hidden": 8},
    "gpt": {"n_layer": 2, "n_head": 2, "n_embd": 8},
}


def mixture(type: str, corpus) -> Mixture:
    vocabulary = corpus.vocabulary
    options = {"block_size": T, **NETWORKS[type]}
    model = build_model(
        type, vocab_size=len(vocabulary), pad_token=vocabulary.pad_token, mix_ngram=ORDER, **options
    ).eval()
    model.fit(corpus.examples("train", ORDER - 1))
    model.weights.copy_(torch.linspace(-1, 1, len(model.weights), dtype=torch.float64) / 3)
    return model


@pytest.mark.parametrize("corpus", [NAMES, TEXT, BYTES], ids=["line", "text", "bytes"])
@pytest.mark.parametrize("type", list(NETWORKS))
def test_a_prediction_is_the_weighted_mean_of_both(type, corpus):
    """Compares a whole split with the two models evaluated separately."""
    model = mixture(type, corpus)
    idx, targets = next(predictions(model, corpus, "dev").chunks(10_000))
    rows = predictions(model.network, corpus, "dev")
    logits = model.network(next(rows.chunks(10_000))[0])[0].detach()
    if model.predicts_every_position:
        logits = logits[targets != IGNORED]
    # The n-gram sees the tokens before a window of running text, even if the network does not.
    seen = corpus.examples("dev", ORDER - 1)
    contexts, wanted = seen.contexts, seen.targets
    w = expected_weights(model, contexts)[:, None]
    p = w * logits.double().softmax(-1) + (1 - w) * model.ngram(contexts)[0].exp()  # (tokens, V)
    expected = -p[torch.arange(len(wanted)), wanted.long()].log()

    losses = model.loss(idx, targets, reduction="none")
    assert losses.shape == targets.shape
    counts = targets.int() != IGNORED
    torch.testing.assert_close(losses[counts], expected, rtol=1e-5, atol=1e-6)
    assert not losses[~counts].any()
    torch.testing.assert_close(model.loss(idx, targets), expected.mean())
    torch.testing.assert_close(model.loss(idx, targets, reduction="sum"), expected.sum())
    mixed, loss = model(idx, targets)
    torch.testing.assert_close(mixed.exp().sum(-1), torch.ones(mixed.shape[:-1], dtype=torch.float64))
    torch.testing.assert_close(loss, expected.mean())


def expected_weights(model: Mixture, contexts) -> torch.Tensor:
    """The weight of the network after each of `contexts`, by the formula, one context at a time."""
    b, u = model.weights[:ORDER], model.weights[ORDER:]
    weights = []
    for length, total, distinct in zip(*model.ngram.evidence(model.ngram.contexts(contexts)), strict=True):
        a, t = total.log(), distinct.log()
        weights.append(torch.sigmoid(b[length] + u @ torch.stack([a, t, a * t, a * a, t * t])))
    return torch.stack(weights)


def test_the_evidence_is_what_training_has_seen_of_the_longest_known_context():
    corpus = build_corpus("\n".join(["ab", "abc", "abd", "xb"] * 5), format="line")
    model = NGram(len(corpus.vocabulary), 2, order=3)
    rows = corpus.examples("train", 2)
    model.fit(rows)
    text = ["." + item + "." for item in corpus.parts["train"]]
    token = corpus.vocabulary.encode
    after = [item[i + 2] for item in text for i in range(len(item) - 2) if item[i : i + 2] == "ab"]
    length, total, distinct = model.evidence(model.contexts(token("ab")[None]))
    assert (length.item(), total.item(), distinct.item()) == (2, len(after), len(set(after)))
    length, total, distinct = model.evidence(model.contexts(token("dx")[None]))  # "dx" does not occur, "x" does
    assert (length.item(), distinct.item()) == (1, 1)


@pytest.mark.parametrize("type", list(NETWORKS))
def test_in_training_mode_it_is_the_network(type):
    model = mixture(type, NAMES)
    rows = NAMES.sequences if model.predicts_every_position else NAMES.examples
    idx, targets, _ = rows("train", model.block_size).select(torch.arange(20))
    model.train()
    assert torch.equal(model.loss(idx, targets), model.network.loss(idx, targets))
    assert torch.equal(model(idx, targets)[1], model.network(idx, targets)[1])
    assert [name for name, _ in model.named_parameters()] == [
        f"network.{name}" for name, _ in model.network.named_parameters()
    ]


@pytest.mark.parametrize("type", list(NETWORKS))
@pytest.mark.parametrize("length", [0, 1, 3, 9])
def test_the_next_tokens_probabilities_are_those_of_both(type, length):
    model = mixture(type, NAMES)
    sequence = torch.randint(len(NAMES.vocabulary), (4, length))
    with torch.no_grad():
        p = model.next_logits(sequence, {}).exp()
        network, ngram = (m.next_logits(sequence, {}).double().softmax(-1) for m in (model.network, model.ngram))
    padded = torch.cat([torch.zeros(4, ORDER, dtype=torch.int64), sequence], dim=1)[:, -(ORDER - 1) :]
    w = expected_weights(model, padded)[:, None]
    torch.testing.assert_close(p, w * network + (1 - w) * ngram)


# ---- weights


def predicted(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses of two models of which each is better in half of the contexts, and the terms of these."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.arange(n) % 2 == 0
    good, bad = (torch.rand(n, dtype=torch.float64, generator=generator) + shift for shift in (0.0, 2.0))
    terms = torch.zeros(n, ORDER + 5, dtype=torch.float64)
    terms[known, ORDER - 1] = 1.0
    terms[~known, 0] = 1.0
    return torch.where(known, bad, good), torch.where(known, good, bad), terms


def test_the_weights_follow_what_the_ngram_has_seen():
    model = mixture("mlp", NAMES)
    network, ngram, terms = predicted(4000)
    model.fit_weights(network, ngram, terms)
    w = torch.sigmoid(model.weights[[0, ORDER - 1]])  # of the network, in unknown and in known contexts
    assert w[0] > 0.9
    assert w[1] < 0.1
    mixed = -torch.logaddexp(
        torch.nn.functional.logsigmoid(terms @ model.weights) - network,
        torch.nn.functional.logsigmoid(-(terms @ model.weights)) - ngram,
    )
    half = -(torch.logaddexp(-network, -ngram) - torch.log(torch.tensor(2.0)))
    assert mixed.mean() < half.mean() - 0.4
    # The gradient of the loss and the prior is 0.
    p_network, p_ngram = (-network).exp(), (-ngram).exp()
    weight = torch.sigmoid(terms @ model.weights)
    slope = -(p_network - p_ngram) / (weight * p_network + (1 - weight) * p_ngram) * weight * (1 - weight)
    b, u = model.weights[:ORDER], model.weights[ORDER:]
    prior = torch.cat([2 * (b - b.mean()) + b.mean() / (10 * ORDER), 2 * u])
    gradient = (terms * slope[:, None]).mean(0) + prior / len(terms)
    assert gradient.abs().max() < 1e-5


def test_the_weights_stay_near_one_half_where_there_is_little_data():
    model = mixture("mlp", NAMES)
    model.fit_weights(*predicted(2))
    assert model.weights.abs().max() < 0.6


def test_little_data_shows_that_one_model_is_better_in_every_context():
    model = mixture("mlp", NAMES)
    terms = torch.nn.functional.one_hot(torch.arange(40) % ORDER, ORDER + 5).double()
    model.fit_weights(torch.full((40,), 6.0), torch.ones(40), terms)
    assert torch.sigmoid(terms @ model.weights).max() < 0.05


# ---- the held-out part


@pytest.mark.parametrize("corpus", [read_corpus(None), TEXT], ids=["line", "text"])
def test_the_held_out_part_is_whole_items_at_the_end_of_train(corpus):
    end, total = training_end(corpus), corpus.tokens("train")
    assert 0.94 < end / total < 0.97
    if corpus.format == "line":
        lengths = [len(item) + 1 for item in corpus.parts["train"]]
        assert end in itertools.accumulate(lengths)


@pytest.mark.parametrize("corpus", [NAMES, TEXT], ids=["line", "text"])
@pytest.mark.parametrize("every_position", [False, True])
def test_no_row_of_training_predicts_the_held_out_part(corpus, every_position):
    rows = (corpus.sequences if every_position else corpus.examples)("train", T)
    end = training_end(corpus, T)
    kept = before(rows, end)
    last, count = (kept.stream.start + kept.index.stop, len(kept))
    assert 0 < count < len(rows)
    if not every_position:
        assert last == end
    elif corpus.format == "line":
        assert kept.tokens == end
    else:
        assert last - 1 + T == end


@pytest.mark.parametrize("corpus", [NAMES, TEXT], ids=["line", "text"])
@pytest.mark.parametrize("type", ["mlp", "gpt"])
def test_the_rows_behind_an_end_predict_the_rest_once(corpus, type):
    rows = predictions(mixture(type, corpus).network, corpus, "train")
    total = corpus.tokens("train")
    for end in (training_end(corpus, T), total):
        held, first = behind(rows, end)
        assert end <= first < end + T
        assert held.tokens == max(0, total - first)
        wanted = corpus.examples("train", 1).slice(first, total).targets
        found = [targets[targets.int() != IGNORED] for _, targets in held.chunks(100)]
        assert torch.equal(torch.cat([wanted[:0].int(), *(each.int() for each in found)]), wanted.int())


def test_the_order_is_the_one_with_the_lowest_loss_on_the_held_out_part():
    corpus = read_corpus(None)
    end, total = training_end(corpus), corpus.tokens("train")
    losses = {}
    for order in range(1, 9):
        model = NGram(len(corpus.vocabulary), max(1, order - 1), order=order)
        model.fit(corpus.examples("train", model.block_size).slice(0, end))
        losses[order] = evaluate(model, corpus.examples("train", model.block_size).slice(end, total), "train").nats
    assert choose_order(corpus, 1000)[0] == min(losses, key=losses.get)
    assert choose_order(corpus, 3)[0] == 3  # the losses decrease up to there
    assert choose_order(build_corpus("a\nb\nc"), 1000)[0] == 3  # nothing can be held out


def test_of_running_text_the_order_is_the_highest_that_is_nearly_as_good():
    names = read_corpus(None).parts["train"][:4000]
    corpus = build_corpus(" ".join(names * 2), format="text")  # the held-out part repeats the beginning
    end, total = training_end(corpus), corpus.tokens("train")
    losses = {}
    for order in range(1, 8):
        model = fitted_ngram(corpus, order, end, total)
        losses[order] = evaluate(model, corpus.examples("train", model.block_size).slice(end, total), "train").nats
    best = min(losses.values())
    assert choose_order(corpus, 7)[0] == max(order for order, loss in losses.items() if loss <= 1.003 * best)
    assert choose_order(corpus, 7)[0] > 4


def test_a_mixture_counts_no_more_ngrams_than_fit(monkeypatch, tmp_path):
    corpus = read_corpus(None)
    _, most = choose_order(corpus, 1000)
    assert most > corpus.tokens("train")
    monkeypatch.setattr(held_out, "MOST_NGRAMS", 40_000)
    lower, fewer = choose_order(corpus, 1000, most=20_000)
    assert lower > 1
    assert 20_000 < fewer < corpus.tokens("train")
    ngram = fitted_ngram(corpus, lower, corpus.tokens("train"), fewer)
    assert 20_000 < len(ngram.ngram_keys) <= 40_000
    monkeypatch.setattr(held_out, "choose_order", lambda *arguments: (lower, fewer))
    trainer = Trainer(config("mlp", max_steps=1, mix_ngram=None), corpus, tmp_path)
    assert (trainer.config.mix_ngram, trainer.config.mix_tokens) == (lower, fewer)
    assert len(trainer.model.ngram.ngram_keys) == len(ngram.ngram_keys)


def test_a_mixture_of_an_earlier_version_has_equal_weights():
    model = mixture("mlp", NAMES)
    state = {name: tensor for name, tensor in model.state_dict().items() if name != "weights"}
    model.load_state_dict(state)
    assert not model.weights.any()


def test_a_mixture_is_calibrated_on_predictions_that_neither_model_was_trained_on(tmp_path):
    trainer = Trainer(config("mlp", max_steps=4, mix_ngram=None), read_corpus(None), tmp_path)
    trainer.run()
    calibration = trainer._calibration
    total = trainer.corpus.tokens("train")
    assert len(calibration.nats) == total - training_end(trainer.corpus)
    model = NGram(trainer.model.vocab_size, trainer.model.ngram.block_size, order=trainer.model.ngram.order)
    model.fit(trainer.corpus.examples("train", model.block_size).slice(0, total - len(calibration.nats)))
    rows = trainer.corpus.examples("train", model.block_size).slice(total - len(calibration.nats), total)
    torch.testing.assert_close(calibration.nats, model.loss(rows.contexts, rows.targets, "none"))


# ---- training


def config(type: str, **given) -> Config:
    run = {"max_steps": 12, "batch_size": 16, "eval_interval": 4, "log_interval": 3, "warmup_steps": 2, "dropout": 0.2}
    return Config.of_type(type, **{"block_size": T, **NETWORKS[type], **run, "mix_ngram": ORDER, **given})


@pytest.mark.parametrize("type", list(NETWORKS))
def test_a_mixture_trains_resumes_exactly_and_comes_back(tmp_path, type):
    whole = Trainer(config(type), NAMES, tmp_path / "whole")
    assert whole.run()
    parts = tmp_path / "parts"
    trainer = Trainer(config(type), NAMES, parts)
    assert not trainer.run(stop=StopAt(trainer, 5))
    saved = checkpoint.load(parts)
    assert Trainer(saved.config, NAMES, parts, saved).run()

    ours, theirs = checkpoint.load(parts), checkpoint.load(tmp_path / "whole")
    assert ours.weights.keys() == theirs.weights.keys()
    assert all(torch.equal(ours.weights[name], theirs.weights[name]) for name in ours.weights)
    assert ours.best_nats == theirs.best_nats
    model = ours.build_model()
    assert evaluate(model, predictions(model, NAMES, "dev"), "dev").nats == pytest.approx(ours.best_nats, abs=1e-9)
    loaded = CharacterModel(ours)
    assert loaded.surprisal("emma").shape == (5,)
    assert len(loaded.generate("em", 3)) == 3


def test_on_the_shipped_names_it_beats_both_parts_by_far(tmp_path):
    corpus = read_corpus(None)
    run = {"max_steps": 300, "n_hidden": 128, "learning_rate": 1e-2, "warmup_steps": 20, "eval_interval": 300}
    trainer = Trainer(Config(**run, mix_ngram=None, format="line"), corpus, tmp_path)
    trainer.run()
    model = trainer.model
    mixed, network, ngram = (
        evaluate(m, predictions(m, corpus, "dev"), "dev").nats for m in (model, model.network, model.ngram)
    )
    assert mixed < min(network, ngram) - 0.03
    saved = checkpoint.load(tmp_path)
    assert saved.config.mix_ngram == model.ngram.order > 0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mix_ngram": -1}, "mix_ngram is -1, but must be at least 0"),
        (
            {"mix_ngram": 8, "type": "gpt", "block_size": 6},
            "mix_ngram is 8, but must be at most 7 for a block_size of 6",
        ),
        ({"mix_ngram": 3, "type": "bigram"}, "mix_ngram is 3, but must be 0 for type bigram, which counts"),
        ({"mix_ngram": None, "type": "ngram"}, "mix_ngram is None, but must be 0 for type ngram, which counts"),
        ({"mix_tokens": 0}, "mix_tokens is 0, but must be at least 1"),
    ],
)
def test_a_mixture_that_cannot_be_is_a_user_error(given, words):
    with pytest.raises(UserError, match=words):
        Config(**given)


def test_an_order_beyond_the_window_is_a_value_error():
    with pytest.raises(ValueError, match="order is 8, but must be at least 1 and at most 7"):
        build_model("gpt", vocab_size=5, block_size=6, mix_ngram=8, n_embd=2, n_head=1, n_layer=1)


def test_an_mlp_can_be_mixed_with_an_ngram_of_a_longer_context():
    model = build_model("mlp", vocab_size=28, block_size=2, mix_ngram=5, n_embd=2, n_hidden=2).eval()
    model.fit(NAMES.examples("train", 4))
    assert model.block_size == 4
    idx = NAMES.examples("dev", 4).contexts
    torch.testing.assert_close(model(idx)[0].exp().sum(-1), torch.ones(len(idx), dtype=torch.float64))


def test_a_table_names_the_mixture():
    assert (Config().label, replace(Config(), mix_ngram=6).label) == ("mlp", "mlp + 6-gram")
