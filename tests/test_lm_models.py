"""Count models against hand counts, the MLP against the textbook, and generation."""

from __future__ import annotations

import math
from collections import Counter
from itertools import pairwise

import pytest
import torch

import charlm
from charlm.lm.data import build_corpus
from charlm.lm.evaluate import CHUNK, Evaluation, baselines, evaluate
from charlm.lm.models import MLP, MODELS, Bigram, Unigram, build_model
from charlm.lm.models.base import sample_token

V, T = 27, 3


def mlp(**options) -> MLP:
    return MLP(V, T, n_embd=10, n_hidden=64, **options)


def batch(rows: int = 32, dtype: torch.dtype = torch.uint8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(V, (rows, T)).to(dtype), torch.randint(V, (rows,)).to(dtype)


# ---- the MLP


@pytest.mark.parametrize("batch_norm", [False, True])
def test_mlp_equals_the_textbook_in_value_and_gradient(batch_norm):
    idx, targets = batch()
    model = mlp(batch_norm=batch_norm).double()
    results = []
    for forward in (model, model.forward_textbook):
        model.zero_grad()
        logits, loss = forward(idx, targets)
        loss.backward()
        results.append([logits, loss, *(p.grad.clone() for p in model.parameters())])
    for ours, textbook in zip(*results, strict=True):
        torch.testing.assert_close(ours, textbook, rtol=1e-10, atol=1e-12)


def test_mlp_is_built_from_charlm_modules():
    modules = [type(module) for module in mlp().modules()]
    assert charlm.nn.Embedding in modules


def test_the_mlps_loss_skips_the_matmul_at_both_ends():
    model = mlp()
    node = model.loss(*batch()).grad_fn
    names = [node.name()]
    while node.next_functions and node.next_functions[0][0] is not None:
        node = node.next_functions[0][0]
        names.append(node.name())
    assert names[:2] == ["LinearCrossEntropyBackward", "EmbeddingLinearBackward"]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_the_mlps_loss_is_that_of_its_logits(batch_norm):
    idx, targets = batch()
    model = mlp(batch_norm=batch_norm)
    logits, expected = model(idx, targets)
    torch.testing.assert_close(model.loss(idx, targets), expected)
    losses = torch.nn.functional.cross_entropy(logits, targets.long(), reduction="none")
    torch.testing.assert_close(model.loss(idx, targets, reduction="none"), losses)


def test_mlp_has_the_lectures_number_of_parameters():
    model = MLP(27, 3, n_embd=10, n_hidden=200)
    assert sum(p.numel() for p in model.parameters()) == 11_897


@pytest.mark.parametrize("batch_norm", [False, True])
def test_first_loss_is_log_v_and_tanh_is_not_saturated(batch_norm):
    idx, targets = batch(4096)
    model = MLP(V, 8, n_embd=16, n_hidden=256, batch_norm=batch_norm)
    idx = torch.randint(V, (4096, 8))
    hidden = []
    model.dropout.register_forward_pre_hook(lambda module, arguments: hidden.append(arguments[0]))
    _, loss = model(idx, targets)
    assert loss.item() == pytest.approx(math.log(V), abs=0.01)
    assert 0.5 < hidden[0].std().item() < 0.8
    assert (hidden[0].abs() > 0.97).float().mean().item() < 0.25


def test_logits_without_targets_come_with_no_loss():
    logits, loss = mlp()(batch()[0])
    assert logits.shape == (32, V)
    assert loss is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int32, torch.int64])
def test_tokens_of_every_width_give_one_result(dtype):
    idx, targets = batch()
    model = mlp()
    wide, narrow = model(idx.long(), targets.long()), model(idx.to(dtype), targets.to(dtype))
    assert torch.equal(wide[0], narrow[0])
    assert torch.equal(wide[1], narrow[1])


# ---- counts

NAMES = "anna\nada\nbea\nbab\nnan\nabba\n" * 5


@pytest.mark.parametrize("add_k", [1.0, 0.01])
def test_bigram_and_unigram_are_the_smoothed_counts(add_k):
    corpus = build_corpus(NAMES)
    size = len(corpus.vocabulary)
    stoi = {"": 0, **corpus.vocabulary.stoi}
    pairs, singles = Counter(), Counter()
    for item in corpus.parts["train"]:
        tokens = [0, *(stoi[char] for char in item), 0]
        pairs.update(pairwise(tokens))
        singles.update(tokens[1:])
    examples = corpus.examples("train", 1)
    bigram, unigram = Bigram(size, add_k=add_k), Unigram(size, add_k=add_k)
    bigram.fit(examples)
    unigram.fit(examples)
    for a in range(size):
        row = sum(pairs[a, b] for b in range(size)) + add_k * size
        for b in range(size):
            assert bigram.log_probs[a, b].exp().item() == pytest.approx((pairs[a, b] + add_k) / row)
    total = singles.total() + add_k * size
    for b in range(size):
        assert unigram.log_probs[0, b].exp().item() == pytest.approx((singles[b] + add_k) / total)


@pytest.mark.parametrize("type", list(MODELS))
def test_every_models_losses_reduce_to_their_mean_and_their_sum(type):
    model = build_model(type, vocab_size=V, block_size=4, **SMALL.get(type, {})).eval()
    idx, targets = torch.randint(V, (6, 4)), torch.randint(V, (6,))
    losses = model.loss(idx, targets, reduction="none")
    assert losses.shape == (6,)
    torch.testing.assert_close(model.loss(idx, targets), losses.mean())
    torch.testing.assert_close(model.loss(idx, targets, reduction="sum"), losses.sum())


