"""More rows than a CUDA launch has blocks, on any backend: the blocks, or two CPU threads, loop over all rows."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F

from charlm import functional

CUDA_BLOCKS = 8192  # kMaxBlocks of csrc/cuda/cuda.cuh
ROWS_OF_A_TILE = 256  # at most 8 classes


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    found = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(found)


@pytest.mark.parametrize(("n_rows", "n_classes"), [(CUDA_BLOCKS * ROWS_OF_A_TILE + 3, 1), (CUDA_BLOCKS + 70, 300)])
def test_losses_and_gradients_of_all_rows_are_torchs(n_rows: int, n_classes: int) -> None:
    logits, target = torch.randn(n_rows, n_classes), torch.randint(n_classes, (n_rows,))
    results = []
    for cross_entropy in (functional.cross_entropy, F.cross_entropy):
        for reduction in ("mean", "none"):
            x = logits.clone().requires_grad_()
            loss = cross_entropy(x, target, reduction=reduction)
            loss.backward(torch.ones_like(loss))
            results.append((loss.detach(), x.grad))
    torch.testing.assert_close(results[:2], results[2:], rtol=2e-6, atol=2e-6)


def test_all_rows_are_looked_up() -> None:
    index, weight = torch.randint(5, (CUDA_BLOCKS * 8 + 500,)), torch.randn(5, 33)
    assert torch.equal(functional.embedding(index, weight), weight[index])


# More than two batches of the blocks that sum narrow rows, and more than one step of those that sort.
@pytest.mark.parametrize(("n_rows", "n_embeddings"), [(2 * 132 * 2048 + 70000, 5), (256 * 2048 + 3, 300)])
def test_the_gradients_of_all_rows_are_summed(n_rows: int, n_embeddings: int) -> None:
    index, grad = torch.randint(n_embeddings, (n_rows,)), torch.randint(-8, 8, (n_rows, 1)).float()
    exact = torch.zeros(n_embeddings, 1).index_add_(0, index, grad)
    assert torch.equal(torch.ops.charlm._embedding_backward(grad, index, n_embeddings, -1, False), exact)
