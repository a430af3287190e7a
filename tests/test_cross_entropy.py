"""cross_entropy on every sample, dtype and instruction set, against torch and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from charlm import functional, reference
from charlm.reference import INDEX_DTYPES
from charlm.testing import (
    FLOAT_DTYPES,
    SampleInput,
    assert_matches_reference,
    sample_inputs_cross_entropy,
)

SAMPLES = [
    pytest.param(sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_cross_entropy(dtype)
]


@pytest.mark.covering
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(sample: SampleInput, isa: str) -> None:
    assert_matches_reference(functional.cross_entropy, reference.cross_entropy, sample)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_every_integer_dtype_of_targets_gives_the_int64_result(dtype: torch.dtype, reduction: str) -> None:
    logits, target = torch.randn(33, 27), torch.randint(27, (33,))
    expected = functional.cross_entropy(logits, target, reduction=reduction)
    assert torch.equal(functional.cross_entropy(logits, target.to(dtype), reduction=reduction), expected)


@pytest.mark.parametrize(
    ("dtype", "value"), [(torch.uint8, 156), (torch.uint16, 2**16 - 100), (torch.uint32, 2**32 - 100)]
)
def test_an_unsigned_target_that_wraps_to_minus_100_is_not_ignored(dtype: torch.dtype, value: int) -> None:
    target = torch.tensor([0, value], dtype=dtype)
    with pytest.raises(IndexError, match=f"target {value} at position \\(1,\\) is out of range for 27 classes"):
        functional.cross_entropy(torch.randn(2, 27), target)


def test_a_uint64_target_beyond_int64_is_out_of_range() -> None:
    target = torch.tensor([0, 2**64 - 100], dtype=torch.uint64)
    with pytest.raises(IndexError, match=f"target {2**64 - 100} at position"):
        functional.cross_entropy(torch.randn(2, 27), target)


def test_uint8_target_156_is_class_156() -> None:
    logits = torch.randn(1, 256)
    loss = functional.cross_entropy(logits, torch.tensor([156], dtype=torch.uint8))
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([156])))


@pytest.mark.parametrize("n_classes", [1, 2, 27, 65, 256, 1000, 4099])
def test_a_row_of_equal_logits_costs_log_of_the_number_of_classes(n_classes: int, isa: str) -> None:
    logits = torch.full((5, n_classes), 3.0)
    loss = functional.cross_entropy(logits, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(loss, torch.tensor(float(n_classes)).log(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"lse_square_scale": 0.1}], ids=str)
def test_the_only_class_has_no_gradient_but_the_z_losss(options: dict, isa: str) -> None:
    logits = torch.randn(33, 1, requires_grad=True)
    loss = functional.cross_entropy(logits, torch.zeros(33).long(), reduction="sum", **options)
    loss.backward()
    z_loss = 2 * options.get("lse_square_scale", 0) * logits.detach()
    torch.testing.assert_close(logits.grad, z_loss, rtol=1e-6, atol=2e-7)


def test_a_row_of_minus_infinity_is_nan_like_torch(isa: str) -> None:
    logits = torch.randn(3, 27)
    logits[1] = -torch.inf
    target = torch.tensor([0, 1, 2])
    actual = functional.cross_entropy(logits, target, reduction="none")
    assert actual.isnan().tolist() == F.cross_entropy(logits, target, reduction="none").isnan().tolist()
    assert actual.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("n_classes", [7, 27, 300])
def test_one_nan_or_infinite_logit_makes_its_row_nan_and_no_other(value: float, n_classes: int, isa: str) -> None:
    logits = torch.randn(33, n_classes)
    logits[5, 3] = value
    logits.requires_grad_()
    loss = functional.cross_entropy(logits, torch.zeros(33, dtype=torch.int64), reduction="none")
    loss.sum().backward()
    is_nan = torch.arange(33) == 5
    assert torch.equal(loss.isnan(), is_nan)
    assert torch.equal(logits.grad.isnan().any(1), is_nan)


@pytest.mark.parametrize("n_classes", [7, 27, 300, 2100])
def test_a_nan_at_any_class_makes_its_row_nan(n_classes: int, isa: str) -> None:
    logits = torch.randn(n_classes, n_classes).fill_diagonal_(torch.nan).requires_grad_()
    target = torch.zeros(n_classes, dtype=torch.int64)
    for reduction in ("none", "mean"):
        loss = functional.cross_entropy(logits, target, reduction=reduction)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().all()
        assert gradient.isnan().all()


def test_an_ignored_row_of_nan_has_no_part_in_loss_or_gradient(isa: str) -> None:
    logits = torch.randn(5, 27)
    logits[2] = torch.nan
    logits.requires_grad_()
    functional.cross_entropy(logits, torch.tensor([0, 1, -100, 3, 4]), reduction="sum").backward()
    assert logits.grad[2].tolist() == [0.0] * 27
    assert logits.grad.isfinite().all()


def test_probability_zero_at_a_logit_of_minus_infinity_is_nan_like_torch(isa: str) -> None:
    logits = torch.randn(3, 27)
    logits[:, 4] = -torch.inf
    probabilities = torch.rand(3, 27)
    probabilities[:, 4] = 0
    assert F.cross_entropy(logits, probabilities).isnan()
    assert functional.cross_entropy(logits, probabilities).isnan()


def test_bfloat16_mean_over_many_rows_is_rounded_once(isa: str) -> None:
    logits, target = (torch.randn(20_000, 27) * 2).bfloat16(), torch.randint(27, (20_000,))
    exact = F.cross_entropy(logits.double(), target)
    loss = functional.cross_entropy(logits, target)
    assert loss.dtype == torch.bfloat16
    assert abs(loss.item() - exact.item()) <= exact.item() * 2**-8  # half a bfloat16 ulp is at most this


@pytest.mark.covering
@pytest.mark.parametrize(("autocast", "scale"), [(True, 2.0**16), (False, 2.0**15)])
def test_float16_gradients_survive_a_loss_scale(autocast: bool, scale: float, isa: str) -> None:
    # 1 / 65536 times a probability of 1 / 256 is 6e-8, the smallest float16: stored before it is scaled, most
    # of the gradient would be lost. Without autocast the loss is float16 as in torch, and so is its gradient,
    # the scale: 2**15 is the largest power of two that is finite there.
    logits, target = torch.randn(65536, 256).half(), torch.randint(256, (65536,))
    x = logits.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
        loss = functional.cross_entropy(x, target)
    (loss.float() * scale).backward()
    exact = logits.float().requires_grad_()
    (F.cross_entropy(exact, target) * scale).backward()
    zeros = (x.grad == 0).float().mean().item()
    zeros_of_float32 = (exact.grad.half() == 0).float().mean().item()
    assert zeros == pytest.approx(zeros_of_float32, abs=1e-4)
    torch.testing.assert_close(x.grad.float(), exact.grad, rtol=2e-3, atol=1e-7)


def test_reduction_none_takes_a_gradient_for_each_target(isa: str) -> None:
    logits, target, cotangent = torch.randn(33, 27), torch.randint(27, (33,)), torch.randn(33)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    functional.cross_entropy(ours, target, reduction="none").backward(cotangent)
    F.cross_entropy(theirs, target, reduction="none").backward(cotangent)
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_an_expanded_cotangent_and_an_expanded_input_are_read_by_their_strides(isa: str) -> None:
    row, target = torch.randn(1, 27), torch.randint(27, (33,))
    ours, theirs = (row.clone().requires_grad_() for _ in range(2))
    functional.cross_entropy(ours.expand(33, 27), target, reduction="none").sum().backward()
    F.cross_entropy(theirs.expand(33, 27), target, reduction="none").sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.1}, {"lse_square_scale": 0.1}], ids=str)
def test_retain_graph_gives_the_same_gradient_twice(options: dict) -> None:
    logits = torch.randn(33, 27, requires_grad=True)
    loss = functional.cross_entropy(logits, torch.randint(27, (33,)), **options)
    (first,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (second,) = torch.autograd.grad(loss, logits)
    assert torch.equal(first, second)


def test_logits_changed_between_forward_and_backward_raise_rather_than_give_a_wrong_gradient() -> None:
    leaf = torch.randn(33, 27, requires_grad=True)
    logits = leaf * 2
    loss = functional.cross_entropy(logits, torch.randint(27, (33,)))
    logits.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_default_never_touches_its_arguments(isa: str) -> None:
    for sample in sample_inputs_cross_entropy(torch.float32):
        copies = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in sample.arguments.items()}
        output = functional.cross_entropy(**sample.arguments)
        for name, value in sample.arguments.items():
            if isinstance(value, torch.Tensor):
                assert torch.equal(value, copies[name])
        assert output is not None
