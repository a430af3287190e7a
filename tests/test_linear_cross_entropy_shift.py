"""shift of linear_cross_entropy: each input is scored with a later target, as in a causal language model."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from charlm import functional, nn, reference


@pytest.mark.parametrize("shift", [True, 1, 3])
def test_shift_scores_each_input_with_a_later_target(shift: bool | int) -> None:
    torch.manual_seed(0)
    x, weight, target = torch.randn(2, 9, 6), torch.randn(27, 6), torch.randint(27, (2, 9))
    n = int(shift)
    rows, later = x[:, :-n].reshape(-1, 6), target[:, n:].reshape(-1)
    ours = functional.linear_cross_entropy(x, weight, target, shift=shift, reduction="none", return_lse=True)
    theirs = functional.linear_cross_entropy(rows, weight, later, reduction="none", return_lse=True)
    torch.testing.assert_close(ours.loss, theirs.loss.view(2, 9 - n))
    torch.testing.assert_close(ours.lse, theirs.lse.view(2, 9 - n))
    for f in (functional, reference):
        one = f.linear_cross_entropy(x[0], weight, target[0], shift=shift)
        torch.testing.assert_close(one, F.cross_entropy(x[0, :-n] @ weight.T, target[0, n:]))


def test_a_shift_that_is_refused() -> None:
    x, weight, target = torch.randn(2, 9, 6), torch.randn(27, 6), torch.randint(27, (2, 9))
    with pytest.raises(ValueError, match=r"shift must be in \[0, T\) for sequences of length T = 9, got 9"):
        functional.linear_cross_entropy(x, weight, target, shift=9)
    with pytest.raises(RuntimeError, match=r"with shift, input must have shape \(\.\.\., T, D\)"):
        functional.linear_cross_entropy(x, weight, target[0], shift=1)


def test_shift_checks_its_tensors_first() -> None:
    with pytest.raises(TypeError, match="target"):
        functional.linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 3), None, shift=1)


def test_shift_without_features_and_with_a_bad_target() -> None:
    zeros = torch.zeros(2, 5, dtype=torch.long)
    loss = functional.linear_cross_entropy(torch.zeros(2, 5, 0), torch.zeros(7, 0), zeros, shift=1)
    torch.testing.assert_close(loss, torch.tensor(7.0).log())
    zeros[1, 2] = 7
    with pytest.raises(IndexError, match=r"target 7 at position \(1, 2\) is out of range for 7 classes"):
        functional.linear_cross_entropy(torch.zeros(2, 5, 3), torch.zeros(7, 3), zeros, shift=1)
    for shift in (None, 0.0, "", []):
        with pytest.raises(TypeError, match="shift"):
            functional.linear_cross_entropy(torch.zeros(5, 3), torch.zeros(7, 3), zeros[0], shift=shift)
    module = nn.LinearCrossEntropyLoss(3, 7, shift=True)
    inputs = torch.randn(2, 5, 3)
    expected = functional.linear_cross_entropy(inputs, module.linear.weight, zeros.clamp(max=6), shift=1)
    torch.testing.assert_close(module(inputs, zeros.clamp(max=6)), expected)
