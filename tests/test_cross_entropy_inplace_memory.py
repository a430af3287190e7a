"""inplace="backward" and inplace="forward": which memory may become the gradient."""

from __future__ import annotations

import pytest
import torch

from charlm.functional import cross_entropy

in_both_modes = pytest.mark.parametrize("mode", ["backward", "forward"])
TARGET = torch.tensor([0, 1, 2, 3, 0])


def logits_over(base: torch.Tensor) -> torch.Tensor:
    """A tensor that is no leaf, in new memory."""
    return base.clone().requires_grad_() * 1


@in_both_modes
@pytest.mark.parametrize(
    ("n_numbers", "shape", "strides", "target"),
    [
        (12, (5, 4), (2, 1), TARGET),  # unfold(0, 4, 2)
        (8, (5, 4), (1, 1), TARGET),
        (20, (5, 4), (4, 0), TARGET),
        (20, (5, 4), (0, 1), TARGET),
        (10, (2, 4, 2), (2, 1, 3), torch.zeros(2, 2, dtype=torch.int64)),
    ],
)
def test_logits_that_overlap_themselves_are_refused_before_anything_is_written(
    mode: str, n_numbers: int, shape: tuple[int, ...], strides: tuple[int, ...], target: torch.Tensor
) -> None:
    base = logits_over(torch.arange(float(n_numbers)).sin())
    before, version = base.detach().clone(), base._version
    with pytest.raises(RuntimeError, match="may overlap themselves in memory"):
        cross_entropy(base.as_strided(shape, strides), target, inplace=mode)
    assert torch.equal(base.detach(), before)
    assert base._version == version


@in_both_modes
@pytest.mark.parametrize("pad", [0, 3])
def test_views_that_provably_do_not_overlap_get_the_right_gradient(mode: str, pad: int) -> None:
    for make in (
        lambda base: base[:, :4],
        lambda base: base[:, : 2 * 2 : 2],
        lambda base: base[::2, :4].transpose(0, 1),
        lambda base: base.unfold(0, 2, 2)[:, :4].transpose(1, 2).transpose(1, 2),
    ):
        base = torch.randn(10, 4 + pad)
        leaf, plain_leaf = (base.clone().requires_grad_() for _ in range(2))
        logits, plain = make(leaf * 1), make(plain_leaf * 1)
        target = torch.zeros(plain.shape[:1] + plain.shape[2:], dtype=torch.int64)
        cross_entropy(logits, target, inplace=mode).backward()
        cross_entropy(plain, target).backward()
        torch.testing.assert_close(leaf.grad, plain_leaf.grad)


@in_both_modes
@pytest.mark.parametrize("name", ["target", "weight", "token_weight"])
def test_an_argument_in_the_logits_memory_is_refused_before_anything_is_written(mode: str, name: str) -> None:
    logits = logits_over(torch.rand(5, 4))
    shared = {"target": logits.detach(), "weight": logits.detach()[2], "token_weight": logits.detach()[:, 1]}[name]
    arguments = {"target": TARGET, name: shared}
    before = logits.detach().clone()
    with pytest.raises(RuntimeError, match=f"{name} may share memory with the logits"):
        cross_entropy(logits, **arguments, inplace=mode)
    assert torch.equal(logits.detach(), before)


@in_both_modes
def test_arguments_beside_the_logits_in_one_tensor_are_taken(mode: str) -> None:
    base = torch.rand(5, 9)
    leaf, plain_leaf = (base.clone().requires_grad_() for _ in range(2))
    both, plain = leaf * 1, plain_leaf * 1
    cross_entropy(both[:, :4], both.detach()[:, 4:8], token_weight=both.detach()[:, 8], inplace=mode).backward()
    cross_entropy(plain[:, :4], base[:, 4:8], token_weight=base[:, 8]).backward()
    torch.testing.assert_close(leaf.grad, plain_leaf.grad)


@in_both_modes
def test_logits_that_retain_their_gradient_are_refused(mode: str) -> None:
    logits = logits_over(torch.rand(5, 4))
    logits.retain_grad()
    with pytest.raises(RuntimeError, match="retain their gradient"):
        cross_entropy(logits, TARGET, inplace=mode)


@in_both_modes
def test_a_lazily_negated_view_is_refused(mode: str) -> None:
    numbers = (torch.randn(5, 4, dtype=torch.complex64)).requires_grad_()
    logits = (numbers * 1).conj().imag
    assert logits.is_neg()
    with pytest.raises(RuntimeError, match="lazily negated view"):
        cross_entropy(logits, TARGET, inplace=mode)


def test_reduction_none_is_refused_for_the_mode_forward_without_grad_too() -> None:
    with torch.no_grad(), pytest.raises(ValueError, match='inplace="forward" needs reduction'):
        cross_entropy(torch.rand(5, 4), TARGET, inplace="forward", reduction="none")


@in_both_modes
def test_vmap_is_refused_with_the_way_out(mode: str) -> None:
    with pytest.raises(RuntimeError, match=r"neither under torch\.func"):
        torch.func.vmap(lambda x: cross_entropy(x, TARGET, inplace=mode))(torch.rand(2, 5, 4))
