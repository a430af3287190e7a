"""A call that torch accepts gives torch's result, and a call that torch refuses raises torch's exception."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from charlm import functional

x, y = torch.randn(3, 5), torch.tensor([0, 1, 4])
p = torch.rand(3, 5)

ACCEPTED: dict[str, Callable[[ModuleType], torch.Tensor]] = {
    "positional": lambda f: f.cross_entropy(x, y, torch.rand(5) + 1, None, 1, None, "sum", 0.1),
    "keywords": lambda f: f.cross_entropy(input=x, target=y, weight=torch.rand(5) + 1, reduction="none"),
    "one_target_of_shape_1": lambda f: f.cross_entropy(x[0], y[:1]),
    "one_target_of_shape_1_none": lambda f: f.cross_entropy(x[0], y[:1], reduction="none"),
    "one_target_of_shape_0": lambda f: f.cross_entropy(x[0], y[0], reduction="none"),
    "one_ignored_target": lambda f: f.cross_entropy(x[0], torch.tensor(-100)),
    "one_ignored_target_none": lambda f: f.cross_entropy(x[0], torch.tensor(-100), reduction="none"),
    "no_rows_mean": lambda f: f.cross_entropy(x[:0], y[:0]),
    "no_rows_sum": lambda f: f.cross_entropy(x[:0], y[:0], reduction="sum"),
    "no_rows_none": lambda f: f.cross_entropy(x[:0], y[:0], reduction="none"),
    "no_rows_probabilities": lambda f: f.cross_entropy(x[:0], p[:0]),
    "no_rows_smoothing": lambda f: f.cross_entropy(x[:0], y[:0], label_smoothing=0.1),
    "no_positions_mean": lambda f: f.cross_entropy(torch.rand(2, 5, 0), torch.zeros(2, 0).long()),
    "no_positions_none": lambda f: f.cross_entropy(torch.rand(2, 5, 0), torch.zeros(2, 0).long(), reduction="none"),
    "no_classes_probabilities": lambda f: f.cross_entropy(torch.rand(3, 0), torch.rand(3, 0)),
    "all_ignored": lambda f: f.cross_entropy(x, torch.full((3,), -100)),
    "all_ignored_smoothing": lambda f: f.cross_entropy(x, torch.full((3,), -100), label_smoothing=0.1),
    "all_class_weights_zero": lambda f: f.cross_entropy(x, y, torch.zeros(5)),
    "ignored_class_inside": lambda f: f.cross_entropy(x, y, ignore_index=1, reduction="none"),
    "ignored_class_with_weight": lambda f: f.cross_entropy(x, y, torch.rand(5), ignore_index=1, label_smoothing=0.3),
    "smoothing_one": lambda f: f.cross_entropy(x, y, label_smoothing=1.0),
    "negative_smoothing_is_none": lambda f: f.cross_entropy(x, y, label_smoothing=-0.1),
    "probabilities": lambda f: f.cross_entropy(x, p),
    "probabilities_not_normalized": lambda f: f.cross_entropy(x, p * 7 - 3, reduction="none"),
    "probabilities_float64": lambda f: f.cross_entropy(x, p.double()),
    "probabilities_float16": lambda f: f.cross_entropy(x, p.half()),
    "probabilities_float32_of_float16": lambda f: f.cross_entropy(x.half(), p),
    "probabilities_float32_of_bfloat16": lambda f: f.cross_entropy(x.bfloat16(), p, label_smoothing=0.1),
    "probabilities_weight_float64": lambda f: f.cross_entropy(x, p, torch.rand(5).double()),
    "probabilities_weight_float16": lambda f: f.cross_entropy(x, p, torch.rand(5).half()),
    "probabilities_no_batch": lambda f: f.cross_entropy(x[0], p[0]),
    "probabilities_strided": lambda f: f.cross_entropy(x, torch.rand(5, 3).t()),
    "one_class": lambda f: f.cross_entropy(x[:, :1], torch.zeros(3).long()),
    "channels_last": lambda f: f.cross_entropy(
        torch.rand(2, 5, 3, 4).to(memory_format=torch.channels_last), torch.ones(2, 3, 4).long()
    ),
    "five_dimensions": lambda f: f.cross_entropy(torch.rand(2, 5, 3, 1, 2), torch.ones(2, 3, 1, 2).long()),
    "strided_targets": lambda f: f.cross_entropy(x, torch.tensor([0, 9, 1, 9, 4, 9])[::2]),
    "strided_weight": lambda f: f.cross_entropy(x, y, torch.rand(10)[::2]),
    "uint8_targets": lambda f: f.cross_entropy(x, y.byte()),
    "float64": lambda f: f.cross_entropy(x.double(), y, reduction="none"),
    "weight_that_requires_grad_without_grad_mode": torch.no_grad()(
        lambda f: f.cross_entropy(x, y, torch.rand(5, requires_grad=True))
    ),
}

REFUSED: dict[str, Callable[[ModuleType], torch.Tensor]] = {
    "target_too_large": lambda f: f.cross_entropy(x, torch.tensor([0, 5, 2])),
    "target_negative": lambda f: f.cross_entropy(x, torch.tensor([0, -1, 2])),
    "target_too_large_smoothing": lambda f: f.cross_entropy(x, torch.tensor([0, 5, 2]), label_smoothing=0.1),
    "target_too_large_sum": lambda f: f.cross_entropy(x, torch.tensor([0, 5, 2]), reduction="sum"),
    "target_too_large_3d": lambda f: f.cross_entropy(torch.rand(2, 5, 3), torch.full((2, 3), 7)),
    "target_too_large_1d": lambda f: f.cross_entropy(x[0], torch.tensor(5)),
    "no_classes": lambda f: f.cross_entropy(torch.rand(3, 0), y),
    "bool_targets": lambda f: f.cross_entropy(x, y.bool()),
    "float_targets_that_are_no_probabilities": lambda f: f.cross_entropy(x, y.float()),
    "probabilities_with_an_ignored_class": lambda f: f.cross_entropy(x, p, ignore_index=0),
    "integer_probabilities": lambda f: f.cross_entropy(x, p.long()),
    "integer_logits": lambda f: f.cross_entropy(x.long(), y),
    "bool_logits": lambda f: f.cross_entropy(x.bool(), y),
    "complex_logits": lambda f: f.cross_entropy(x.cfloat(), y),
    "batch_sizes_differ": lambda f: f.cross_entropy(x, y[:2]),
    "positions_differ": lambda f: f.cross_entropy(torch.rand(2, 5, 3), torch.zeros(2, 4).long()),
    "target_has_a_dimension_too_many": lambda f: f.cross_entropy(x, y[:, None]),
    "target_has_a_dimension_too_few": lambda f: f.cross_entropy(torch.rand(2, 5, 3), torch.zeros(2).long()),
    "two_targets_for_one_row": lambda f: f.cross_entropy(x[0], y[:2]),
    "zero_dimensional_logits": lambda f: f.cross_entropy(torch.tensor(1.0), torch.tensor(0)),
    "zero_dimensional_probabilities": lambda f: f.cross_entropy(torch.tensor(1.0), torch.tensor(0.5)),
    "probabilities_of_another_shape": lambda f: f.cross_entropy(x, p[:, :4]),
    "weight_too_short": lambda f: f.cross_entropy(x, y, torch.rand(4)),
    "weight_too_short_probabilities": lambda f: f.cross_entropy(x, p, torch.rand(4)),
    "weight_2d": lambda f: f.cross_entropy(x, y, torch.rand(1, 5)),
    "weight_2d_probabilities": lambda f: f.cross_entropy(x, p, torch.rand(1, 5)),
    "weight_float64": lambda f: f.cross_entropy(x, y, torch.rand(5).double()),
    "weight_float64_of_bfloat16": lambda f: f.cross_entropy(x.bfloat16(), y, torch.rand(5).double()),
    "weight_requires_grad": lambda f: f.cross_entropy(x, y, torch.rand(5, requires_grad=True)),
    "smoothing_above_one": lambda f: f.cross_entropy(x, y, label_smoothing=1.5),
    "unknown_reduction": lambda f: f.cross_entropy(x, y, reduction="average"),
    "reduction_none_object": lambda f: f.cross_entropy(x, y, reduction=None),
    "list_as_target": lambda f: f.cross_entropy(x, [0, 1, 2]),
    "list_as_input": lambda f: f.cross_entropy([[1.0, 2.0]], y),
    "float_ignore_index": lambda f: f.cross_entropy(x, y, ignore_index=1.5),
    "unknown_keyword": lambda f: f.cross_entropy(x, y, smoothing=0.1),
    "targets_on_another_device": lambda f: f.cross_entropy(x, y.to("meta")),
}


@pytest.mark.parametrize("name", ACCEPTED)
def test_an_accepted_call_gives_torchs_result(name: str, isa: str) -> None:
    torch.manual_seed(1)
    expected = ACCEPTED[name](F)
    torch.manual_seed(1)
    actual = ACCEPTED[name](functional)
    # torch rounds log_softmax to the half dtype of the logits on its way to a float32 loss; ours does not.
    rtol, atol = (1e-2, 1e-3) if "float32_of" in name else (1.3e-6, 1e-5)
    torch.testing.assert_close(actual, expected, equal_nan=True, rtol=rtol, atol=atol)


def test_a_probability_of_0_at_a_logit_of_minus_infinity_gives_nan_like_torch(isa: str) -> None:
    logits, target = torch.tensor([[0.0, 1.0, -torch.inf]]), torch.tensor([[0.5, 0.5, 0.0]])
    for module in (F, functional):
        assert module.cross_entropy(logits, target).isnan()
        assert module.cross_entropy(logits, target, reduction="none").isnan().tolist() == [True]


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_raises_torchs_exception(name: str) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011  torch says which one
        REFUSED[name](F)
    with pytest.raises(theirs.type) as ours:
        REFUSED[name](functional)
    assert ours.type is theirs.type


@pytest.mark.parametrize("size_average", [None, True, False])
@pytest.mark.parametrize("reduce", [None, True, False])
def test_the_deprecated_arguments_mean_what_they_mean_in_torch(size_average: bool | None, reduce: bool | None) -> None:
    with warnings.catch_warnings(record=True) as ours:
        warnings.simplefilter("always")
        actual = functional.cross_entropy(x, y, size_average=size_average, reduce=reduce, reduction="sum")
    with warnings.catch_warnings(record=True) as theirs:
        warnings.simplefilter("always")
        expected = F.cross_entropy(x, y, size_average=size_average, reduce=reduce, reduction="sum")
    torch.testing.assert_close(actual, expected)
    assert [w.category for w in ours] == [w.category for w in theirs]


@pytest.mark.parametrize("name", ["embedding", "cross_entropy"])
def test_the_signature_starts_with_torchs(name: str) -> None:
    theirs = list(inspect.signature(getattr(F, name)).parameters.values())
    ours = list(inspect.signature(getattr(functional, name)).parameters.values())
    for parameter, expected in zip(ours, theirs, strict=False):
        assert (parameter.name, parameter.default, parameter.kind) == (
            expected.name,
            expected.default,
            expected.kind,
        )
    assert all(parameter.kind is inspect.Parameter.KEYWORD_ONLY for parameter in ours[len(theirs) :])


def test_an_out_of_range_target_is_named_with_position_and_limit(isa: str) -> None:
    logits, target = torch.randn(2, 27, 3), torch.zeros(2, 3, dtype=torch.int64)
    target[1, 2] = 27
    for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1}, {"softcap": 5.0}):
        with pytest.raises(IndexError, match=r"target 27 at position \(1, 2\) is out of range for 27 classes"):
            functional.cross_entropy(logits, target, **options)


def test_the_first_of_several_bad_targets_is_named() -> None:
    target = torch.zeros(65536, dtype=torch.int64)
    target[[40_000, 60_000]] = torch.tensor([-3, 99])
    with pytest.raises(IndexError, match=r"target -3 at position \(40000,\)"):
        functional.cross_entropy(torch.zeros(65536, 27), target)


def test_a_tensor_subclass_sees_the_call_by_torch_function() -> None:
    class Logits(torch.Tensor):
        seen: list[str] = []  # noqa: RUF012  one list for the one test

        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            cls.seen.append(getattr(func, "__name__", str(func)))
            return super().__torch_function__(func, types, args, kwargs or {})

    loss = functional.cross_entropy(x.as_subclass(Logits), y)
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), F.cross_entropy(x, y))
    assert "cross_entropy" in Logits.seen
