"""The gradients of the returned lse and entropy, and the dtype of the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from charlm import functional, nn, reference

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


# --------------------------------------------------------------------------------------- loss_dtype, weight, shift


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_a_float32_loss_of_half_logits_is_not_rounded(reduction: str, dtype: torch.dtype) -> None:
    x, target = logits_and_target(2000)
    half, weight = x.to(dtype).requires_grad_(), torch.randn(27, 27).to(dtype)
    loss = functional.cross_entropy(half, target, reduction=reduction, loss_dtype=torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(half.float(), target, reduction=reduction))
    (ours,) = torch.autograd.grad(loss.sum(), half)
    (theirs,) = torch.autograd.grad(F.cross_entropy(half.float(), target, reduction=reduction).sum(), half)
    torch.testing.assert_close(ours, theirs)
    linear = functional.linear_cross_entropy(half, weight, target, reduction=reduction, loss_dtype=torch.float32)
    assert linear.dtype == torch.float32
    expected = F.cross_entropy(half.float() @ weight.float().T, target, reduction=reduction)
    torch.testing.assert_close(linear, expected, rtol=2e-2, atol=2e-2)
    (ours,) = torch.autograd.grad(linear.sum(), half)
    assert ours.dtype == dtype


def test_a_loss_dtype_that_is_refused() -> None:
    x, target = logits_and_target()
    with pytest.raises(ValueError, match=r"loss_dtype must be the dtype of the logits, Float, .* got Double"):
        functional.cross_entropy(x, target, loss_dtype=torch.float64)
    with pytest.raises(TypeError, match=r"loss_dtype must be a torch\.dtype or None, not str"):
        functional.cross_entropy(x, target, loss_dtype="float32")
    with pytest.raises(ValueError, match="loss_dtype"):
        reference.cross_entropy(x, target, loss_dtype=torch.float64)


def test_a_float32_class_weight_of_half_logits() -> None:
    x, target = logits_and_target()
    half, weight = x.bfloat16().requires_grad_(), torch.linspace(0.5, 2, 27)
    loss = functional.cross_entropy(half, target, weight)
    assert loss.dtype == torch.bfloat16
    torch.testing.assert_close(loss, F.cross_entropy(half.float(), target, weight).bfloat16())
    (ours,) = torch.autograd.grad(loss, half)
    (theirs,) = torch.autograd.grad(F.cross_entropy(half.float(), target, weight), half)
    torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-5)
    with pytest.raises(RuntimeError, match="expected scalar type"):
        functional.cross_entropy(x, target, weight.bfloat16())


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


def linear_arguments(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    x, _ = logits_and_target(40, 6)
    weight = torch.randn(27, 6).to(dtype)
    return x.to(dtype).requires_grad_(), weight.requires_grad_(), torch.arange(40) * 7 % 27


@pytest.mark.parametrize("weight_dtype", [torch.bfloat16, torch.float32])
def test_a_linear_loss_in_float32_takes_a_class_weight_of_either_dtype(weight_dtype: torch.dtype) -> None:
    x, weight, target = linear_arguments(torch.bfloat16)
    options: dict[str, Any] = {"weight": torch.linspace(0.5, 2, 27).to(weight_dtype), "loss_dtype": torch.float32}
    results = []
    for f in (functional, reference):
        loss = f.linear_cross_entropy(x, weight, target, **options)
        assert loss.dtype == torch.float32
        first = torch.autograd.grad(loss, (x, weight), create_graph=True)
        results.append((loss, *first, *torch.autograd.grad(first[0].float().square().sum(), (x, weight))))
    torch.testing.assert_close(results[0], results[1], rtol=0.03, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_metrics_beside_an_explicit_half_loss(dtype: torch.dtype) -> None:
    x, weight, target = linear_arguments(dtype)
    output = functional.linear_cross_entropy(x, weight, target, loss_dtype=dtype, **RETURNS)
    assert output.loss.dtype == dtype
    logits, probabilities = torch.randn(4, 27), torch.rand(4, 27, dtype=torch.float64).softmax(1)
    output = functional.cross_entropy(logits, probabilities, loss_dtype=torch.float64, return_predicted_tokens=True)
    assert output.loss.dtype == torch.float64
    assert output.predicted_tokens.equal(logits.argmax(1))


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


def test_shift_checks_its_tensors_first() -> None:
    with pytest.raises(TypeError, match="target"):
        functional.linear_cross_entropy(torch.zeros(4, 3), torch.zeros(5, 3), None, shift=1)


@pytest.mark.parametrize("block_rows", [0, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_linear_cross_entropy_refuses_the_loss_dtypes_that_cross_entropy_refuses(
    dtype: torch.dtype, block_rows: int
) -> None:
    inputs, weight, target = linear_arguments(dtype)
    target[:block_rows] = -100  # ignored targets take another path
    for loss_dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64):
        if loss_dtype in (dtype, torch.promote_types(dtype, torch.float32)):
            loss = functional.linear_cross_entropy(inputs, weight, target, loss_dtype=loss_dtype)
            assert loss.dtype == loss_dtype
        else:
            with pytest.raises(ValueError, match="loss_dtype must be"):
                functional.linear_cross_entropy(inputs, weight, target, loss_dtype=loss_dtype)


def test_the_reference_refuses_a_loss_dtype_of_promoted_probabilities() -> None:
    logits, probabilities = torch.randn(4, 27), torch.rand(4, 27, dtype=torch.float64).softmax(1)
    for f in (functional.cross_entropy, reference.cross_entropy):
        with pytest.raises(ValueError, match="loss_dtype must be"):
            f(logits, probabilities, loss_dtype=torch.float32)


def test_the_bias_gradient_of_many_rows_is_rounded_once() -> None:
    x, weight, target = torch.zeros(262144, 1), torch.randn(2, 1), torch.zeros(262144, dtype=torch.long)
    bias = torch.tensor([0.3, -0.2], requires_grad=True)
    (grad,) = torch.autograd.grad(functional.linear_cross_entropy(x, weight, target, linear_bias=bias), bias)
    p = bias.detach().double().softmax(0)
    torch.testing.assert_close(grad.double(), torch.stack([p[0] - 1, p[1]]), rtol=2e-7, atol=0)


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_an_ignored_row_has_no_gradient_whatever_the_factor(factor: float) -> None:
    inputs, weight, target = linear_arguments()
    target[3] = -100
    loss = functional.linear_cross_entropy(inputs, weight, target)
    (grad,) = torch.autograd.grad(loss, inputs, torch.tensor(factor))
    assert (grad[3] == 0).all()
    assert not grad[4].isfinite().any()


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
