"""Dropout from keys: its distribution, and that it depends on seed, step, sample and place alone."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
import torch
from torch import Tensor

from charlm.lm.models import build_model
from charlm.lm.models.dropout import Dropout, keyed_dropout, random_bits, sample_keys

B, N = 512, 256
NETWORKS = {
    "mlp": {"block_size": 8, "n_embd": 6, "n_hidden": 20},
    "wavenet": {"block_size": 8, "n_embd": 6, "n_hidden": 20},
    "bow": {"block_size": 8, "n_embd": 6, "n_hidden": 20},
    "rnn": {"block_size": 8, "n_embd": 6, "n_hidden": 20},
    "gru": {"block_size": 8, "n_embd": 6, "n_hidden": 20, "n_layer": 2},
    "lstm": {"block_size": 8, "n_embd": 6, "n_hidden": 20, "n_layer": 2},
    "gpt": {"block_size": 8, "n_embd": 8, "n_head": 2, "n_layer": 2},
}


def mask(p: float = 0.5, *, seed: int = 1, step: int = 1, layer: int = 0, first: int = 0) -> Tensor:
    """Which of (B, N) units are kept, as -1 and 1."""
    x = Dropout(p, layer)(torch.ones(B, N), sample_keys(seed, step, range(first, first + B)))
    return (x != 0).float() * 2 - 1


@pytest.mark.parametrize("p", [2**-16, 0.01, 0.1, 0.15, 0.5, 0.9])
def test_the_share_of_dropped_units_and_the_mean_are_right(p: float) -> None:
    x = keyed_dropout(torch.ones(4 * B, N, dtype=torch.float64), p, sample_keys(3, 4, range(4 * B)))
    count = x.numel()
    deviation = math.sqrt(p * (1 - p) / count)
    assert abs((x == 0).double().mean().item() - p) < 5 * deviation
    assert abs(x.mean().item() - 1) < 5 * deviation / (1 - p)
    kept = round((1 - p) * 65536) / 65536
    assert set(x.unique().tolist()) == {0.0, 1 / kept}


def test_a_probability_below_the_resolution_still_drops_little() -> None:
    x = keyed_dropout(torch.ones(B, N), 1e-9, sample_keys(3, 4, range(B)))
    assert 0.999 < (x != 0).float().mean() < 1 + 1e-9


def test_masks_of_other_seeds_steps_layers_and_samples_are_independent() -> None:
    masks = [mask(), mask(seed=2), mask(step=2), mask(layer=1), mask(layer=2), mask(first=B)]
    for a, b in combinations(masks, 2):
        assert abs((a * b).mean().item()) < 5 / math.sqrt(B * N)


def test_units_samples_and_neighbours_in_the_same_number_are_independent() -> None:
    x = mask()
    for shift in (1, 2, 3, 4, 5, 16, 64):
        assert abs((x[:, shift:] * x[:, :-shift]).mean().item()) < 5 / math.sqrt(B * (N - shift))
        assert abs((x[shift:] * x[:-shift]).mean().item()) < 5 / math.sqrt((B - shift) * N)
    for rows, count in ((x, N), (x.T, B)):  # the sums of rows and columns are binomial
        z = rows.sum(dim=1) / math.sqrt(count)
        assert abs(z.square().mean().item() - 1) < 5 * math.sqrt(2 / len(z))


def test_every_bit_is_set_half_of_the_time_and_no_two_bits_agree_too_often() -> None:
    bits = random_bits(sample_keys(5, 6, range(256)), 64).flatten()[:, None] >> torch.arange(64) & 1  # (16384, 64)
    signs = bits.double() * 2 - 1
    agreement = signs.T @ signs / len(signs) - torch.eye(64, dtype=torch.float64)
    assert signs.mean(dim=0).abs().max() < 5 / math.sqrt(len(signs))
    assert agreement.abs().max() < 6 / math.sqrt(len(signs))


def test_numbers_of_a_large_run_do_not_repeat() -> None:
    numbers = torch.cat([random_bits(sample_keys(1, step, range(512)), 64).flatten() for step in range(32)])
    assert len(numbers.unique()) == len(numbers)


@pytest.mark.parametrize("type", NETWORKS)
def test_the_loss_of_a_sample_does_not_depend_on_the_samples_beside_it(type: str) -> None:
    torch.manual_seed(0)
    model = build_model(type, vocab_size=27, pad_token=0, dropout=0.4, **NETWORKS[type]).double().train()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm1d):
            module.eval()
    every = model.predicts_every_position
    idx, targets = torch.randint(27, (12, 8)), torch.randint(27, (12, 8) if every else (12,))
    if every:
        targets[:, 6:] = -100
        targets[4:8, 3:] = -100
    keys = sample_keys(1, 2, range(12))
    whole = model.loss(idx, targets, "none", keys)
    assert torch.equal(whole, model.loss(idx, targets, "none", keys))
    assert not torch.allclose(whole, model.loss(idx, targets, "none", sample_keys(1, 3, range(12))))
    rows = slice(4, 8)
    width = 3 if every else 8  # a batch is cropped to its longest row
    part = model.loss(idx[rows, :width], targets[rows, :width] if every else targets[rows], "none", keys[rows])
    torch.testing.assert_close(part, whole[rows, :width] if every else whole[rows], rtol=1e-10, atol=1e-12)


def test_attention_with_keys_and_a_vanishing_dropout_is_attention_without() -> None:
    torch.manual_seed(0)
    model = build_model("gpt", vocab_size=27, pad_token=0, dropout=1e-9, **NETWORKS["gpt"]).double().train()
    idx, targets = torch.randint(27, (4, 8)), torch.randint(27, (4, 8))
    keyed = model.loss(idx, targets, "none", sample_keys(1, 2, range(4)))
    close = (keyed - model.eval().loss(idx, targets, "none")).abs() < 1e-2
    assert close.double().mean() > 0.9
