"""The mixture of a network and an n-gram: formula, training, checkpoint and invalid options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from lm_support import StopAt

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.character_model import CharacterModel
from charlm.lm.config import Config
from charlm.lm.data import build_corpus, read_corpus
from charlm.lm.evaluate import evaluate, predictions
from charlm.lm.examples import IGNORED, in_windows
from charlm.lm.models import Mixture, build_model
from charlm.lm.train import Trainer

NAMES = build_corpus("\n".join(["emma", "olivia", "ava", "isabella", "sophia", "mia", "emily"] * 20))
TEXT = build_corpus("the quick brown fox jumps over the lazy dog. " * 60, format="text")
# 201 tokens, among them 156: -100 as a number of one byte.
BYTES = build_corpus("".join(map(chr, range(0x100, 0x1C8))) * 12, format="text")
ORDER, T = 4, 6
NETWORKS = {
    "mlp": {"n_embd": 4, "n_hidden": 8},
    "wavenet": {"n_embd": 4, "n_hidden": 8, "block_size": 8},
    "gpt": {"n_layer": 2, "n_head": 2, "n_embd": 8},
}


def mixture(type: str, corpus) -> Mixture:
    vocabulary = corpus.vocabulary
    options = {"block_size": T, **NETWORKS[type]}
    model = build_model(
        type, vocab_size=len(vocabulary), pad_token=vocabulary.pad_token, mix_ngram=ORDER, **options
    ).eval()
    model.fit(corpus.examples("train", ORDER - 1))
    return model


@pytest.mark.parametrize("corpus", [NAMES, TEXT, BYTES], ids=["line", "text", "bytes"])
@pytest.mark.parametrize("type", list(NETWORKS))
def test_a_prediction_is_half_of_each(type, corpus):
    """Compares a whole split with the two models evaluated separately."""
    model = mixture(type, corpus)
    idx, targets = next(predictions(model, corpus, "dev").chunks(10_000))
    logits = model.network(idx)[0].detach()
    seen = corpus.examples("dev", model.block_size)
    if model.predicts_every_position:
        logits = logits[targets != IGNORED]
        if corpus.format == "text":  # no window sees what lies before it
            seen = in_windows(seen)
    contexts, wanted = seen.contexts[:, -(ORDER - 1) :], seen.targets
    p = (logits.double().softmax(-1) + model.ngram(contexts)[0].exp()) / 2  # (tokens, V)
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
def test_it_is_no_worse_than_the_mean_of_the_two(type):
    """Jensen: -log((a + b) / 2) ≤ (-log a - log b) / 2."""
    model = mixture(type, NAMES)
    losses = [evaluate(m, predictions(m, NAMES, "dev"), "dev").nats for m in (model, model.network, model.ngram)]
    assert losses[0] < (losses[1] + losses[2]) / 2


@pytest.mark.parametrize("type", list(NETWORKS))
@pytest.mark.parametrize("length", [0, 1, 3, 9])
def test_the_next_tokens_probabilities_are_those_of_both(type, length):
    model = mixture(type, NAMES)
    sequence = torch.randint(len(NAMES.vocabulary), (4, length))
    with torch.no_grad():
        p = model.next_logits(sequence, {}).exp()
        network, ngram = (m.next_logits(sequence, {}).double().softmax(-1) for m in (model.network, model.ngram))
    torch.testing.assert_close(p, (network + ngram) / 2)


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


@pytest.mark.timeout(300)
def test_on_the_shipped_names_it_beats_both(tmp_path):
    corpus = read_corpus(None)
    run = {"max_steps": 300, "n_hidden": 128, "learning_rate": 1e-2, "warmup_steps": 20, "eval_interval": 300}
    trainer = Trainer(Config(**run, mix_ngram=5, format="line"), corpus, tmp_path)
    trainer.run()
    model = trainer.model
    mixed, network, ngram = (
        evaluate(m, predictions(m, corpus, "dev"), "dev").nats for m in (model, model.network, model.ngram)
    )
    assert mixed < min(network, ngram) - 0.01


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mix_ngram": -1}, "mix_ngram is -1, but must be at least 0"),
        ({"mix_ngram": 8, "block_size": 6}, "mix_ngram is 8, but must be at most 7 for a block_size of 6"),
        ({"mix_ngram": 3, "type": "bigram"}, "mix_ngram is 3, but must be 0 for type bigram, which counts"),
        ({"mix_ngram": 3, "type": "ngram"}, "mix_ngram is 3, but must be 0 for type ngram, which counts"),
    ],
)
def test_a_mixture_that_cannot_be_is_a_user_error(given, words):
    with pytest.raises(UserError, match=words):
        Config(**given)


def test_an_order_beyond_the_window_is_a_value_error():
    with pytest.raises(ValueError, match="order is 8, but must be at least 1 and at most 7"):
        build_model("mlp", vocab_size=5, block_size=6, mix_ngram=8, n_embd=2, n_hidden=2)


def test_a_table_names_the_mixture():
    assert (Config().label, replace(Config(), mix_ngram=6).label) == ("mlp", "mlp + 6-gram")
