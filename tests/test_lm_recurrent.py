"""The recurrent models and the bag of words, against torch's modules and a plain transcription, and their caches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import charlm
from charlm.lm.models import MODELS, BoW, build_model
from charlm.lm.models.recurrent import Cell, Recurrent
from charlm.lm.models.sequence import SequenceModel

V, T, D, H = 27, 8, 6, 10
TYPES = {"bow": {}, "rnn": {}, "gru": {"n_layer": 2}, "lstm": {"n_layer": 2}}
# The blocks of torch's weights among ours; the gates of its LSTM are i, f, g, o.
TORCH: dict[str, tuple[type[nn.RNNBase], tuple[int, ...]]] = {
    "rnn": (nn.RNN, (0,)),
    "gru": (nn.GRU, (0, 1, 2)),
    "lstm": (nn.LSTM, (0, 1, 3, 2)),
}


def build(type: str, **options: Any) -> SequenceModel:
    torch.manual_seed(0)
    model = build_model(type, vocab_size=V, block_size=T, n_embd=D, n_hidden=H, **{**TYPES[type], **options}).double()
    assert isinstance(model, SequenceModel)
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "start")):  # which begin as 0
            nn.init.normal_(parameter)
    return model.eval()


def plain(model: SequenceModel, idx: Tensor) -> Tensor:
    """The logits of every position, (B, t) → (B, t, V)."""
    x = model.embedding.weight[idx.long()]  # (B, t, D)
    if isinstance(model, BoW):
        t = idx.shape[1]
        x = x + model.position.weight[:t]
        weights = torch.ones(t, t).double().tril().log().softmax(-1)  # makemore's: a mean over the past
        x = x + weights @ x
        return model.head(x + model.contract(torch.tanh(model.expand(x))))
    kind, blocks = next(TORCH[type] for type in TORCH if isinstance(model, MODELS[type]))
    for layer in model.layers:
        torchs = kind(layer.input.in_features, H, batch_first=True, dtype=torch.float64)

        def arranged(weight: Tensor) -> Tensor:
            return torch.cat([weight.chunk(len(blocks))[block] for block in blocks])

        ours = {
            "weight_ih_l0": arranged(layer.input.weight),
            "weight_hh_l0": arranged(layer.recurrent.weight),
            "bias_ih_l0": arranged(layer.input.bias),
            "bias_hh_l0": torch.zeros(len(blocks) * H, dtype=torch.float64),
        }
        states = tuple(state.expand(1, len(idx), H).contiguous() for state in layer.start)
        x, _ = torch.func.functional_call(torchs, ours, (x, states if len(states) > 1 else states[0]))
    return model.head(x)


IGNORED_PLACES = {
    "ends of different lengths": [(0, slice(3, None)), (1, slice(5, None)), (3, slice(1, None))],
    "only the last target counts": [(2, slice(0, 4)), (2, slice(5, None)), (0, slice(2, None)), (4, slice(2, None))],
    "no row is whole": [(row, slice(4 - row % 2, None)) for row in range(5)],
    "a row without a target": [(1, slice(0, None)), (2, slice(4, None))],
    "nothing": [],
}


@pytest.mark.parametrize("places", IGNORED_PLACES.values(), ids=IGNORED_PLACES)
@pytest.mark.parametrize("type", TYPES)
def test_value_and_gradient_are_those_of_torchs_modules_and_of_makemores_bag_of_words(type, places):
    model = build(type)
    idx, targets = torch.randint(V, (5, 6)), torch.randint(V, (5, 6))
    for row, columns in places:
        targets[row, columns] = -100
    results = []
    for of in (
        lambda: nn.functional.cross_entropy(plain(model, idx).flatten(0, 1), targets.flatten()),
        lambda: model(idx, targets)[1],
        lambda: model.loss(idx, targets),
        lambda: model.loss(idx, targets, "none").sum() / (targets != -100).sum(),
    ):
        model.zero_grad()
        loss = of()
        loss.backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
    torch.testing.assert_close(model(idx)[0], plain(model, idx), rtol=1e-9, atol=1e-12)
    for expected, *ours in zip(*results, strict=True):
        for found in ours:
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
    losses = model.loss(idx, targets, "none")
    assert losses.shape == targets.shape
    assert not losses[targets == -100].any()


def test_a_row_is_computed_up_to_its_last_target(monkeypatch):
    model = build("lstm")
    idx, targets = torch.randint(V, (4, 6)), torch.randint(V, (4, 6))
    for row, end in enumerate((3, 6, 1, 3)):
        targets[row, end:] = -100
    targets[1, 1:5] = -100
    rows: list[int] = []
    step = model.cell.step
    monkeypatch.setattr(model.cell, "step", lambda self, x, *rest: (rows.append(len(x)), step(self, x, *rest))[1])
    heads: list[int] = []
    model.features = lambda *args, of=model.features: (found := of(*args), heads.append(len(found)))[0]
    model.loss(idx, targets)
    assert rows == 2 * [4, 3, 3, 1, 1, 1]  # two layers
    assert heads == [3 + 2 + 1 + 3]


@pytest.mark.parametrize("type", TYPES)
def test_no_position_sees_what_lies_behind_it_or_another_row(type):
    model, idx = build(type), torch.randint(V, (2, T))
    changed = idx.clone()
    changed[0, 5:] = (changed[0, 5:] + 1) % V
    before, after = model(idx)[0], model(changed)[0]
    torch.testing.assert_close(before[0, :5], after[0, :5])
    torch.testing.assert_close(before[1], after[1])
    assert ((before - after)[0, 5:].abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("type", TYPES)
def test_targets_of_one_dimension_are_those_behind_the_last_position(type):
    model, idx, targets = build(type), torch.randint(V, (4, T)), torch.randint(V, (4,))
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, model(idx)[0][:, -1])
    torch.testing.assert_close(model.loss(idx, targets), loss)
    assert model.loss(idx, targets, reduction="none").shape == (4,)


@pytest.mark.parametrize("type", TYPES)
def test_token_156_is_not_minus_100_where_targets_are_bytes(type):
    torch.manual_seed(0)
    model = build_model(type, vocab_size=200, block_size=T, n_embd=D, n_hidden=H)
    idx, targets = (torch.randint(200, (5, 6), dtype=torch.uint8) for _ in range(2))
    targets[:, 3:] = 156
    torch.testing.assert_close(model.loss(idx, targets), model(idx, targets.long())[1])
    torch.testing.assert_close(model.loss(idx, targets, "none"), model.loss(idx, targets.long(), "none"))


@pytest.mark.parametrize("prompt", [0, 1, 5, T - 1, T, T + 3])
@pytest.mark.parametrize("type", TYPES)
def test_generation_with_the_cache_is_generation_without(type, prompt, monkeypatch):
    model = build(type)
    widths: list[int] = []
    model.features = lambda idx, *args, of=model.features, **state: (
        widths.append(idx.shape[1]),
        of(idx, *args, **state),
    )[1]
    sequence, cache = torch.randint(V, (3, prompt)), {}
    for _ in range(2 * T):
        window = torch.cat([torch.full((3, 1), model.pad_token), sequence], dim=1)[:, -T:]
        torch.testing.assert_close(model.next_logits(sequence, cache), model(window)[0][:, -1])
        sequence = torch.cat([sequence, torch.randint(V, (3, 1))], dim=1)
    steps = widths[::2]  # of next_logits; the others are of the whole window
    inside = max(0, T - 1 - prompt)  # the tokens that extend a window that is not full
    assert steps == [min(prompt + 1, T), *[1] * inside, *[T] * (2 * T - 1 - inside)]


@pytest.mark.parametrize("type", TYPES)
def test_the_first_loss_is_about_log_v_and_the_embedding_is_charlms(type):
    torch.manual_seed(0)
    model = build_model(type, vocab_size=V, block_size=T, n_embd=64, n_hidden=128)
    assert isinstance(model.embedding, charlm.nn.Embedding)
    loss = model.loss(torch.randint(V, (64, T)), torch.randint(V, (64, T)))
    assert loss.item() == pytest.approx(math.log(V), abs=0.2)


@pytest.mark.parametrize("type", list(TORCH))
def test_the_start_is_learned_and_the_products_keep_the_norm(type):
    torch.manual_seed(0)
    model = build_model(type, vocab_size=V, block_size=T, n_embd=D, n_hidden=H, n_layer=2)
    assert isinstance(model, Recurrent)
    model.loss(torch.randint(V, (5, T)), torch.randint(V, (5, T))).backward()
    for layer in model.layers:
        assert isinstance(layer, Cell)
        assert layer.start.shape == (2 if type == "lstm" else 1, H)
        assert layer.start.grad.abs().min() > 0
        for gate in layer.recurrent.weight.chunk(layer.gates):
            torch.testing.assert_close(gate @ gate.T, torch.eye(H), rtol=0, atol=1e-5)


@pytest.mark.parametrize("type", TYPES)
def test_autocast_keeps_the_state_in_float32(type):
    model = build(type).float()
    idx, targets = torch.randint(V, (16, T)), torch.randint(V, (16, T))
    exact = model.loss(idx, targets)
    with torch.autocast("cpu", torch.bfloat16):
        assert model.features(idx, torch.arange(16 * T)).dtype == torch.float32
        rounded = model.loss(idx, targets)
    assert 0 < abs(rounded.item() - exact.item()) < 0.02
