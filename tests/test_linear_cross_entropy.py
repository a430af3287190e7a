"""linear_cross_entropy on every sample, dtype, instruction set, block and kind of product, against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from linear_cross_entropy_support import arguments, leaves_rows_out, needs_torchs, op_with, ops_of
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
OWN, WIDENED = 1, 2  # Gemm in csrc/ops/linear_cross_entropy_op.h
HALF = (torch.bfloat16, torch.float16)


# --- results --------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(sample: SampleInput, isa: str) -> None:
    assert_matches_reference(functional.linear_cross_entropy, reference.linear_cross_entropy, sample)


@pytest.mark.covering
@pytest.mark.parametrize("block_rows", [1, 3, 16, 5000])
@pytest.mark.parametrize("sample", IN_BLOCKS)
def test_blocks_of_any_size_are_as_close(sample: SampleInput, block_rows: int) -> None:
    if block_rows < 16 and sample.arguments["linear_weight"].shape[0] > 600:
        return  # a sum of so many classes is another one, less exact, in torch's product of a row with a matrix
    baseline = _row_by_row if block_rows == 1 and sample.name == "none" else reference.linear_cross_entropy
    assert_matches_reference(op_with(block_rows), baseline, sample)


def _row_by_row(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """torch's, with one row at a time: autograd adds up the weight's gradients in this order too."""
    rows = zip(input.split(1), target.split(1), strict=True)
    return torch.cat([reference.linear_cross_entropy(row, linear_weight, t, **options) for row, t in rows])


@pytest.mark.covering
@pytest.mark.parametrize("gemm", [OWN, WIDENED])
@pytest.mark.parametrize("block_rows", [0, 7])
@pytest.mark.parametrize("sample", [p for p in IN_BLOCKS if p.values[0].arguments["input"].dtype in HALF])
def test_products_of_half_types_in_either_dtype_are_as_close(sample: SampleInput, block_rows: int, gemm: int) -> None:
    assert_matches_reference(op_with(block_rows, gemm), reference.linear_cross_entropy, sample)


@pytest.mark.usefixtures("isa")
def test_products_of_a_weight_larger_than_a_cache() -> None:
    n_features, n_classes = 130, 9000  # of which our own loops read 2^20 numbers at once
    given = [t.detach() for t in arguments(256, n_features, n_classes)]
    sample = SampleInput(
        "large", dict(zip(("input", "linear_weight", "target"), given, strict=True)), ("input", "linear_weight")
    )
    sample.arguments["linear_weight"] /= n_features**0.5
    sample.arguments["linear_bias"] = torch.randn(n_classes)
    assert_matches_reference(op_with(), reference.linear_cross_entropy, sample)


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


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("n_rows", "n_features", "n_classes"),
    [
        (3000, 40, 27),  # long sums, in parts
        (1300, 300, 5),  # blocks of columns, too
        (100, 500, 31),  # blocks of rows, and sums that are added to others
        (31, 33, 400),
        (15, 70, 9),  # W^T stays as it is
        (97, 1, 1),
    ],
)
def test_products_with_a_short_side(n_rows: int, n_features: int, n_classes: int, dtype: torch.dtype, isa: str) -> None:
    x, weight, target = (t.detach() for t in arguments(n_rows, n_features, n_classes, dtype))
    bias = torch.randn(n_classes, dtype=dtype)
    given = {"input": x, "linear_weight": weight / n_features**0.5, "target": target, "linear_bias": bias}
    sample = SampleInput("short", given, ("input", "linear_weight", "linear_bias"), float64_ulps=64)
    assert_matches_reference(functional.linear_cross_entropy, reference.linear_cross_entropy, sample)
    assert_matches_reference(op_with(block_rows=40), reference.linear_cross_entropy, sample)


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


@leaves_rows_out
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
    metrics = dict.fromkeys(("return_lse", "return_entropy", "return_predicted_tokens", "return_token_accuracy"), True)
    ours = functional.linear_cross_entropy(x, weight, target, reduction=reduction, **metrics)
    theirs = reference.cross_entropy(F.linear(x, weight), target, reduction=reduction, **metrics)
    torch.testing.assert_close(ours, theirs)


# --- backward -------------------------------------------------------------------------------------------------


@pytest.mark.covering
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


@pytest.mark.usefixtures("torchs_products")
def test_forward_and_backward_of_a_mean_are_three_products() -> None:
    x, weight, target = arguments(40, 41, 42)  # shorter ones are not torch's
    names = ops_of(lambda: functional.linear_cross_entropy(x, weight, target).backward())
    assert names.count("aten::mm") + names.count("aten::addmm") == 3
    assert "charlm::_linear_cross_entropy_gradients" in names


def test_hooks_on_saved_tensors_get_all_that_is_kept() -> None:
    x, weight, target = arguments()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        names = ops_of(lambda: functional.linear_cross_entropy(x, weight, target))
    assert "charlm::_linear_cross_entropy_gradients" not in names


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
        results.append((*loss[:2], *torch.autograd.grad(loss[0].sum(), (x, weight))))  # the loss and the lse
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=5e-2, atol=2e-2 * theirs.abs().max().item())


def test_probabilities_under_autocast_take_the_whole_logits() -> None:
    x, weight, _ = arguments()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.linear_cross_entropy(x, weight, torch.randn(33, 27).softmax(1))
    assert loss.dtype == torch.float32
