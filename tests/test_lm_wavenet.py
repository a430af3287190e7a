"""The WaveNet against makemore's transcription."""

from __future__ import annotations

import pytest
import torch

from charlm.lm.models import WaveNet

V, T = 27, 8


def plain(model: WaveNet, idx: torch.Tensor) -> torch.Tensor:
    """Embedding, then flatten two neighbours, linear, norm, tanh, as often as it takes; (B, T) → (B, V)."""
    x = model.embedding.weight[idx.long()]  # (B, T, D)
    for layer, norm in zip(model.layers, model.norms, strict=True):
        b, t, c = x.shape
        x = layer(x.reshape(b, t // 2, 2 * c))
        x = torch.tanh(norm(x.transpose(1, 2)).transpose(1, 2))  # the norm is over batch and positions
    return model.head(x.squeeze(1))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("block_size", [2, 8])
def test_wavenet_equals_a_plain_transcription_in_value_and_gradient(training, block_size):
    model = WaveNet(V, block_size, n_embd=5, n_hidden=11).double().train(training)
    idx, targets = torch.randint(V, (32, block_size)).to(torch.uint8), torch.randint(V, (32,))
    results = []
    for logits in (model(idx)[0], plain(model, idx)):
        model.zero_grad()
        torch.nn.functional.cross_entropy(logits, targets).backward()
        results.append([logits, *(p.grad.clone() for p in model.parameters())])
    model.zero_grad()
    model.loss(idx, targets).backward()
    results.append([model(idx)[0], *(p.grad.clone() for p in model.parameters())])
    for ours, expected, fused in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(fused, expected, rtol=1e-9, atol=1e-12)


def test_wavenet_has_the_lectures_number_of_parameters():
    model = WaveNet(V, T, n_embd=24, n_hidden=128)
    assert sum(p.numel() for p in model.parameters()) == 76_579


def test_the_first_layer_skips_its_matmul():
    model = WaveNet(V, T, n_embd=5, n_hidden=11)
    node = model.loss(torch.randint(V, (16, T)), torch.randint(V, (16,))).grad_fn
    names = set()
    while node is not None:
        names.add(node.name())
        node = next((n for n, _ in node.next_functions if n is not None and "Accumulate" not in n.name()), None)
    assert {"LinearCrossEntropyBackward", "EmbeddingLinearBackward"} <= names


@pytest.mark.parametrize("block_size", [0, 1, 3, 12])
def test_a_context_that_is_no_power_of_two_is_refused(block_size):
    with pytest.raises(ValueError, match=f"block_size is {block_size}, but must be a power of two"):
        WaveNet(V, block_size, n_embd=5, n_hidden=11)
