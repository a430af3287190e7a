"""linear_cross_entropy around its results: errors, memory, torch's options, modules and patches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_support import EMULATED, arguments, leaves_rows_out, needs_torchs, op_with, ops_of
from torch import Tensor

import charlm
from charlm import functional

# --- errors -------------------------------------------------------------------------------------------------------

_SHAPES = {
    "expected input with dimensionality 1 or 2, got 3": ((2, 3, 4), (5, 4), (2,), {}),
    "expected linear_weight with dimensionality at least 2, got 1": ((3, 4), (4,), (3,), {}),
    "expected equal input and linear_weight last dimensions (in_features), got 4 and 5, respectively": (
        (3, 4),
        (7, 5),
        (3,),
        {},
    ),
    "expected linear_bias shape (7,), got (3,)": ((3, 4), (7, 4), (3,), {"linear_bias": torch.zeros(3)}),
    "K-dimensional loss defined by linear_weight shape (7, 2, 4) requires batched input, (N, 4), got unbatched input "
    "with shape (4,)": ((4,), (7, 2, 4), (2,), {}),
    "Expected input batch_size (3) to match target batch_size (2).": ((3, 4), (7, 4), (2,), {}),
    "weight tensor should be defined either for all 7 classes or no classes but got weight tensor of shape: [3]": (
        (3, 4),
        (7, 4),
        (3,),
        {"weight": torch.ones(3)},
    ),
}


@pytest.mark.parametrize("sentence", _SHAPES)
def test_shapes_that_do_not_fit_are_torchs_errors_word_for_word(sentence: str) -> None:
    x, weight, target, options = _SHAPES[sentence]
    tensors = (torch.zeros(x), torch.zeros(weight), torch.zeros(target, dtype=torch.int64))
    kinds = []
    for f in (functional, F) if hasattr(F, "linear_cross_entropy") else (functional,):
        with pytest.raises((RuntimeError, ValueError)) as raised:
            f.linear_cross_entropy(*tensors, **options)
        assert str(raised.value) == sentence
        kinds.append(raised.type)
    assert len(set(kinds)) == 1


@pytest.mark.parametrize("block_rows", [0, 4])
@pytest.mark.parametrize("value", [27, -1, 700])
def test_a_bad_target_is_named_with_its_position_among_all(value: int, block_rows: int) -> None:
    x, weight, target = arguments()
    target[1::2] = -100
    target[30] = value
    with pytest.raises(IndexError, match=f"target {value} at position \\(30,\\) is out of range for 27 classes"):
        op_with(block_rows)(x, weight, target)


def test_an_unsigned_target_that_wraps_to_minus_100_is_not_ignored() -> None:
    target = torch.tensor([0, 2**64 - 100], dtype=torch.uint64)
    with pytest.raises(IndexError, match=f"target {2**64 - 100} at position \\(1,\\)"):
        functional.linear_cross_entropy(torch.randn(2, 3), torch.randn(27, 3), target)


def test_other_arguments_that_are_refused() -> None:
    x, weight, target = arguments()
    f, p = functional.linear_cross_entropy, torch.rand(33, 27)
    with pytest.raises(RuntimeError, match="ignore_index cannot be specified when target contains probabilities"):
        f(x, weight, p, ignore_index=-100)
    with pytest.raises(RuntimeError, match="expected input and linear_weight to have the same dtype, but got Float"):
        f(x, weight.bfloat16(), target)
    with pytest.raises(ValueError, match="softcap must be > 0, got -1"):
        f(x, weight, target, softcap=-1.0)
    with pytest.raises(ValueError, match="all_ignored must be"):
        f(x, weight, target, all_ignored="none")
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        f(x, weight, target, reduction="max")
    with pytest.raises(RuntimeError, match="'weight' is not implemented for class indices"):
        f(x, weight, target, weight=torch.ones(27, requires_grad=True))
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        f(target[:, None], target[:27, None], target)
    with pytest.raises(RuntimeError, match="input is on cpu and linear_weight is on meta"):
        f(x, weight.to("meta"), target)
    with pytest.raises(ValueError, match='with reduction "none" the gradients need that of each loss'):
        torch.ops.charlm._linear_cross_entropy_gradients.default(
            *[None] * 4,
            [True] * 3,
            x.detach(),
            weight.detach(),
            target,
            None,
            None,
            None,
            False,
            0,
            0,
            0,
            -100,
            0.0,
            0.0,
            0.0,
            1.0,
            False,
        )


# --- memory, options, modules -------------------------------------------------------------------------------------


@pytest.mark.skipif(EMULATED, reason="128 million logits take an emulator minutes")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_call_needs_less_than_100_mb_beyond_its_gradients(dtype: torch.dtype, reduction: str) -> None:
    from bench.measure import peak_bytes

    x, weight, target = arguments(16384, 8, 8192, dtype)  # logits of 512 MB in float
    gradients = (x.numel() + weight.numel()) * x.element_size()
    if dtype == torch.bfloat16:
        gradients += weight.numel() * 4
    target[::2] = -100

    def call() -> object:
        loss = functional.linear_cross_entropy(x, weight, target, reduction=reduction)
        return torch.autograd.grad(loss, (x, weight), torch.ones_like(loss))

    assert peak_bytes(call) - gradients < 100e6


def test_few_classes_give_the_same_bits_for_any_number_of_threads(n_threads: int, isa: str) -> None:
    def results() -> list[Tensor]:
        torch.manual_seed(0)
        x, weight, target = arguments(1111, 70, 27)
        bias = torch.randn(27, requires_grad=True)
        loss = functional.linear_cross_entropy(x, weight, target, linear_bias=bias)
        return [loss.detach(), *torch.autograd.grad(loss, (x, weight, bias))]

    several = results()
    torch.set_num_threads(1)
    try:
        one = results()
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(a, b) for a, b in zip(one, several, strict=True))


@leaves_rows_out
@pytest.mark.usefixtures("torchs_products")
def test_ignored_rows_are_left_out_of_the_products() -> None:
    x, weight, target = arguments(64, 41, 42)
    target[40:] = -100
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        functional.linear_cross_entropy(x, weight, target).backward()
    shapes = [event.input_shapes for event in profile.events() if event.name == "aten::mm"]
    assert shapes
    assert all(64 not in shape for shapes_of_one in shapes for shape in shapes_of_one)


@needs_torchs
def test_options_set_the_rows_of_a_block() -> None:
    x, weight, target = arguments(64)

    def n_products(**options: Any) -> int:
        options = torch.nn.LinearCrossEntropyOptions(**options)
        names = ops_of(lambda: functional.linear_cross_entropy(x, weight, target, options=options))
        return names.count("charlm::cross_entropy_of_rows_")

    assert n_products() == 0  # so few logits are computed without blocks
    assert n_products(batch_chunk_size=16) == 4
    assert n_products(chunking_method="aspect_ratio:4") == 8
    assert n_products(batch_chunk_size=64, acc_policy="compact", allow_retain_graph=False) == (0 if EMULATED else 1)
    with pytest.raises(ValueError, match="give different chunk sizes"):
        n_products(batch_chunk_size=5, chunking_method="aspect_ratio")


MODULES = [{}, {"bias": True}, {"out_features": (3, 2), "bias": True}, {"reduction": "none", "ignore_index": 3}]


@needs_torchs
@pytest.mark.parametrize("options", MODULES, ids=str)
def test_a_module_of_the_same_seed_is_torchs(options: dict[str, Any]) -> None:
    target = torch.randint(27, (33, *options.get("out_features", ())))
    x, results = torch.randn(33, 19), []
    for class_ in (charlm.nn.LinearCrossEntropyLoss, torch.nn.LinearCrossEntropyLoss):
        torch.manual_seed(0)
        module = class_(19, 27, weight=torch.ones(27), label_smoothing=0.1, **options)
        loss = module(x, target)
        loss.sum().backward()
        results.append((repr(module), list(module.state_dict()), loss.detach(), module.linear.weight.grad))
    assert results[0][:2] == results[1][:2]
    torch.testing.assert_close(results[0][2:], results[1][2:], rtol=1e-5, atol=1e-6)


def test_a_module_takes_the_extras_and_shows_them() -> None:
    module = charlm.nn.LinearCrossEntropyLoss(19, 27, lse_square_scale=0.1, return_lse=True)
    assert "lse_square_scale=0.1, return_lse=True" in repr(module)
    x, _, target = arguments()
    expected = functional.linear_cross_entropy(
        x, module.linear.weight, target, lse_square_scale=0.1, return_lse=True, token_weight=torch.ones(33)
    )
    torch.testing.assert_close(module(x, target, torch.ones(33)), expected)
    with pytest.raises(TypeError, match="unexpected keyword argument 'inplace'"):
        charlm.nn.LinearCrossEntropyLoss(19, 27, inplace="forward")
    with pytest.raises(RuntimeError, match=r"expected weight shape to be \(27,\), got \(3,\)"):
        charlm.nn.LinearCrossEntropyLoss(19, 27, weight=torch.ones(3))
    with pytest.raises(RuntimeError, match=r"expected label_smoothing to be in range \[0, 1\], got 2"):
        charlm.nn.LinearCrossEntropyLoss(19, 27, label_smoothing=2.0)


@needs_torchs
def test_patches_reach_torchs_function_and_module() -> None:
    module = torch.nn.LinearCrossEntropyLoss(19, 27)
    x, _, target = arguments()
    with charlm.patch_torch():
        assert F.linear_cross_entropy is functional.linear_cross_entropy
        assert "charlm::linear_cross_entropy" in ops_of(lambda: module(x, target))
    assert F.linear_cross_entropy is not functional.linear_cross_entropy
    assert type(charlm.patch_model(module)) is charlm.nn.LinearCrossEntropyLoss
    assert "charlm::linear_cross_entropy" in ops_of(lambda: module(x, target))


def test_a_subclass_of_tensor_decides_for_itself() -> None:
    class Logged(torch.Tensor):
        seen: tuple[Any, ...] = ()

        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            cls.seen = (*cls.seen, function)
            return super().__torch_function__(function, types, args, kwargs or {})

    x, weight, target = arguments()
    loss = functional.linear_cross_entropy(x.detach().as_subclass(Logged), weight, target)
    assert functional.linear_cross_entropy in Logged.seen
    torch.testing.assert_close(loss.as_subclass(torch.Tensor), functional.linear_cross_entropy(x, weight, target))


# --- gradients ----------------------------------------------------------------------------------------------------


def test_the_bias_gradient_of_many_rows_is_rounded_once() -> None:
    x, weight, target = torch.zeros(262144, 1), torch.randn(2, 1), torch.zeros(262144, dtype=torch.long)
    bias = torch.tensor([0.3, -0.2], requires_grad=True)
    (grad,) = torch.autograd.grad(functional.linear_cross_entropy(x, weight, target, linear_bias=bias), bias)
    p = bias.detach().double().softmax(0)
    torch.testing.assert_close(grad.double(), torch.stack([p[0] - 1, p[1]]), rtol=2e-7, atol=0)


@pytest.mark.parametrize("factor", [torch.inf, torch.nan])
def test_an_ignored_row_has_no_gradient_whatever_the_factor(factor: float) -> None:
    inputs, weight, target = arguments(40, 6, 27)
    target[3] = -100
    loss = functional.linear_cross_entropy(inputs, weight, target)
    (grad,) = torch.autograd.grad(loss, inputs, torch.tensor(factor))
    assert (grad[3] == 0).all()
    assert not grad[4].isfinite().any()
