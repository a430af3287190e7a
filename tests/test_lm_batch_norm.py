"""Batch normalization of a batch that processes share is that of the whole batch in one process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from distributed_support import results_of_processes
from torch import Tensor

from charlm.lm.models.batch_norm import BatchNorm

ROWS = [5, 1, 3]  # of each process
H = 7


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, sum(ROWS), H, generator=generator, dtype=torch.float64) * 3 + 2
    return x, torch.randn(3, sum(ROWS), H, generator=generator, dtype=torch.float64)


def run(norm: torch.nn.BatchNorm1d, x: Tensor, weights: Tensor) -> list[Tensor]:
    """Output and gradients of three batches, then the buffers; `weights` are those of a loss."""
    norm.double().train()
    found = []
    for batch, weight in zip(x, weights, strict=True):
        batch = batch.clone().requires_grad_()
        y = norm(batch)
        norm.zero_grad()
        (y.sin() * weight).sum().backward()
        found += [y.detach(), batch.grad, norm.weight.grad, norm.bias.grad]
    return [tensor for tensor in [*found, *norm.buffers()] if tensor is not None]


def share(rank_offsets: list[int]) -> list[Tensor]:
    rank = torch.distributed.get_rank()
    norm = BatchNorm(H)
    norm.is_shared = True
    x, weights = batch()
    rows = slice(rank_offsets[rank], rank_offsets[rank + 1])
    return run(norm, x[:, rows], weights[:, rows])


@pytest.mark.exhaustive
def test_a_shared_batch_is_normalized_as_a_whole(tmp_path: Path) -> None:
    expected = run(torch.nn.BatchNorm1d(H), *batch())
    shares = results_of_processes(3, tmp_path / "group", share, [0, 5, 6, 9])
    for i, tensor in enumerate(expected):
        parts = [found[i] for found in shares]
        if tensor.shape == (sum(ROWS), H):
            actual = torch.cat(parts)
        elif i < 12:  # gradients of weight and bias, which DDP adds
            actual = torch.stack(parts).sum(0)
        else:
            actual = parts[0]
            assert all(torch.equal(actual, part) for part in parts)
        torch.testing.assert_close(actual, tensor, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_in_one_process_it_is_torchs_bit_for_bit(training: bool) -> None:
    x, weights = batch()
    ours, torchs = BatchNorm(H).train(training), torch.nn.BatchNorm1d(H).train(training)
    assert ours.state_dict().keys() == torchs.state_dict().keys()
    for actual, expected in zip(run(ours, x, weights), run(torchs, x, weights), strict=True):
        assert torch.equal(actual, expected)
