"""surprisal on every sample, dtype and instruction set, against torch and float64; what it says of a bad target."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from charlm import functional, reference
from charlm.reference import INDEX_DTYPES
from charlm.testing import FLOAT_DTYPES, SampleInput, assert_matches_reference, sample_inputs_surprisal

SAMPLES = [
    pytest.param(sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_surprisal(dtype)
]


@pytest.mark.covering
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(sample: SampleInput, isa: str) -> None:
    assert_matches_reference(functional.surprisal, reference.surprisal, sample)


@pytest.mark.parametrize("shape", [(), (33,), (3, 11), (3, 11, 2)])
def test_it_is_minus_the_gathered_log_softmax(shape: tuple[int, ...]) -> None:
    logits, target = torch.randn(*shape, 27), torch.randint(27, shape)
    expected = -logits.log_softmax(-1).gather(-1, target.unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(functional.surprisal(logits, target), expected)


def test_its_mean_is_the_cross_entropy_and_its_expectation_the_entropy() -> None:
    logits, target = torch.randn(33, 27), torch.randint(27, (33,))
    surprisal = functional.surprisal(logits, target)
    torch.testing.assert_close(surprisal.mean(), functional.cross_entropy(logits, target))
    of_every_class = functional.surprisal(logits[:, None], torch.arange(27))
    torch.testing.assert_close((of_every_class * logits.softmax(-1)).sum(-1), functional.entropy(logits))


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_every_integer_dtype_of_targets_gives_the_int64_result(dtype: torch.dtype) -> None:
    logits, target = torch.randn(3, 11, 27), torch.randint(27, (3, 11))
    expected = functional.surprisal(logits, target)
    assert torch.equal(functional.surprisal(logits, target.to(dtype)), expected)


def test_an_ignored_token_has_surprisal_and_gradient_zero() -> None:
    logits = torch.randn(2, 3, 7, requires_grad=True)
    target = torch.tensor([[0, 6, -100], [5, 6, 1]])
    for ignore_index, ignored in ((-100, [2]), (6, [1, 4])):
        target = target.clamp(min=0) if ignore_index == 6 else target
        result = functional.surprisal(logits, target, ignore_index=ignore_index)
        (gradient,) = torch.autograd.grad(result.sum(), logits)
        is_zero = torch.zeros(6, dtype=torch.bool)
        is_zero[ignored] = True
        assert torch.equal(result.flatten() == 0, is_zero)
        assert torch.equal((gradient == 0).all(-1).flatten(), is_zero)


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_a_bad_target_is_named_with_its_position_in_the_broadcast_target(module: Any) -> None:
    for logits, target, said in (
        (torch.zeros(4, 7), torch.tensor([0, 6, 7, 1]), r"target 7 at position \(2,\) is out of range for 7 classes"),
        (torch.zeros(1, 3, 7), torch.tensor([0, 6, -1]), r"target -1 at position \(0, 2\) is out of range for 7"),
        (torch.zeros(7), torch.tensor([[0], [9]]), r"target 9 at position \(1, 0\) is out of range for 7 classes"),
    ):
        with pytest.raises(IndexError, match=said):
            module.surprisal(logits, target)


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_arguments_that_do_not_fit_are_refused(module: Any) -> None:
    with pytest.raises(RuntimeError, match=r"logits of shape \[3, 7\] and a target of shape \[4\] cannot be broadcast"):
        module.surprisal(torch.zeros(3, 7), torch.zeros(4, dtype=torch.int64))
    with pytest.raises(RuntimeError, match=r"logits must have a dimension of classes"):
        module.surprisal(torch.tensor(1.0), torch.tensor(0))
    for target in (torch.zeros(3), torch.zeros(3, 7), torch.zeros(3, dtype=torch.bool)):
        with pytest.raises(RuntimeError, match="of an integer dtype"):
            module.surprisal(torch.zeros(3, 7), target)


def test_derivatives_of_first_and_second_order() -> None:
    target = torch.tensor([[0, 3, -100], [6, 3, 1]])
    for shape in ((2, 3, 7), (3, 7), (7,)):
        logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert gradcheck(lambda x: functional.surprisal(x, target), logits)
        assert gradgradcheck(lambda x: functional.surprisal(x, target), logits)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_autocast_computes_in_float32(dtype: torch.dtype) -> None:
    logits = torch.randn(3, 5).to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        for target in (torch.tensor([0, 4, 1]), torch.tensor(2)):
            ours, theirs = (module.surprisal(logits, target) for module in (functional, reference))
            assert ours.dtype == theirs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            torch.testing.assert_close(ours, theirs)
