"""linear_cross_entropy on every sample, dtype, instruction set, block and kind of product, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import charlm
from charlm import functional, reference
from charlm.reference import INDEX_DTYPES
from charlm.testing import (
    FLOAT_DTYPES,
    SampleInput,
    assert_matches_reference,
    evaluate,
    sample_inputs_linear_cross_entropy,
)

SAMPLES = [
    pytest.param(sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_linear_cross_entropy(dtype)
]
IN_BLOCKS = [
    parameter
    for parameter in SAMPLES
    if parameter.values[0].arguments["linear_weight"].dim() == 2 and "return_lse" not in parameter.values[0].arguments
]
OWN, WIDENED = 1, 2  # csrc/linear_cross_entropy.h, Gemm
HALF = (torch.bfloat16, torch.float16)
needs_torchs = pytest.mark.skipif(
    not hasattr(F, "linear_cross_entropy"), reason="this torch has no linear_cross_entropy"
)


def op_with(block_rows: int = 0, gemm: int = 0) -> Callable[..., Tensor]:
    """The op with blocks and products that `functional` leaves to it."""

    def op(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        *,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        token_weight: Tensor | None = None,
        reduction: str = "mean",
        ignore_index: int = -100,
        label_smoothing: float = 0.0,
        lse_square_scale: float = 0.0,
        softcap: float = 0.0,
        logit_scale: float = 1.0,
        all_ignored: str = "nan",
    ) -> Tensor:
        tensors = (input, linear_weight, target, linear_bias, weight, token_weight)
        scalars = (ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, all_ignored == "zero")
        number = ("none", "mean", "sum").index(reduction)
        return torch.ops.charlm.linear_cross_entropy.default(*tensors, False, block_rows, gemm, number, *scalars)

    return op


def arguments(
    n_rows: int = 33, n_features: int = 19, n_classes: int = 27, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """Input, weight and target."""
    x, weight = torch.randn(n_rows, n_features), torch.randn(n_classes, n_features) / 3
    return (
        x.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        torch.randint(n_classes, (n_rows,)),
    )


# --- results --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(sample: SampleInput, isa: str) -> None:
    assert_matches_reference(functional.linear_cross_entropy, reference.linear_cross_entropy, sample)


@pytest.mark.parametrize("block_rows", [1, 3, 16, 5000])
@pytest.mark.parametrize("sample", IN_BLOCKS)
def test_blocks_of_any_size_are_as_close(sample: SampleInput, block_rows: int) -> None:
    if block_rows < 16 and sample.arguments["linear_weight"].shape[0] > 600:
        return  # a sum of so many classes is another one, less exact, in torch's product of a row with a matrix
    assert_matches_reference(op_with(block_rows), reference.linear_cross_entropy, sample)


@pytest.mark.parametrize("gemm", [OWN, WIDENED])
@pytest.mark.parametrize("block_rows", [0, 7])
@pytest.mark.parametrize("sample", [p for p in IN_BLOCKS if p.values[0].arguments["input"].dtype in HALF])
def test_products_of_half_types_in_either_dtype_are_as_close(sample: SampleInput, block_rows: int, gemm: int) -> None:
    assert_matches_reference(op_with(block_rows, gemm), reference.linear_cross_entropy, sample)


@pytest.mark.parametrize("gemm", [OWN, WIDENED])
def test_a_weight_of_several_parts_gives_the_same_gradients(gemm: int) -> None:
    n_features = 9000  # a part of the weight is 16 MB of float: 466 classes
    given = [t.detach() for t in arguments(40, n_features, 1000, torch.bfloat16)]
    sample = SampleInput(
        "parts", dict(zip(("input", "linear_weight", "target"), given, strict=True)), ("input", "linear_weight")
    )
    sample.arguments["linear_weight"] /= n_features**0.5
    sample.arguments["linear_bias"] = torch.randn(1000).bfloat16()
    assert_matches_reference(op_with(16, gemm), reference.linear_cross_entropy, sample)


@needs_torchs
@pytest.mark.parametrize("sample", list(sample_inputs_linear_cross_entropy(torch.float32)), ids=lambda s: s.name)
def test_a_call_without_extras_is_torchs(sample: SampleInput) -> None:
    known = (
        "linear_bias",
        "weight",
        "reduction",
        "ignore_index",
        "label_smoothing",
        *("input", "linear_weight", "target"),
    )
    if any(name not in known for name in sample.arguments) or sample.arguments["target"].dtype in (torch.uint16,):
        return
    torch.testing.assert_close(
        evaluate(functional.linear_cross_entropy, sample), evaluate(F.linear_cross_entropy, sample), equal_nan=True
    )


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_every_integer_dtype_of_targets_gives_the_int64_result(dtype: torch.dtype, reduction: str) -> None:
    x, weight, target = arguments()
    expected = functional.linear_cross_entropy(x, weight, target, reduction=reduction)
    assert torch.equal(functional.linear_cross_entropy(x, weight, target.to(dtype), reduction=reduction), expected)


def test_only_the_gradients_that_are_wanted_are_made() -> None:
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        for reduction in ("mean", "none"):
            x, weight, target = arguments()
            given = [x.detach(), weight.detach(), torch.randn(27)]
            for tensor, is_wanted in zip(given, wanted, strict=True):
                tensor.requires_grad_(is_wanted)
            loss = functional.linear_cross_entropy(
                given[0], given[1], target, linear_bias=given[2], reduction=reduction
            )
            loss.sum().backward()
            assert tuple(tensor.grad is not None for tensor in given) == wanted


def test_an_ignored_row_of_nan_has_no_part_in_loss_or_gradients() -> None:
    x, weight, target = arguments()
    with torch.no_grad():
        x[3] = torch.nan
    target[3] = -100
    loss = functional.linear_cross_entropy(x, weight, target)
    loss.backward()
    assert loss.isfinite()
    assert not x.grad[3].any()
    assert weight.grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_returned_metrics_are_those_of_the_logits(reduction: str) -> None:
    x, weight, target = arguments(129, 19, 65)
    target[::3] = -100
    asked = dict.fromkeys(("return_lse", "return_entropy", "return_predicted_tokens", "return_token_accuracy"), True)
    ours = functional.linear_cross_entropy(x, weight, target, reduction=reduction, **asked)
    theirs = reference.cross_entropy(F.linear(x, weight), target, reduction=reduction, **asked)
    torch.testing.assert_close(ours, theirs)


# --- backward -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.5, 1 / 3, 0.0])
def test_a_second_backward_gives_the_gradients_of_the_first(dtype: torch.dtype, scale: float) -> None:
    x, weight, target = arguments(dtype=dtype)
    loss = functional.linear_cross_entropy(x, weight, target)
    factor = torch.tensor(scale, dtype=dtype)
    first = torch.autograd.grad(loss, (x, weight), factor, retain_graph=True)
    second = torch.autograd.grad(loss, (x, weight), factor)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(first, second, rtol=4 * eps, atol=4 * eps)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))


def _ops_of(call: Callable[[], Any]) -> list[str]:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        call()
    return [event.name for event in profile.events()]


def test_forward_and_backward_of_a_mean_are_three_products() -> None:
    x, weight, target = arguments()
    names = _ops_of(lambda: functional.linear_cross_entropy(x, weight, target).backward())
    assert names.count("aten::mm") + names.count("aten::addmm") == 3
    assert "charlm::linear_cross_entropy_gradients" in names


def test_hooks_on_saved_tensors_get_all_that_is_kept() -> None:
    x, weight, target = arguments()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        names = _ops_of(lambda: functional.linear_cross_entropy(x, weight, target))
    assert "charlm::linear_cross_entropy_gradients" not in names


def test_an_argument_that_is_changed_before_backward_raises() -> None:
    x, weight, target = arguments()
    loss = functional.linear_cross_entropy(x, weight, target)
    with torch.no_grad():
        weight.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_float16_gradients_survive_a_grad_scaler() -> None:
    x, weight, target = arguments(4096, 16, 256, torch.float32)
    exact = torch.autograd.grad(F.cross_entropy(F.linear(x, weight), target), (x, weight))
    with torch.autocast("cpu", dtype=torch.float16):
        loss = functional.linear_cross_entropy(x, weight, target)
    assert loss.dtype == torch.float32
    scale = 2.0**16
    for grad, expected in zip(torch.autograd.grad(loss * scale, (x, weight)), exact, strict=True):
        torch.testing.assert_close(grad / scale, expected, rtol=5e-2, atol=2e-3 * expected.abs().max().item())


def _small(probabilities: bool = False) -> tuple[Tensor, ...]:
    x, weight, target = (torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 4, -100, 2]))
    bias = torch.randn(5)
    if probabilities:
        target = torch.randn(4, 5).softmax(1).double()
    return (*(t.double().requires_grad_() for t in (x, weight, bias)), target)


OPTIONS = [
    {},
    {"reduction": "none"},
    {"reduction": "sum", "label_smoothing": 0.1, "softcap": 3.0, "logit_scale": 0.7, "lse_square_scale": 0.2},
    {"weight": torch.rand(5, dtype=torch.float64) + 0.5, "token_weight": torch.rand(4, dtype=torch.float64)},
]


@pytest.mark.parametrize("probabilities", [False, True])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "defaults")
def test_gradcheck_and_gradgradcheck(options: dict[str, Any], probabilities: bool) -> None:
    x, weight, bias, target = _small(probabilities)

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x, weight, target, linear_bias=bias, **options)

    assert torch.autograd.gradcheck(loss, (x, weight, bias))
    assert torch.autograd.gradgradcheck(loss, (x, weight, bias))


def test_probabilities_and_class_weights_may_require_grad() -> None:
    x, weight, _, target = _small(probabilities=True)
    class_weight = (torch.rand(5, dtype=torch.float64) + 0.5).requires_grad_()

    def loss(x: Tensor, weight: Tensor, target: Tensor, class_weight: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x, weight, target, weight=class_weight)

    assert torch.autograd.gradcheck(loss, (x, weight, target.requires_grad_(), class_weight))


_X, _W = torch.randn(4, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
_Y = torch.tensor([0, 4, -100, 2])


def _batched_grads(f: Callable[..., Tensor]) -> tuple[Tensor, ...]:
    x = _X.clone().requires_grad_()
    return torch.autograd.grad(f(x, _W, _Y), x, torch.tensor([1.0, 2.0]).double(), is_grads_batched=True)


TRANSFORMS: dict[str, Callable[[Callable[..., Tensor]], Any]] = {
    "grad": lambda f: torch.func.grad(f, argnums=(0, 1))(_X, _W, _Y),
    "vmap": lambda f: torch.func.vmap(f, in_dims=(0, None, None))(torch.stack([_X, 2 * _X]), _W, _Y),
    "vmap_of_weights": lambda f: torch.func.vmap(f, in_dims=(None, 0, None))(_X, torch.stack([_W, 2 * _W]), _Y),
    "per_sample": lambda f: torch.func.vmap(torch.func.grad(f), in_dims=(0, None, 0))(_X, _W, _Y.clamp(min=0)),
    "jvp": lambda f: torch.func.jvp(lambda x: f(x, _W, _Y), (_X,), (_X.cos(),)),
    "hessian": lambda f: torch.func.hessian(lambda w: f(_X, w, _Y))(_W),
    "jacrev": lambda f: torch.func.jacrev(lambda x: f(x, _W, _Y, reduction="none"))(_X),
    "batched_grads": _batched_grads,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_the_references_result(name: str) -> None:
    ours, theirs = (TRANSFORMS[name](module.linear_cross_entropy) for module in (functional, reference))
    torch.testing.assert_close(ours, theirs)


# --- torch.compile, export, autocast ------------------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_with_fullgraph_it_gives_the_eager_gradients(reduction: str, dynamic: bool) -> None:
    def loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x, weight, target, reduction=reduction).sum() * 3

    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n_rows in (33, 47):
        x, weight, target = arguments(n_rows)
        ours = torch.autograd.grad(compiled(x, weight, target), (x, weight))
        torch.testing.assert_close(ours, torch.autograd.grad(loss(x, weight, target), (x, weight)))


def test_an_exported_module_gives_the_eager_loss() -> None:
    module = charlm.nn.LinearCrossEntropyLoss(19, 27, bias=True)
    x, _, target = arguments()
    program = torch.export.export(module, (x.detach(), target))
    assert any("charlm.linear_cross_entropy" in str(node.target) for node in program.graph.nodes)
    torch.testing.assert_close(program.module()(x.detach(), target), module(x.detach(), target))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_gives_torchs_dtypes_and_no_larger_error(dtype: torch.dtype, reduction: str) -> None:
    x, weight, target = arguments(129, 33, 65, dtype)
    class_weight = torch.rand(65)
    results = []
    for f in (functional, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = f.linear_cross_entropy(x, weight, target, weight=class_weight, reduction=reduction, return_lse=True)
        results.append((loss.loss, loss.lse, *torch.autograd.grad(loss.loss.sum(), (x, weight))))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=2e-2 * theirs.abs().max().item())


def test_probabilities_under_autocast_take_the_whole_logits() -> None:
    x, weight, _ = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.linear_cross_entropy(x, weight, torch.randn(33, 27).softmax(1))
    assert loss.dtype == torch.float32


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


def test_a_block_of_logits_names_a_bad_target_with_its_position_among_all() -> None:
    target = torch.arange(33) % 27
    target[20] = 27
    scalars = (1, -100, 0.0, 0.0, 0.0, 1.0, False)
    with pytest.raises(IndexError, match=r"target 27 at position \(20,\) is out of range for 27 classes"):
        torch.ops.charlm.cross_entropy_block_.default(torch.randn(8, 27), target, None, None, None, 16, *scalars)


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
        torch.ops.charlm.linear_cross_entropy_gradients.default(
            None,
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_call_needs_less_than_100_mb_beyond_its_gradients(dtype: torch.dtype, reduction: str) -> None:
    from bench.memory import peak_bytes

    x, weight, target = arguments(16384, 8, 8192, dtype)  # logits of 512 MB in float
    gradients = (x.numel() + weight.numel()) * x.element_size()
    if dtype == torch.bfloat16:
        gradients += weight.numel() * 4
    target[::2] = -100

    def call() -> object:
        loss = functional.linear_cross_entropy(x, weight, target, reduction=reduction)
        return torch.autograd.grad(loss, (x, weight), torch.ones_like(loss))

    assert peak_bytes(call) - gradients < 100e6


def test_ignored_rows_are_left_out_of_the_products() -> None:
    x, weight, target = arguments(64)
    target[16:] = -100
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
        names = _ops_of(lambda: functional.linear_cross_entropy(x, weight, target, options=options))
        return names.count("charlm::cross_entropy_block_")

    assert n_products() == 1
    assert n_products(batch_chunk_size=16) == 4
    assert n_products(chunking_method="aspect_ratio:4") == 8
    assert n_products(batch_chunk_size=64, acc_policy="compact", allow_retain_graph=False) == 1
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
        assert "charlm::linear_cross_entropy" in _ops_of(lambda: module(x, target))
    assert F.linear_cross_entropy is not functional.linear_cross_entropy
    assert type(charlm.patch_model(module)) is charlm.nn.LinearCrossEntropyLoss
    assert "charlm::linear_cross_entropy" in _ops_of(lambda: module(x, target))


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
