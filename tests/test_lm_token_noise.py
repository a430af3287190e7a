"""Unigram noising replaces the right share of the input tokens, by their frequencies."""

from __future__ import annotations

import pytest
import torch

from charlm.lm.config import Config
from charlm.lm.data import build_corpus, read_text
from charlm.lm.evaluate import evaluate
from charlm.lm.models.dropout import sample_keys
from charlm.lm.parallel import SharedLoss
from charlm.lm.token_noise import TokenNoise
from charlm.lm.train import Trainer

CORPUS = build_corpus("\n".join(read_text(None).split("\n")[:400]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32])
def test_a_share_of_the_tokens_becomes_others_as_frequent_as_they_are(dtype):
    tokens = torch.tensor([0, 0, 0, 1, 1, 3], dtype=dtype)
    noise = TokenNoise(0.3, tokens.split(7), vocab_size=5)
    for token, expected in ((4, [0.15, 0.1, 0.0, 0.05, 0.7]), (0, [0.85, 0.1, 0.0, 0.05, 0.0])):  # 0 may be drawn too
        noised = noise(torch.full((200, 500), token, dtype=dtype), sample_keys(1, 2, range(200)))
        assert noised.dtype == dtype
        shares = torch.bincount(noised.flatten(), minlength=5) / noised.numel()
        torch.testing.assert_close(shares, torch.tensor(expected), atol=0.01, rtol=0)


def test_targets_stay(tmp_path):
    config = Config(block_size=3, n_embd=4, n_hidden=16, batch_size=64)
    seen = []

    def loss_of(idx, targets, keys):
        seen.append((idx, targets))
        return torch.zeros((), requires_grad=True)

    for noise in (None, TokenNoise(0.5, [CORPUS.examples("train", 1).targets], len(CORPUS.vocabulary))):
        trainer = Trainer(config, CORPUS, tmp_path)
        trainer._backward(SharedLoss(trainer.model, loss_of, trainer.processes), CORPUS.examples("train", 3), noise)
    (idx, targets), (noised, the_same) = seen
    assert torch.equal(targets, the_same)
    assert 0.2 < (idx != noised).float().mean() < 0.6


def test_it_is_part_of_training_and_not_of_what_is_reported(tmp_path):
    config = Config(block_size=3, n_embd=4, n_hidden=16, max_steps=20, batch_size=16, dropout=0.0)
    runs = {}
    for share in (0.0, 0.5):
        trainer = Trainer(Config(**{**config.to_dict(), "token_noise": share}), CORPUS, tmp_path / str(share))
        trainer.run()
        runs[share] = trainer
        exact = evaluate(trainer.model, CORPUS.examples("dev", 3), "dev")
        assert exact.nats == trainer.best_nats
    assert runs[0.0].best_nats != runs[0.5].best_nats
