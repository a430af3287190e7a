"""Forward computes the gradient for a unit grad_output; backward is right for any other grad_output too."""

from __future__ import annotations

import pytest
import torch
import torch.utils.checkpoint

from charlm import functional, reference
from charlm.testing import FLOAT_DTYPES


def _arguments(dtype: torch.dtype, vocab_size: int = 27) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(33, vocab_size, dtype=dtype, requires_grad=True), torch.randint(vocab_size, (33,))


@pytest.mark.covering(2)
@pytest.mark.parametrize("vocab_size", [27, 300])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scale", [1.0, 0.5, -1.0, 1024.0, 1 / 3, 0.0, float("inf"), float("nan")])
def test_the_gradient_fits_the_gradient_of_the_loss(scale: float, dtype: torch.dtype, vocab_size: int) -> None:
    logits, target = _arguments(dtype, vocab_size)
    (grad,) = torch.autograd.grad(functional.cross_entropy(logits, target), logits, torch.tensor(scale, dtype=dtype))
    exact = logits.detach().double().requires_grad_()
    seen = torch.tensor(scale, dtype=dtype).double()
    (expected,) = torch.autograd.grad(reference.cross_entropy(exact, target), exact, seen)
    ulp = torch.finfo(dtype).eps
    assert torch.equal(grad.isfinite(), expected.to(dtype).isfinite())
    finite = grad.isfinite()
    largest = expected[finite].abs().max().item() if finite.any() else 0.0
    torch.testing.assert_close(grad[finite].double(), expected[finite], rtol=2 * ulp, atol=2 * ulp * largest)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_a_power_of_two_scales_without_rounding(dtype: torch.dtype) -> None:
    logits, target = _arguments(dtype)
    loss = functional.cross_entropy(logits, target)
    whole, half = (
        torch.autograd.grad(loss, logits, torch.tensor(scale, dtype=dtype), retain_graph=True)[0] for scale in (1, 0.5)
    )
    if dtype is not torch.float16:  # where half of a subnormal number is rounded
        assert torch.equal(half, whole / 2)
    torch.testing.assert_close(half, whole / 2)


def test_each_backward_of_one_graph_gets_memory_of_its_own() -> None:
    logits, target = _arguments(torch.float32)
    loss = functional.cross_entropy(logits, target)
    first, second = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr()
    torch.testing.assert_close(first, second, rtol=1e-6, atol=1e-9)


def test_gradients_accumulate_over_two_losses() -> None:
    logits, target = _arguments(torch.float32)
    for _ in range(2):
        functional.cross_entropy(logits, target).backward()
    (once,) = torch.autograd.grad(functional.cross_entropy(logits, target), logits)
    assert torch.equal(logits.grad, 2 * once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("n_classes", [5, 27, 300])
@pytest.mark.parametrize("has_probabilities", [False, True])
def test_the_precomputed_gradient_and_the_one_computed_in_backward_have_the_same_bits(
    has_probabilities: bool, n_classes: int, dtype: torch.dtype, isa: str
) -> None:
    for seed in range(20):  # the two differ by rounding only where a row is longer than what a first-level cache holds
        torch.manual_seed(seed)
        logits = torch.randn(3, n_classes, dtype=dtype, requires_grad=True)
        weight, target = torch.rand(n_classes, dtype=dtype) + 0.5, torch.randint(n_classes, (3,))
        if has_probabilities:
            target = torch.randn(3, n_classes, dtype=dtype).softmax(1)
        for options in ({}, {"weight": weight}, {"weight": weight, "label_smoothing": 0.1}):
            loss = functional.cross_entropy(logits, target, **options)
            precomputed, recomputed = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(2))
            assert torch.equal(precomputed, recomputed)


def test_logits_changed_before_backward_raise() -> None:
    leaf, target = _arguments(torch.float32)
    logits = leaf * 1
    loss = functional.cross_entropy(logits, target)
    with torch.no_grad():
        logits.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_a_loss_without_backward_writes_nothing_and_frees_everything() -> None:
    logits, target = _arguments(torch.float32)
    before = logits.detach().clone()
    assert torch.equal(functional.cross_entropy(logits, target), functional.cross_entropy(logits.detach(), target))
    assert logits.grad is None
    assert torch.equal(logits, before)


def _ops_of_a_loss() -> set[str]:
    logits, target = _arguments(torch.float32)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        functional.cross_entropy(logits, target).backward()
    return {event.name for event in profile.events() if event.name.startswith("charlm::")}


def test_backward_of_a_loss_calls_no_kernel() -> None:
    assert _ops_of_a_loss() == {"charlm::cross_entropy"}


def test_hooks_on_saved_tensors_get_all_that_is_kept() -> None:
    # Activation checkpointing and offloading: a gradient kept beside them would undo what they save.
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        ops = _ops_of_a_loss()
    assert ops == {"charlm::cross_entropy", "charlm::_cross_entropy_backward"}


def test_a_checkpointed_loss_has_the_same_gradient() -> None:
    logits, target = _arguments(torch.float32)
    loss = torch.utils.checkpoint.checkpoint(functional.cross_entropy, logits, target, use_reentrant=False)
    (grad,) = torch.autograd.grad(loss, logits)
    (expected,) = torch.autograd.grad(functional.cross_entropy(logits, target), logits)
    torch.testing.assert_close(grad, expected, rtol=1e-6, atol=1e-9)


def test_a_batch_of_gradients_of_the_loss() -> None:
    logits, target = _arguments(torch.float32)
    loss = functional.cross_entropy(logits, target)
    (grads,) = torch.autograd.grad(loss, logits, torch.tensor([1.0, 2.0]), is_grads_batched=True, retain_graph=True)
    (grad,) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(grads, torch.stack([grad, 2 * grad]))
