"""inplace="backward" and inplace="forward": no misuse goes unseen, eager or compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from charlm.functional import cross_entropy

in_both_modes = pytest.mark.parametrize("mode", ["backward", "forward"])


@pytest.fixture
def leaf() -> torch.Tensor:
    return torch.randn(33, 27, requires_grad=True)


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randint(27, (33,)).masked_fill(torch.rand(33) < 0.2, -100)


def _expected_gradient(leaf: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    x = leaf.detach().clone().requires_grad_()
    cross_entropy(x * 2, *args, **options).backward()
    return x.grad


@in_both_modes
def test_a_leaf_that_requires_grad_is_refused_before_anything_is_written(
    mode: str, leaf: torch.Tensor, target: torch.Tensor
) -> None:
    before, version = leaf.detach().clone(), leaf._version
    for logits, labels in ((leaf, target), (leaf.view(3, 11, 27).transpose(1, 2), target.view(3, 11))):
        with pytest.raises(RuntimeError, match="leaf"):
            cross_entropy(logits, labels, inplace=mode)
    assert torch.equal(leaf.detach(), before)
    assert leaf._version == version


@in_both_modes
def test_expanded_logits_are_refused_before_anything_is_written(mode: str, target: torch.Tensor) -> None:
    row = torch.randn(1, 27, requires_grad=True) * 1
    before = row.detach().clone()
    with pytest.raises(RuntimeError):
        cross_entropy(row.expand(33, 27), target, inplace=mode)
    assert torch.equal(row.detach(), before)


@in_both_modes
def test_a_bad_target_is_refused_before_anything_is_written(mode: str, leaf: torch.Tensor, isa: str) -> None:
    logits = leaf * 2
    before = logits.detach().clone()
    with pytest.raises(IndexError, match="target 27 at position \\(32,\\)"):
        cross_entropy(logits, torch.tensor([0] * 32 + [27]), inplace=mode)
    # A CUDA kernel finds the target when it comes to its row: that row stays as it is.
    untouched = slice(32, None) if isa == "emulated" else slice(None)
    assert torch.equal(logits.detach()[untouched], before[untouched])


def test_inplace_forward_with_reduction_none_is_refused(leaf: torch.Tensor, target: torch.Tensor) -> None:
    logits = leaf * 2
    before = logits.detach().clone()
    with pytest.raises(ValueError, match='inplace="forward" needs reduction'):
        cross_entropy(logits, target, reduction="none", inplace="forward")
    assert torch.equal(logits.detach(), before)


@in_both_modes
def test_logits_and_probabilities_of_different_dtypes_are_refused(mode: str) -> None:
    probabilities = torch.randn(33, 27).softmax(1)
    for logits, target in (
        (torch.randn(33, 27).bfloat16(), probabilities),
        (torch.randn(33, 27), probabilities.bfloat16()),
    ):
        logits.requires_grad_()
        before = logits.detach().clone()
        with pytest.raises(RuntimeError, match="of one dtype: convert them to Float, or use inplace=None"):
            cross_entropy(logits * 1, target, inplace=mode)
        assert torch.equal(logits.detach(), before)


@in_both_modes
def test_without_grad_nothing_is_written(mode: str, target: torch.Tensor) -> None:
    expected = torch.randn(33, 27)
    for logits, grad_mode in (
        (expected.clone(), torch.enable_grad()),  # nothing requires grad
        (expected.clone().requires_grad_(), torch.no_grad()),
        (expected.clone().requires_grad_() * 1, torch.no_grad()),
        (expected.clone().requires_grad_() * 1, torch.inference_mode()),
    ):
        version = logits._version
        with grad_mode:
            loss = cross_entropy(logits, target, inplace=mode)
        torch.testing.assert_close(loss, F.cross_entropy(expected, target))
        assert torch.equal(logits.detach(), expected)
        assert logits._version == version


@in_both_modes
def test_a_later_differentiable_use_of_the_logits_raises(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    for use in (torch.exp, torch.sum, lambda x: x * 3):
        logits = leaf * 2
        loss = cross_entropy(logits, target, inplace=mode)
        with pytest.raises(RuntimeError):
            (loss + use(logits).sum()).backward()


@in_both_modes
def test_a_later_differentiable_use_through_the_base_of_a_view_raises(mode: str) -> None:
    leaf, target = torch.randn(3, 11, 27, requires_grad=True), torch.randint(27, (33,))
    for use in (torch.exp, torch.sum, lambda x: x * 3):
        logits = leaf * 2
        loss = cross_entropy(logits.view(-1, 27), target, inplace=mode)
        with pytest.raises(RuntimeError):
            (loss + use(logits).sum()).backward()


@in_both_modes
def test_a_later_differentiable_use_through_another_view_raises(mode: str) -> None:
    leaf, target = torch.randn(3, 11, 27, requires_grad=True), torch.randint(27, (33,))
    logits = leaf * 2
    other = logits[:, 0]
    loss = cross_entropy(logits.view(-1, 27), target, inplace=mode)
    with pytest.raises(RuntimeError):
        (loss + other.exp().sum()).backward()


@in_both_modes
def test_an_earlier_use_that_saved_the_logits_raises_and_is_not_corrupted(
    mode: str, leaf: torch.Tensor, target: torch.Tensor
) -> None:
    logits = leaf * 2
    penalty = logits.square().mean()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (penalty + cross_entropy(logits, target, inplace=mode)).backward()


@in_both_modes
def test_the_view_of_a_base_is_the_normal_case_and_right(mode: str, isa: str) -> None:
    target = torch.randint(27, (3, 11))
    gradients = []
    for inplace in (mode, None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 27)
        logits = layer(torch.randn(3, 11, 16))
        cross_entropy(logits.view(-1, 27), target.view(-1), inplace=inplace).backward()
        gradients.append([layer.weight.grad, layer.bias.grad])
    torch.testing.assert_close(gradients[0], gradients[1])


@in_both_modes
@pytest.mark.parametrize("upstream", [torch.exp, torch.tanh, torch.sigmoid, torch.relu])
def test_an_upstream_op_that_saved_its_output_raises_and_is_not_corrupted(
    mode: str, upstream: Any, leaf: torch.Tensor, target: torch.Tensor
) -> None:
    loss = cross_entropy(upstream(leaf), target, inplace=mode)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert leaf.grad is None


@in_both_modes
def test_a_second_backward_raises(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    loss = cross_entropy(leaf * 2, target, inplace=mode)
    loss.backward(retain_graph=True)
    first = leaf.grad.clone()
    with pytest.raises(RuntimeError):
        loss.backward()
    assert torch.equal(leaf.grad, first)


@in_both_modes
def test_a_second_backward_from_another_loss_raises(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    loss = cross_entropy(leaf * 2, target, inplace=mode)
    torch.autograd.grad(loss * 2, leaf, retain_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(loss * 3, leaf)


@in_both_modes
def test_a_double_backward_raises(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    loss = cross_entropy(leaf * 2, target, inplace=mode)

    def double_backward() -> None:
        (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
        gradient.sum().backward()

    with pytest.raises(RuntimeError):
        double_backward()


@in_both_modes
def test_functorch_gives_the_right_gradient_or_refuses(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    x = leaf.detach()
    try:
        gradient = torch.func.grad(lambda x: cross_entropy(x * 2, target, inplace=mode))(x)
    except RuntimeError:
        return
    torch.testing.assert_close(gradient, _expected_gradient(leaf, target))


@in_both_modes
def test_returns_are_those_of_the_logits_before_they_are_overwritten(
    mode: str, leaf: torch.Tensor, target: torch.Tensor
) -> None:
    returns = dict.fromkeys(["return_predicted_tokens", "return_token_accuracy"], True)
    if mode == "backward":  # "forward" overwrites what the gradients of lse and entropy need
        returns |= dict.fromkeys(["return_lse", "return_entropy"], True)
    output = cross_entropy(leaf * 2, target, inplace=mode, **returns)
    expected = cross_entropy(leaf * 2, target, **returns)
    for value, other in zip(output, expected, strict=True):
        torch.testing.assert_close(value, other)


@in_both_modes
def test_the_version_counter_counts_the_write(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    logits = leaf * 2
    version = logits._version
    cross_entropy(logits, target, inplace=mode).backward()
    assert logits._version > version


@in_both_modes
def test_the_schema_says_that_the_logits_are_written(mode: str) -> None:
    schema = getattr(torch.ops.charlm, f"cross_entropy_inplace_{mode}").default._schema
    assert schema.is_mutable
    assert schema.arguments[0].alias_info.is_write
    assert torch._C._dispatch_has_kernel_for_dispatch_key(schema.name, "ADInplaceOrView")


@in_both_modes
def test_compiled_with_the_logits_as_graph_input_the_gradient_is_right(mode: str) -> None:
    target = torch.randint(27, (33,))
    compiled = torch.compile(lambda x: cross_entropy(x, target, inplace=mode) * 2, backend="aot_eager")
    leaf = torch.randn(33, 27, requires_grad=True)
    compiled(leaf * 2).backward()
    torch.testing.assert_close(leaf.grad, 2 * _expected_gradient(leaf, target))


@in_both_modes
def test_compiled_with_the_logits_as_an_intermediate_the_gradient_is_right(mode: str) -> None:
    target = torch.randint(27, (33,))
    compiled = torch.compile(lambda x: cross_entropy(x * 2, target, inplace=mode), backend="aot_eager")
    leaf = torch.randn(33, 27, requires_grad=True)
    compiled(leaf).backward()
    torch.testing.assert_close(leaf.grad, _expected_gradient(leaf, target))


@in_both_modes
def test_a_leaf_is_refused_under_compile_too(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    before = leaf.detach().clone()
    compiled = torch.compile(lambda x: cross_entropy(x, target, inplace=mode), backend="aot_eager")
    with pytest.raises(RuntimeError):
        compiled(leaf)
    assert torch.equal(leaf.detach(), before)


@in_both_modes
def test_compiling_the_full_graph_in_place_is_refused(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    compiled = torch.compile(lambda x: cross_entropy(x * 2, target, inplace=mode), backend="aot_eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        compiled(leaf)
