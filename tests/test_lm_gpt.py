"""The GPT against a plain transcription, and its cache."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import charlm
from charlm.lm.models import GPT
from charlm.lm.models.gpt import Packed

V, T = 27, 8


def gpt(**options) -> GPT:
    torch.manual_seed(0)
    return GPT(V, T, n_layer=3, n_head=2, n_embd=12, **options).eval()


def plain(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """nanoGPT's forward with attention written out, (B, t) → (B, t, V)."""
    t = idx.shape[1]
    x = (
        nn.functional.one_hot(idx.long(), V).to(model.position.weight) @ model.embedding.weight
        + model.position.weight[:t]
    )
    for block in model.blocks:
        q, k, v = block.attention.qkv(block.norm_1(x)).chunk(3, dim=-1)
        heads = []
        for q_h, k_h, v_h in zip(*(part.chunk(2, dim=-1) for part in (q, k, v)), strict=True):
            scores = q_h @ k_h.transpose(1, 2) / math.sqrt(q_h.shape[-1])
            scores = scores.masked_fill(torch.ones(t, t).triu(1).bool(), -math.inf)
            heads.append(scores.softmax(-1) @ v_h)
        x = x + block.attention.proj(torch.cat(heads, dim=-1))
        x = x + block.contract(nn.functional.gelu(block.expand(block.norm_2(x))))
    return model.norm(x) @ model.embedding.weight.T


def test_gpt_equals_a_plain_transcription_in_value_and_gradient():
    model = gpt().double()
    idx, targets = torch.randint(V, (5, 6)), torch.randint(V, (5, 6))
    targets[0, 3:] = -100
    results = []
    for logits in (model(idx)[0], plain(model, idx)):
        model.zero_grad()
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    model.zero_grad()
    model.loss(idx, targets).backward()
    results.append([model(idx, targets)[0], *(p.grad.clone() for p in model.parameters())])
    for ours, expected, fused in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-12)


IGNORED_PLACES = {
    "ends of different lengths": [(0, slice(3, None)), (1, slice(5, None)), (3, slice(1, None))],
    "only the last target counts": [(2, slice(0, 4)), (2, slice(5, None)), (0, slice(2, None)), (4, slice(2, None))],
    "a row without a target": [(1, slice(0, None)), (2, slice(4, None))],
    "nothing": [],
}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("places", IGNORED_PLACES.values(), ids=IGNORED_PLACES)
def test_positions_behind_a_rows_last_target_may_be_left_out(places, reduction, monkeypatch):
    model = gpt().double()
    idx, targets = torch.randint(V, (5, 6)), torch.randint(V, (5, 6))
    for row, columns in places:
        targets[row, columns] = -100
    computed = []
    model.norm.register_forward_hook(lambda module, given, x: computed.append(x.shape[:-1].numel()))
    results = []
    for _ in range(2):
        model.zero_grad()
        loss = model.loss(idx, targets, reduction)
        loss.sum().backward()
        results.append([loss, *(p.grad.clone() for p in model.parameters())])
        monkeypatch.setattr(Packed, "of", lambda at, B, t: Packed(None, (B, t)))
    for packed, whole in zip(*results, strict=True):
        torch.testing.assert_close(packed, whole, rtol=1e-9, atol=1e-12)
    last = [max((i for i, t in enumerate(row) if t != -100), default=-1) for row in targets.tolist()]
    assert computed == [sum(i + 1 for i in last), 30]


def test_token_156_is_not_minus_100_where_targets_are_bytes():
    torch.manual_seed(0)
    model = GPT(200, T, n_layer=1, n_head=2, n_embd=12)
    idx, targets = (torch.randint(200, (5, 6), dtype=torch.uint8) for _ in range(2))
    targets[:, 3:] = 156
    torch.testing.assert_close(model.loss(idx, targets), model(idx, targets.long())[1])
    torch.testing.assert_close(model.loss(idx, targets, "none"), model.loss(idx, targets.long(), "none"))


def test_no_position_sees_what_lies_behind_it():
    model, idx = gpt(), torch.randint(V, (2, T))
    changed = idx.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % V
    assert torch.equal(model(idx)[0][:, :5], model(changed)[0][:, :5])
    assert not torch.allclose(model(idx)[0][:, 5:], model(changed)[0][:, 5:])


def test_targets_of_one_dimension_are_those_behind_the_last_position():
    model, idx, targets = gpt(), torch.randint(V, (4, T)), torch.randint(V, (4,))
    logits, loss = model(idx, targets)
    torch.testing.assert_close(logits, model(idx)[0][:, -1])
    torch.testing.assert_close(model.loss(idx, targets), loss)
    assert model.loss(idx, targets, reduction="none").shape == (4,)


@pytest.mark.parametrize("prompt", [0, 1, 5, T - 1, T, T + 3])
def test_generation_with_the_cache_is_generation_without(prompt):
    model = gpt().double()
    idx = torch.randint(V, (3, prompt))
    sequence, cache = idx, {}
    for _ in range(2 * T):
        start = torch.full((3, 1), model.pad_token)
        window = torch.cat([start, sequence], dim=1)[:, -T:]
        torch.testing.assert_close(model.next_logits(sequence, cache), model(window)[0][:, -1])
        sequence = torch.cat([sequence, torch.randint(V, (3, 1))], dim=1)


def test_head_and_embedding_are_one_matrix_and_the_embedding_is_charlms():
    model = gpt()
    assert isinstance(model.embedding, charlm.nn.Embedding)
    assert sum(p.numel() for p in model.parameters()) == (V + T) * 12 + 3 * (12 * 12**2 + 2 * 12) + 12


def test_first_loss_is_log_v():
    model = GPT(V, T, n_layer=2, n_head=4, n_embd=64)
    assert model.loss(torch.randint(V, (64, T)), torch.randint(V, (64, T))).item() == pytest.approx(
        math.log(V), abs=0.05
    )


def test_heads_must_divide_the_width():
    with pytest.raises(ValueError, match="n_head is 5, but must divide n_embd, which is 12"):
        GPT(V, T, n_layer=1, n_head=5, n_embd=12)
