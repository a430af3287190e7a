"""cross_entropy of at most 256 classes on a GPU: each kernel, layout and number of lanes gives what float64 gives."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from charlm import functional

# Both sides of each border: lanes that share a row, numbers in each, rows of whole packs, even and odd lengths.
VOCABULARIES = (1, 2, 4, 8, 26, 27, 28, 32, 33, 34, 50, 53, 54, 55, 64, 65, 66, 100, 105, 106, 128, 129, 130, 209, 255)
LAYOUTS = ("contiguous", "padded", "padded_to_packs", "misaligned")
N = 101  # chunks of 32 rows and a last one that has no whole packs
OPTIONS = {
    "plain": {},
    "factors": {"label_smoothing": 0.1, "lse_square_scale": 0.01, "logit_scale": 0.5},
    "weight": {"reduction": "sum"},
}


def laid_out(x: Tensor, layout: str) -> Tensor:
    n, v = x.shape
    if layout == "misaligned":
        storage = torch.empty(n * v + 1, dtype=x.dtype)[1:]
        return storage.view(n, v).copy_(x)
    columns = {"contiguous": v, "padded": v + 3, "padded_to_packs": -(-v // 8) * 8 + 8}[layout]
    return torch.zeros(n, columns, dtype=x.dtype)[:, :v].copy_(x)


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("vocab_size", VOCABULARIES)
def test_small_vocabularies_give_what_float64_gives(
    vocab_size: int, layout: str, options: str, dtype: torch.dtype, isa: str
) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    x = (torch.randn(N, vocab_size, generator=generator) * 3).to(dtype)
    target = torch.randint(vocab_size, (N,), generator=generator)
    target[::7] = -100
    arguments = dict(OPTIONS[options])
    weight = torch.rand(vocab_size, generator=generator) + 0.5 if options == "weight" else None
    results = []
    for logits in (laid_out(x, layout), x.double()):
        leaf = logits.detach().requires_grad_()
        w = None if weight is None else weight.to(leaf.dtype if leaf.dtype == torch.float64 else torch.float32)
        loss = functional.cross_entropy(leaf, target, w, loss_dtype=None, **arguments)
        results.append((loss.detach().double(), torch.autograd.grad(loss * 2, leaf)[0].double()))
    (loss, grad), (expected_loss, expected_grad) = results
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected_loss, rtol=4 * eps, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=4 * eps, atol=1e-6 + eps * expected_grad.abs().max().item())
    assert (grad[::7] == 0).all()


@pytest.mark.covering(2)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("vocab_size", [27, 64, 65, 255])
def test_huge_logits_of_half_types_lose_nothing(vocab_size: int, dtype: torch.dtype, isa: str) -> None:
    for size in (1e3, 6e4, 1e9, 1e30):
        if size > torch.finfo(dtype).max:
            continue
        x = torch.full((8, vocab_size), -size, dtype=dtype)
        x[:, 1] = x[:, 2] = size
        leaf = x.requires_grad_()
        loss = functional.cross_entropy(leaf, torch.ones(8, dtype=torch.int64), loss_dtype=torch.float32)
        torch.testing.assert_close(loss.item(), torch.tensor(2.0).log().item())
        (grad,) = torch.autograd.grad(loss, leaf)
        assert (grad[:, 1] == -1 / 16).all()
        assert (grad[:, 2] == 1 / 16).all()
        assert grad.count_nonzero() == 16
