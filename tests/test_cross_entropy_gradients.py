"""Derivatives in float64 against finite differences, for every option; any call at all by hypothesis."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from charlm import functional, reference
from charlm.testing import PROBABILITIES, SampleInput, evaluate, strided_copy

OPTIONS: dict[str, dict[str, Any]] = {
    "mean": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "ignored": {"ignore_index": 1},
    "smoothing": {"label_smoothing": 0.2},
    "weight": {"weight": torch.rand(5, dtype=torch.float64) + 0.5},
    "z_loss": {"lse_square_scale": 0.3},
    "softcap": {"softcap": 2.0},
    "logit_scale": {"logit_scale": -1.3},
    "token_weight": {"token_weight": torch.tensor([0.3, 1.7, 0.9], dtype=torch.float64)},
    "zero_if_all_ignored": {"all_ignored": "zero"},
}
OPTIONS["all"] = {name: value for options in OPTIONS.values() for name, value in options.items()}
OPTIONS["all"]["reduction"] = "mean"
TARGETS = {
    "indices": torch.tensor([0, 1, 4]),
    "probabilities": torch.rand(3, 5, dtype=torch.float64).softmax(1),
}
CALLS = [
    (name, target_kind)
    for target_kind in TARGETS
    for name in OPTIONS
    if (name, target_kind) != ("ignored", "probabilities")
]


def _call(name: str, target_kind: str) -> tuple[Any, list[torch.Tensor]]:
    """(f, leaves): one loss as a function of the tensors it is differentiated by."""
    options = dict(OPTIONS[name])
    if target_kind == "probabilities":
        options.pop("ignore_index", None)  # torch refuses it beside probabilities
    leaves = [torch.randn(3, 5, dtype=torch.float64, requires_grad=True)]
    if target_kind == "indices":
        return lambda x: functional.cross_entropy(x, TARGETS["indices"], **options), leaves
    leaves.append(TARGETS["probabilities"].clone().requires_grad_())
    weight = options.pop("weight", None)
    if weight is None:
        return lambda x, p: functional.cross_entropy(x, p, **options), leaves
    leaves.append(weight.clone().requires_grad_())
    return lambda x, p, w: functional.cross_entropy(x, p, w, **options), leaves


@pytest.mark.covering
@pytest.mark.parametrize(("name", "target_kind"), CALLS)
def test_gradients_equal_finite_differences(name: str, target_kind: str, isa: str) -> None:
    f, leaves = _call(name, target_kind)
    assert gradcheck(f, leaves, check_batched_grad=True)


@pytest.mark.parametrize(("name", "target_kind"), CALLS)
def test_second_and_forward_mode_derivatives_equal_finite_differences(name: str, target_kind: str) -> None:
    f, leaves = _call(name, target_kind)
    assert gradcheck(f, leaves, check_forward_ad=True, check_backward_ad=False)
    assert gradgradcheck(f, leaves)


@pytest.mark.parametrize("shape", [(5,), (2, 5, 3), (2, 3, 2, 2)], ids=str)
def test_gradients_of_every_rank_equal_finite_differences(shape: tuple[int, ...], isa: str) -> None:
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    class_dim = 0 if len(shape) == 1 else 1
    target = torch.randint(shape[class_dim], shape[:class_dim] + shape[class_dim + 1 :])
    assert gradcheck(lambda x: functional.cross_entropy(x, target, label_smoothing=0.1), x)
    assert gradgradcheck(lambda x: functional.cross_entropy(x, target, label_smoothing=0.1), x)


def test_a_second_derivative_through_the_gradient_penalty_equals_torchs() -> None:
    target = torch.randint(27, (33,))
    logits = torch.randn(33, 27, dtype=torch.float64)
    second = []
    for cross_entropy in (functional.cross_entropy, torch.nn.functional.cross_entropy):
        x = logits.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(cross_entropy(x * 2, target), x, create_graph=True)
        gradient.square().sum().backward()
        second.append(x.grad)
    torch.testing.assert_close(*second)


# A few ulps of numbers of size 1, the size of the terms whose difference a gradient is.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (4e-6, 1e-6),
    torch.bfloat16: (2**-7, 2**-8),
    torch.float16: (2**-10, 2**-11),
    torch.int64: (0, 0),
}


@st.composite
def calls(draw: st.DrawFn) -> SampleInput:
    """A call with any combination of shape, strides, targets and options."""
    n_classes = draw(st.sampled_from([2, 3, 7, 8, 15, 16, 17, 27, 31, 33, 64, 65, 100, 129, 257]))
    batch = draw(st.sampled_from([(), (1,), (3,), (16,), (19,), (2, 3), (3, 1, 2), (0,), (2, 0)]))
    seed = draw(st.integers(0, 2**16))
    generator = torch.Generator().manual_seed(seed)
    shape = (n_classes,) if batch == () else (batch[0], n_classes, *batch[1:])
    class_dim = 0 if batch == () else 1
    logits = torch.randn(shape, generator=generator) * draw(st.sampled_from([0.1, 1.0, 5.0]))
    if len(shape) > 1 and draw(st.booleans()):
        logits = logits.transpose(0, 1).contiguous().transpose(0, 1)
    if draw(st.booleans()):
        logits = torch.cat([logits, logits], -1)[..., : shape[-1]]
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    arguments: dict[str, Any] = {"input": strided_copy(logits).to(dtype)}
    differentiable = ["input"]
    options = draw(
        st.fixed_dictionaries(
            {"reduction": st.sampled_from(["none", "mean", "sum"])},
            optional={
                "label_smoothing": st.sampled_from([0.1, 1.0]),
                "lse_square_scale": st.just(0.05),
                "softcap": st.just(6.0),
                "logit_scale": st.sampled_from([0.5, -2.0]),
                "all_ignored": st.sampled_from(["nan", "zero"]),
                "ignore_index": st.sampled_from([-100, 0]),
                "return_lse": st.just(True),
                "return_entropy": st.just(True),
                "return_token_accuracy": st.just(True),
            },
        )
    )
    kind = draw(st.sampled_from([torch.int64, torch.int32, torch.uint8, PROBABILITIES]))
    if kind == PROBABILITIES:
        arguments["target"] = torch.rand(shape, generator=generator).softmax(class_dim).to(dtype)
        options.pop("ignore_index", None)  # torch refuses it beside probabilities
        differentiable.append("target")
    else:
        limit = min(n_classes, 256)
        arguments["target"] = torch.randint(limit, batch, generator=generator).to(kind)
    if draw(st.booleans()):
        arguments["weight"] = (torch.rand(n_classes, generator=generator) + 0.5).to(dtype)
        if kind == PROBABILITIES:
            differentiable.append("weight")
    if draw(st.booleans()):
        arguments["token_weight"] = torch.rand(batch, generator=generator).to(dtype) + 0.5
    return SampleInput("hypothesis", {**arguments, **options}, tuple(differentiable))


@given(sample=calls())
def test_any_call_is_close_to_the_reference_in_float64(sample: SampleInput, isa: str) -> None:
    actual = evaluate(functional.cross_entropy, sample)
    exact = evaluate(reference.cross_entropy, sample, torch.float64)
    for name, value in actual.items():
        rtol, atol = TOLERANCES[value.dtype]
        close = torch.isclose(value.double(), exact[name].double(), rtol, atol, equal_nan=True)
        assert close.all(), f"{name}: {value} is not {exact[name]}"
