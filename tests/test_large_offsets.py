"""Rows whose elements lie more than 2^31 elements apart: nothing of an address is computed in 32 bits.

The tensors are strided views into memory that is reserved and never touched, so that they cost pages, not gigabytes.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from charlm import functional

ROWS, GAP = 3, 2**30 + 16


def far_rows(n: int) -> torch.Tensor:
    """[ROWS, n], a row every GAP floats."""
    try:
        memory = torch.empty((ROWS - 1) * GAP + n)
    except RuntimeError:
        pytest.skip(f"the system does not reserve {(ROWS - 1) * GAP * 4 / 2**30:.0f} GiB of address space")
    return memory.as_strided((ROWS, n), (GAP, 1)).copy_(torch.randn(ROWS, n))


@pytest.mark.parametrize("n_classes", [27, 300, 20011])
def test_logits_may_lie_more_than_two_to_the_31_elements_apart(n_classes: int, isa: str) -> None:
    logits, target = far_rows(n_classes), torch.tensor([1, 0, 26])
    near = logits.clone(memory_format=torch.contiguous_format).requires_grad_()
    expected = F.cross_entropy(near, target, label_smoothing=0.1)
    expected.backward()
    loss = functional.cross_entropy(logits.requires_grad_(), target, label_smoothing=0.1)
    (gradient,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient, near.grad)


@pytest.mark.parametrize("n_classes", [27, 300])
def test_the_gradient_may_be_written_over_such_logits(n_classes: int, isa: str) -> None:
    logits, target = far_rows(n_classes), torch.tensor([1, 0, 26])
    near = logits.clone(memory_format=torch.contiguous_format).requires_grad_()
    F.cross_entropy(near, target).backward()
    options = (1, -100, 0.0, 0.0, 0.0, 1.0, False)
    with torch._C._AutoDispatchBelowAutograd():  # which writes only for logits that require grad
        torch.ops.charlm.cross_entropy_inplace_forward(logits, target, None, None, *options)
    torch.testing.assert_close(logits, near.grad)


@pytest.mark.parametrize("embedding_dim", [10, 1000])
def test_a_weight_may_have_rows_more_than_two_to_the_31_elements_apart(embedding_dim: int, isa: str) -> None:
    weight, index = far_rows(embedding_dim), torch.tensor([2, 0, 2, 1])
    assert torch.equal(functional.embedding(index, weight), F.embedding(index, weight))
