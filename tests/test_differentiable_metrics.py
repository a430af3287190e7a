"""The returned lse and entropy, their gradients, and the other metrics beside them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from charlm import functional, reference

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "all_extras": {
        "label_smoothing": 0.1,
        "lse_square_scale": 0.01,
        "softcap": 3.0,
        "logit_scale": 1.5,
        "ignore_index": 2,
        "weight": torch.linspace(0.5, 2, 27),
    },
    "sum_with_token_weight": {"reduction": "sum", "token_weight": torch.linspace(0, 2, 40)},
}
RETURNS = {"return_lse": True, "return_entropy": True}
OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    "all": lambda loss, lse, entropy: loss.sum() + (0.3 * lse.square() - 0.7 * entropy * entropy.exp()).sum(),
    "lse": lambda loss, lse, entropy: lse.square().mean(),
    "entropy": lambda loss, lse, entropy: entropy.square().sum(),
    "loss": lambda loss, lse, entropy: loss.sum(),
}


def logits_and_target(n: int = 40, v: int = 27) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(n, v), torch.arange(n) * 7 % v


def gradient(f: Callable[..., Any], objective: str, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    x = x.detach().requires_grad_()
    loss, lse, entropy, *_ = f(x, *arguments, **RETURNS, **options)
    (grad,) = torch.autograd.grad(OBJECTIVES[objective](loss, lse, entropy), x)
    return grad


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", OPTIONS)
def test_the_gradients_are_those_of_the_formula(name: str, objective: str, isa: str) -> None:
    x, target = logits_and_target()
    options = OPTIONS[name]
    double = {k: v.double() if isinstance(v, Tensor) else v for k, v in options.items()}
    expected = gradient(reference.cross_entropy, objective, x.double(), target, **double)
    torch.testing.assert_close(gradient(functional.cross_entropy, objective, x.double(), target, **double), expected)
    ours = gradient(functional.cross_entropy, objective, x, target, **options)
    theirs = gradient(reference.cross_entropy, objective, x, target, **options)
    scale = expected.abs().max()
    assert (ours - expected).abs().max() <= 2 * (theirs - expected).abs().max() + 4e-7 * scale


@pytest.mark.parametrize("v", [3, 27, 300, 5000])
def test_many_classes_and_probabilities(v: int) -> None:
    x, target = logits_and_target(12, v)
    for y in (target, torch.rand(12, v, dtype=torch.float64).softmax(1)):
        expected = gradient(reference.cross_entropy, "all", x.double(), y)
        torch.testing.assert_close(gradient(functional.cross_entropy, "all", x.double(), y), expected)


def test_ignored_rows_have_an_lse_with_a_gradient() -> None:
    x, target = logits_and_target()
    target[::3] = -100
    for objective in OBJECTIVES:
        expected = gradient(reference.cross_entropy, objective, x.double(), target)
        torch.testing.assert_close(gradient(functional.cross_entropy, objective, x.double(), target), expected)
    (grad,) = torch.autograd.grad(
        functional.cross_entropy(x.requires_grad_(), target, return_lse=True).lse[0], x, retain_graph=True
    )
    torch.testing.assert_close(grad[0], x[0].softmax(0).detach())


def test_a_class_of_probability_zero_adds_nothing_to_the_gradient_of_the_entropy() -> None:
    x = torch.tensor([[0.0, 1.0, -torch.inf]], requires_grad=True)
    output = functional.cross_entropy(x, torch.tensor([1]), return_entropy=True)
    (grad,) = torch.autograd.grad(output.entropy.sum(), x)
    (expected,) = torch.autograd.grad(functional.entropy(x).sum(), x)
    torch.testing.assert_close(grad, expected)
    assert grad[0, 2] == 0


@pytest.mark.parametrize("shape", [(27,), (4, 27, 5), (2, 27, 3, 2)])
def test_other_shapes(shape: tuple[int, ...]) -> None:
    x = torch.randn(*shape, dtype=torch.float64)
    target = torch.randint(27, shape[:1] + shape[2:] if len(shape) > 1 else ())
    expected = gradient(reference.cross_entropy, "all", x, target)
    torch.testing.assert_close(gradient(functional.cross_entropy, "all", x, target), expected)


@pytest.mark.parametrize("block_rows", [None, 7])
@pytest.mark.parametrize("name", OPTIONS)
def test_linear_cross_entropy(name: str, block_rows: int | None) -> None:
    if block_rows is not None and not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        pytest.skip("torch has had LinearCrossEntropyOptions since 2.13")
    x, target = logits_and_target(40, 6)
    target = torch.arange(40) * 7 % 27
    target[::5] = -100
    x, weight, bias = x.double(), torch.randn(27, 6, dtype=torch.float64), torch.randn(27, dtype=torch.float64)
    options = {k: v.double() if isinstance(v, Tensor) else v for k, v in OPTIONS[name].items()}
    if options.get("ignore_index"):
        target[::5] = options["ignore_index"]
    if block_rows is not None:
        options["options"] = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=block_rows)
    results = []
    for f in (functional, reference):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        loss, lse, entropy, *_ = f.linear_cross_entropy(
            leaves[0], leaves[1], target, linear_bias=leaves[2], **options, **RETURNS
        )
        grads = [torch.autograd.grad(g(loss, lse, entropy), leaves, retain_graph=True) for g in OBJECTIVES.values()]
        results.append((loss, lse, entropy, grads))
    torch.testing.assert_close(*results)


def test_half_types_stay_close_to_float32() -> None:
    x, target = logits_and_target()
    for dtype in (torch.bfloat16, torch.float16):
        half = x.to(dtype)
        expected = gradient(functional.cross_entropy, "all", half.float(), target)
        torch.testing.assert_close(
            gradient(functional.cross_entropy, "all", half, target), expected.to(dtype), rtol=2e-2, atol=1e-4
        )


def test_double_backward_of_lse_and_entropy() -> None:
    x, target = logits_and_target(5, 7)

    def f(x: Tensor) -> Tensor:
        loss, lse, entropy, *_ = functional.cross_entropy(x, target, **RETURNS)
        return OBJECTIVES["all"](loss, lse, entropy)

    assert torch.autograd.gradgradcheck(f, (x.double().requires_grad_(),))


def test_under_torch_func() -> None:
    x, target = logits_and_target()

    def f(x: Tensor) -> Tensor:
        loss, lse, entropy, *_ = functional.cross_entropy(x, target, **RETURNS)
        return OBJECTIVES["all"](loss, lse, entropy)

    expected = gradient(reference.cross_entropy, "all", x.double(), target)
    torch.testing.assert_close(torch.func.grad(f)(x.double()), expected)
    torch.testing.assert_close(torch.func.jacrev(f)(x.double()), expected)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compiled(objective: str) -> None:
    x, target = logits_and_target()
    compiled = torch.compile(functional.cross_entropy, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(
        gradient(compiled, objective, x, target), gradient(functional.cross_entropy, objective, x, target)
    )


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_compiled_autograd(objective: str) -> None:
    x, target = logits_and_target()
    expected = gradient(functional.cross_entropy, objective, x, target)
    leaf = x.detach().requires_grad_()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="eager")):
        loss, lse, entropy, *_ = functional.cross_entropy(leaf, target, **RETURNS)
        OBJECTIVES[objective](loss, lse, entropy).backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_without_grad_and_in_place() -> None:
    x, target = logits_and_target()
    leaf = x.clone().requires_grad_()
    with pytest.raises(ValueError, match=r'inplace="forward" overwrites the logits, which the gradients of lse'):
        functional.cross_entropy(leaf * 1, target, inplace="forward", return_lse=True)
    with torch.no_grad():
        output = functional.cross_entropy(x, target, inplace="forward", return_lse=True)
    torch.testing.assert_close(output.lse, x.logsumexp(1))
    output = functional.cross_entropy(leaf * 1, target, inplace="backward", return_lse=True)
    (output.loss + output.lse.sum()).backward()
    expected = gradient(reference.cross_entropy, "loss", x, target) + x.softmax(1)
    torch.testing.assert_close(leaf.grad, expected)
    output = functional.cross_entropy(leaf, target, return_predicted_tokens=True)
    assert output.loss.requires_grad
    assert not output.predicted_tokens.requires_grad


def linear_arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, _ = logits_and_target(40, 6)
    weight = torch.randn(27, 6).to(dtype)
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), torch.arange(40) * 7 % 27


UNREAD: dict[str, dict[str, Any]] = {  # what the gradients of lse and entropy do not read
    "no_token_weight": {"token_weight": torch.zeros(40)},
    "no_weight": {"weight": torch.zeros(27)},
    "nan_token_weight": {"token_weight": torch.full((40,), torch.nan), "reduction": "sum"},
    "infinite_weight": {"weight": torch.full((27,), torch.inf), "reduction": "sum"},
}


@pytest.mark.parametrize("name", UNREAD)
@pytest.mark.parametrize("objective", ["lse", "entropy"])
def test_the_gradients_of_lse_and_entropy_do_not_read_the_weights(objective: str, name: str, isa: str) -> None:
    x, target = logits_and_target()
    expected = gradient(functional.cross_entropy, objective, x, target)
    torch.testing.assert_close(gradient(functional.cross_entropy, objective, x, target, **UNREAD[name]), expected)
    inputs, weight, target = linear_arguments()
    grads = []
    for options in ({}, UNREAD[name]):
        loss, lse, entropy, *_ = functional.linear_cross_entropy(inputs, weight, target, **options, **RETURNS)
        grads.append(torch.autograd.grad(OBJECTIVES[objective](loss, lse, entropy), (inputs, weight)))
    torch.testing.assert_close(grads[0], grads[1])


def test_the_gradients_of_lse_and_entropy_do_not_read_probabilities() -> None:
    x, _ = logits_and_target()
    expected = gradient(functional.cross_entropy, "lse", x, torch.rand(40, 27).softmax(1))
    ours = gradient(functional.cross_entropy, "lse", x, torch.full((40, 27), torch.nan))
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("f", [functional.cross_entropy, reference.cross_entropy])
@pytest.mark.parametrize("factor", [5.0, -1e30])
def test_a_large_gradient_of_the_entropy_meets_a_class_of_probability_zero(
    factor: float, f: Callable[..., Any], isa: str
) -> None:
    x = torch.tensor([[0.0, 1.0, -torch.inf, 3.0] * 5], requires_grad=True)
    entropy = f(x, torch.tensor([1]), return_entropy=True)[2]
    (grad,) = torch.autograd.grad(factor * entropy.sum(), x)
    (expected,) = torch.autograd.grad(factor * functional.entropy(x).sum(), x)
    torch.testing.assert_close(grad, expected)
    assert (grad[:, 2::4] == 0).all()


@pytest.mark.parametrize("n_classes", [2, 40])
@pytest.mark.parametrize("largest", [torch.inf, -torch.inf, 1.0, torch.nan])
def test_the_lse_of_a_row_with_nan_is_nan(largest: float, n_classes: int, isa: str) -> None:
    x = torch.full((1, n_classes), largest)
    y = torch.tensor([0])
    torch.testing.assert_close(functional.cross_entropy(x, y, return_lse=True).lse, x.logsumexp(1), equal_nan=True)
    x[0, 0] = torch.nan
    assert functional.cross_entropy(x, y, return_lse=True).lse.isnan().all()


def test_an_entropy_that_is_changed_in_place_does_not_stop_the_other_gradients() -> None:
    x, target = logits_and_target()
    inputs, weight, linear_target = linear_arguments()
    for output, leaf in (
        (functional.cross_entropy(x.requires_grad_(), target, **RETURNS), x),
        (functional.linear_cross_entropy(inputs, weight, linear_target, **RETURNS), inputs),
    ):
        output.entropy.detach().div_(2)  # nats to other units, for a log
        (output.loss + output.lse.sum()).backward(retain_graph=True)
        assert leaf.grad.isfinite().all()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            output.entropy.sum().backward()


@pytest.mark.parametrize("autocast", [False, True])
def test_an_accuracy_leaves_the_gradients_to_forward(autocast: bool) -> None:
    inputs, weight, target = linear_arguments()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = functional.linear_cross_entropy(inputs, weight, target, return_token_accuracy=True)
        expected = functional.linear_cross_entropy(inputs, weight, target, return_token_accuracy=True, return_lse=True)
    assert output.lse is None
    torch.testing.assert_close(output.loss, expected.loss)
    assert output.token_accuracy == expected.token_accuracy
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        output.loss.backward()
    assert "charlm::_linear_cross_entropy_gradients" not in {event.name for event in profile.events()}


def test_private_ops_check_the_gradients_of_the_metrics() -> None:
    x, target = logits_and_target()
    numbers = (1, -100, 0.0, 0.0, 0.0, 1.0, False)
    _, state = torch.ops.charlm.cross_entropy(x, target, None, None, *numbers)
    backward = torch.ops.charlm._cross_entropy_backward
    row, one = torch.ones(40), torch.ones(())
    with pytest.raises(RuntimeError, match="grad_entropy needs entropy"):
        backward(one, x, target, None, None, state, None, row, None, [True, False], *numbers)
    with pytest.raises(RuntimeError, match=r"must have shape \[40\]"):
        backward(one, x, target, None, None, state, row[:3], None, None, [True, False], *numbers)
    inputs, weight, linear_target = linear_arguments()
    gradients = torch.ops.charlm._linear_cross_entropy_gradients
    tensors = (inputs.detach(), weight.detach(), linear_target, None, None, None, False, 0, 0)
    with pytest.raises(RuntimeError, match="grad_entropy needs entropy"):
        gradients(one, None, row, None, [True, True, False], *tensors, *numbers)
    with pytest.raises(RuntimeError, match=r"must have shape \[40\]"):
        gradients(one, row[:3], None, None, [True, True, False], *tensors, *numbers)
    assert gradients(one, None, None, None, [True, True, True], *tensors, *numbers)[3].shape == (0,)  # there is no bias


def test_an_in_place_forward_needs_a_reduction_with_metrics_too() -> None:
    x, target = logits_and_target()
    with torch.no_grad(), pytest.raises(ValueError, match='needs reduction "mean" or "sum"'):
        functional.cross_entropy(x, target, inplace="forward", reduction="none", return_lse=True)