def test_uniform_costs_log_v_and_each_baseline_beats_the_one_before():
    corpus = build_corpus(NAMES)
    table = baselines(corpus, "dev")
    assert list(table) == ["uniform", "unigram", "bigram", "4-gram, Kneser–Ney"]
    assert table["uniform"].nats == pytest.approx(math.log(len(corpus.vocabulary)))
    losses = [row.nats for row in table.values()]
    assert losses == sorted(losses, reverse=True)


def test_without_smoothing_what_was_never_seen_is_impossible():
    corpus = build_corpus("ab\n" * 8 + "ba\n" * 2)
    model = Bigram(3, add_k=0.0)
    model.fit(corpus.examples("train", 1))
    assert (model.log_probs.exp().sum(dim=1) - 1).abs().max().item() < 1e-12
    assert model.log_probs[1, 1].item() == -math.inf


# ---- evaluation


def test_evaluation_is_exact_over_chunks_and_weighs_every_token_alike():
    corpus = build_corpus("".join(f"{'ab' * (i % 7 + 1)}\n" for i in range(3000)))
    model = MLP(3, 4, n_embd=2, n_hidden=8, batch_norm=True, dropout=0.5)
    examples = corpus.examples("train", 4)
    assert len(examples) > CHUNK
    assert len(examples) % CHUNK
    model.train()
    result = evaluate(model, examples, "train")
    assert model.training
    model.eval()
    logits, _ = model(examples.contexts)
    exact = torch.nn.functional.cross_entropy(logits.double(), examples.targets.long()).item()
    assert result.nats == pytest.approx(exact, rel=1e-7)
    assert result.tokens == len(examples)


def test_bits_and_perplexity_follow_from_nats():
    result = Evaluation("dev", "items", nats=2.0 * math.log(2), tokens=5)
    assert result.bits_per_char == pytest.approx(2.0)
    assert result.perplexity == pytest.approx(4.0)
    assert Evaluation("dev", "items", math.inf, 1).to_json() == {
        "split": "dev",
        "protocol": "items",
        "nats": None,
        "bits_per_char": None,
        "perplexity": None,
        "tokens": 1,
    }


# ---- generation

SMALL = {
    "mlp": {"n_embd": 4, "n_hidden": 8},
    "wavenet": {"n_embd": 4, "n_hidden": 8},
    "bow": {"n_embd": 4, "n_hidden": 8},
    "rnn": {"n_embd": 4, "n_hidden": 8},
    "gru": {"n_embd": 4, "n_hidden": 8, "n_layer": 2},
    "lstm": {"n_embd": 4, "n_hidden": 8, "n_layer": 2},
    "gpt": {"n_layer": 2, "n_head": 2, "n_embd": 8},
}


@pytest.mark.parametrize("type", list(MODELS))
def test_every_model_generates_from_contexts_of_any_length(type):
    model = build_model(type, vocab_size=V, block_size=4, **SMALL.get(type, {}))
    for length in (0, 1, 4, 8):
        idx = torch.randint(V, (5, length), dtype=torch.uint8)
        out = model.generate(idx, 6)
        assert out.shape == (5, length + 6)
        assert torch.equal(out[:, :length], idx.long())
        assert set(out.flatten().tolist()) <= set(range(V))


def test_generation_repeats_with_its_generator_and_ignores_the_global_one():
    model, idx = mlp(), torch.zeros(4, 0, dtype=torch.int64)
    first = model.generate(idx, 20, generator=torch.Generator().manual_seed(3))
    torch.manual_seed(99)
    assert torch.equal(first, model.generate(idx, 20, generator=torch.Generator().manual_seed(3)))


def test_generation_stops_row_by_row_and_leaves_the_mode_alone():
    model = mlp(dropout=0.5)
    out = model.generate(torch.zeros(64, 0, dtype=torch.int64), 500, stop_token=0)
    assert model.training
    assert out.shape[1] < 500
    for row in out.tolist():
        stop = row.index(0)
        assert set(row[stop:]) == {0}


def test_temperature_zero_and_top_k_one_take_the_most_probable():
    logits = torch.randn(50, V)
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(sample_token(logits, 0.0, None, None, generator), logits.argmax(-1))
    assert torch.equal(sample_token(logits, 1.0, 1, None, generator), logits.argmax(-1))
    for temperature in (1e-6, 1e-320):
        assert torch.equal(sample_token(logits, temperature, None, None, generator), logits.argmax(-1))
    assert torch.equal(sample_token(logits, 1.0, None, 1e-6, generator), logits.argmax(-1))


def test_top_k_above_the_vocabulary_means_all():
    logits = torch.randn(50, V)
    draws = [sample_token(logits, 1.0, k, None, torch.Generator().manual_seed(0)) for k in (None, V, 10 * V)]
    assert torch.equal(draws[0], draws[1])
    assert torch.equal(draws[0], draws[2])


def test_top_p_keeps_the_smallest_set_that_reaches_it():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(4000, 4)
    for p, allowed in ((0.5, {0}), (0.51, {0, 1}), (0.79, {0, 1}), (0.9, {0, 1, 2}), (1.0, {0, 1, 2, 3})):
        draws = sample_token(logits, 1.0, None, p, torch.Generator().manual_seed(0))
        assert set(draws.tolist()) == allowed


def test_draws_follow_the_distribution():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4])
    draws = sample_token(p.log().expand(20_000, 4), 1.0, None, None, torch.Generator().manual_seed(0))
    torch.testing.assert_close(draws.bincount() / 20_000, p, atol=0.015, rtol=0)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"temperature": math.inf}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}]
)
def test_options_without_a_distribution_are_refused(options):
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is"):
        mlp().generate(torch.zeros(1, 0, dtype=torch.int64), 1, **options)
