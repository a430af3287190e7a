"""An unmodified GPT-2 of Hugging Face with random weights trains with our kernels as with torch's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import GPT2Config, GPT2LMHeadModel

import charlm

VOCAB_SIZE, N_STEPS = 65, 20


def _train(prepare: Callable[[GPT2LMHeadModel], object] = lambda model: None) -> list[float]:
    """The losses of N_STEPS steps on one seed, in nats."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCAB_SIZE,
        n_positions=32,
        n_embd=32,
        n_layer=2,
        n_head=2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = GPT2LMHeadModel(config)
    prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(N_STEPS):
        tokens = torch.randint(VOCAB_SIZE // 4, (4, 32))
        labels = tokens.masked_fill(torch.rand(4, 32) < 0.1, -100)
        optimizer.zero_grad()
        loss = model(input_ids=tokens, labels=labels).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


class _CountOps(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.counts[str(func)] = self.counts.get(str(func), 0) + 1
        return func(*args, **(kwargs or {}))


def test_under_patch_torch_the_losses_are_those_without_and_our_kernels_ran() -> None:
    expected = _train()
    with charlm.patch_torch(), _CountOps() as ops:
        losses = _train()
    assert losses == pytest.approx(expected, abs=1e-4)
    assert losses[-1] < losses[0]
    assert ops.counts["charlm.cross_entropy.default"] == N_STEPS
    assert ops.counts["charlm._cross_entropy_backward.default"] == N_STEPS
    assert ops.counts["charlm.embedding.default"] == 2 * N_STEPS  # tokens and positions
    assert ops.counts["charlm._embedding_backward.default"] == 2 * N_STEPS
    assert not [op for op in ops.counts if "nll_loss" in op or "_log_softmax" in op or "aten.embedding" in op]


def test_as_a_patched_model_the_losses_are_those_without() -> None:
    expected = _train()
    with _CountOps() as ops:
        losses = _train(charlm.patch_model)
    assert losses == pytest.approx(expected, abs=1e-4)
    assert ops.counts["charlm.embedding.default"] == 2 * N_STEPS
