"""linear_cross_entropy within a memory budget: whole logits, blocks of rows and tiles of classes, against float64.

Tiles are a GPU's: tests/test_cuda_emulated.py runs this file on the emulator too.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cross_entropy_support import EMULATED, arguments, ops_of
from torch import Tensor

import charlm
from charlm import _C, functional, reference
from charlm.testing import FLOAT_DTYPES, SampleInput, assert_matches_reference, sample_inputs_linear_cross_entropy

GB = 10**9
SAMPLES = [
    pytest.param(sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_linear_cross_entropy(dtype)
    if sample.arguments["linear_weight"].dim() == 2
    and "return_lse" not in sample.arguments
    and sample.arguments["linear_weight"].shape[0] > 60
]


def budget_of(sample: SampleInput, share: float) -> int:
    """Bytes for a share of the logits, and for a sum of the input's gradient in float."""
    x, weight = sample.arguments["input"], sample.arguments["linear_weight"]
    n_rows = max(1, x.numel() // x.shape[-1])
    in_float = 4 * x.numel() if x.element_size() == 2 else 0
    return max(1, int(share * n_rows * (weight.shape[0] + 8) * x.element_size()) + in_float)


# --- results --------------------------------------------------------------------------------------------------


@pytest.mark.covering
@pytest.mark.parametrize("share", [0.01, 0.3, 0.7, 2.0])
@pytest.mark.parametrize("sample", SAMPLES)
def test_every_plan_is_as_close_to_float64(sample: SampleInput, share: float) -> None:
    if share < 0.1 and sample.arguments["linear_weight"].shape[0] > 600:
        return  # see test_blocks_of_any_size_are_as_close

    def op(*tensors: Tensor, **options: Any) -> Any:
        return functional.linear_cross_entropy(*tensors, memory_budget=budget_of(sample, share), **options)

    assert_matches_reference(op, reference.linear_cross_entropy, sample)


def large(dtype: torch.dtype, n_rows: int = 512, n_features: int = 40, n_classes: int = 1003) -> SampleInput:
    """Enough rows and classes for several tiles, of which some fit into the gradient of the weight."""
    x, weight, target = (t.detach() for t in arguments(n_rows, n_features, n_classes, dtype))
    target[::7] = -100
    given = {"input": x, "linear_weight": weight, "target": target, "linear_bias": torch.randn(n_classes).to(dtype)}
    return SampleInput("large", given, ("input", "linear_weight", "linear_bias"), float64_ulps=64)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "none": {"reduction": "none"},
    "z_loss": {"lse_square_scale": 0.02},
    "softcap": {"softcap": 3.0, "logit_scale": 0.7},
    "weights": {"weight": torch.linspace(0.5, 1.5, 1003), "token_weight": torch.linspace(0, 2, 512)},
    "smoothing": {"label_smoothing": 0.1},
    "everything": {
        "weight": torch.linspace(0.5, 1.5, 1003),
        "token_weight": torch.linspace(0.1, 2, 512),
        "softcap": 3.0,
        "logit_scale": 0.7,
        "lse_square_scale": 0.02,
        "ignore_index": 5,
        "reduction": "none",
    },
}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_as_close_to_float64_in_tiles(name: str, dtype: torch.dtype) -> None:
    sample = large(dtype)
    options = dict(OPTIONS[name])
    if "weight" in options:
        options["weight"] = options["weight"].to(dtype)
    if name == "smoothing" and dtype == torch.float16:
        options["reduction"] = "none"  # torch's sum over all rows overflows
    sample.arguments.update(options)
    if "ignore_index" in options:
        sample.arguments["target"].clamp_(min=0)
    budget = budget_of(sample, 0.3)

    def op(*tensors: Tensor, **options: Any) -> Any:
        return functional.linear_cross_entropy(*tensors, memory_budget=budget, **options)

    assert_matches_reference(op, reference.linear_cross_entropy, sample)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("share", [0.3, 2.0])
def test_the_gradients_of_lse_and_entropy_are_those_of_whole_logits(
    dtype: torch.dtype, reduction: str, share: float
) -> None:
    sample = large(dtype)
    x, weight, target = (sample.arguments[name] for name in ("input", "linear_weight", "target"))
    budget = budget_of(sample, share)
    results = []
    for exact in (False, True):
        tensors = [(t.double() if exact else t).clone().requires_grad_() for t in (x, weight)]
        module, options = (reference, {}) if exact else (functional, {"memory_budget": budget})
        out = module.linear_cross_entropy(
            *tensors, target, reduction=reduction, return_lse=True, return_entropy=True, **options
        )
        loss, lse, entropy = out[:3]
        total = loss.sum() + (lse * torch.linspace(-1, 1, 512)).sum() + (entropy * torch.linspace(1, 0, 512)).sum()
        results.append([total, *torch.autograd.grad(total, tensors)])
    eps = torch.finfo(dtype).eps
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=8 * eps, atol=8 * eps * theirs.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("n_classes", [255, 256, 257])
@pytest.mark.parametrize("share", [0.4, 2.0])
@pytest.mark.parametrize("bias", [False, True])
def test_classes_of_padding_have_no_part(dtype: torch.dtype, n_classes: int, share: float, bias: bool) -> None:
    sample = large(dtype, 1056, 512, n_classes)  # from 2^27 products on a GPU pads the weight
    sample.arguments["linear_weight"] /= 8
    if not bias:
        del sample.arguments["linear_bias"]
        sample = SampleInput("large", sample.arguments, ("input", "linear_weight"), float64_ulps=64)
    budget = budget_of(sample, share)

    def op(*tensors: Tensor, **options: Any) -> Any:
        return functional.linear_cross_entropy(*tensors, memory_budget=budget, **options)

    assert_matches_reference(op, reference.linear_cross_entropy, sample)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("share", [0.4, 2.0])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("ignored", [False, True])
def test_a_row_that_is_not_finite_reaches_what_it_reaches_in_torch(
    value: float, share: float, reduction: str, ignored: bool
) -> None:
    sample = large(torch.float32, 1056, 512, 257)
    x, weight, target = (sample.arguments[name] for name in ("input", "linear_weight", "target"))
    x[3, 1], target[3] = value, 7
    if ignored:
        x[3], target[3] = 0, -100
        x[4, 1] = value
        target[4] = 256
    results = []
    for call, options in (
        (functional.linear_cross_entropy, {"memory_budget": budget_of(sample, share)}),
        (reference.linear_cross_entropy, {}),
    ):
        tensors = [t.clone().requires_grad_() for t in (x, weight)]
        loss = call(*tensors, target, reduction=reduction, **options)
        results.append([loss.isfinite(), *(g.isfinite() for g in torch.autograd.grad(loss.sum(), tensors))])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_class_that_no_row_can_have_adds_nothing() -> None:
    sample = large(torch.float32)
    bias = sample.arguments["linear_bias"]
    bias[:700] = -torch.inf  # whole tiles
    sample.arguments["target"].clamp_(min=700)

    def op(*tensors: Tensor, **options: Any) -> Any:
        return functional.linear_cross_entropy(*tensors, memory_budget=budget_of(sample, 0.2), **options)

    assert_matches_reference(op, reference.linear_cross_entropy, sample)


# --- arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1003, -1, 2**40])
@pytest.mark.parametrize("share", [0.3, 2.0])
def test_a_bad_target_is_named_with_its_position(value: int, share: float) -> None:
    sample = large(torch.float32)
    x, weight, target = (sample.arguments[name] for name in ("input", "linear_weight", "target"))
    target[9] = value
    with pytest.raises(IndexError, match=rf"target {value} at position \(9,\).* 1003 classes"):
        functional.linear_cross_entropy(x, weight.requires_grad_(), target, memory_budget=budget_of(sample, share))


@pytest.mark.parametrize("call", ["eager", "compiled", "module", "shift"])
def test_a_budget_is_a_positive_int(call: str) -> None:
    x, weight, target = (t.detach() for t in arguments())

    def loss(budget: Any) -> Tensor:
        if call == "module":
            torch.manual_seed(0)
            return charlm.nn.LinearCrossEntropyLoss(19, 27, memory_budget=budget)(x, target)
        f = torch.compile(functional.linear_cross_entropy, backend="eager") if call == "compiled" else None
        return (f or functional.linear_cross_entropy)(
            x, weight, target, memory_budget=budget, **({"shift": True} if call == "shift" else {})
        )

    for wrong in (0, -5):
        with pytest.raises(ValueError, match=f"memory_budget must be > 0, got {wrong}"):
            loss(wrong)
    for wrong in (1.5, "1GB", True):
        with pytest.raises(TypeError, match="argument 'memory_budget' must be int, not"):
            loss(wrong)
    torch.testing.assert_close(loss(1), loss(None))


def test_a_compiled_call_and_its_backward_keep_to_the_budget() -> None:
    sample = large(torch.float32)
    x, weight, target = (sample.arguments[name] for name in ("input", "linear_weight", "target"))
    budget = budget_of(sample, 0.3)

    def loss(x: Tensor, weight: Tensor) -> Tensor:
        return functional.linear_cross_entropy(x, weight, target, reduction="none", memory_budget=budget).sum()

    x, weight = x.requires_grad_(), weight.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    ours = torch.autograd.grad(compiled(x, weight), (x, weight))
    torch.testing.assert_close(ours, torch.autograd.grad(loss(x, weight), (x, weight)), rtol=0, atol=0)


# --- plans ----------------------------------------------------------------------------------------------------


def n_products(sample: SampleInput, budget: int | None) -> int:
    x, weight = (sample.arguments[name].requires_grad_() for name in ("input", "linear_weight"))
    names = ops_of(lambda: functional.linear_cross_entropy(x, weight, sample.arguments["target"], memory_budget=budget))
    return names.count("aten::mm") + names.count("aten::addmm")


@pytest.mark.usefixtures("torchs_products")
def test_a_budget_bounds_the_logits_of_a_block_on_the_cpu() -> None:
    if EMULATED:
        pytest.skip("a GPU has other plans")
    sample = large(torch.float32)
    sample.arguments["target"].clamp_(min=0)
    row = 1003 * 4
    assert n_products(sample, 512 * row) == n_products(sample, None) == 3
    assert n_products(sample, 511 * row) == 6
    assert n_products(sample, 64 * row) == 24


@pytest.mark.skipif(not EMULATED, reason="the CPU has blocks of rows only")
def test_tiles_that_are_kept_are_computed_once() -> None:
    sample = large(torch.float32, n_rows=512, n_features=1000)
    budget = budget_of(sample, 0.3)
    _, classes, kept, kept_in_weight = _C.linear_cross_entropy_plan(512, 1000, 1003, 4, True, budget)
    n_tiles = -(-1003 // classes)
    assert n_tiles > kept + kept_in_weight > kept > 0
    assert n_products(sample, budget) == 4 * n_tiles - kept - kept_in_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n_rows", "n_features", "share"), [(96, 200, 0.4), (400, 300, 0.3), (512, 200, 0.25)])
def test_logits_kept_in_the_gradient_of_the_weight_are_read_before_it_is_written(
    dtype: torch.dtype, n_rows: int, n_features: int, share: float
) -> None:
    sample = large(dtype, n_rows, n_features)
    sample.arguments["linear_weight"] /= n_features**0.5 / 3
    budget = budget_of(sample, share)
    rows, _, _, kept_in_weight = _C.linear_cross_entropy_plan(n_rows, n_features, 1003, dtype.itemsize, True, budget)
    assert rows == 0
    assert kept_in_weight > 0

    def op(*tensors: Tensor, **options: Any) -> Any:
        return functional.linear_cross_entropy(*tensors, memory_budget=budget, **options)

    assert_matches_reference(op, reference.linear_cross_entropy, sample)


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most memory that exists at once during a call, beyond what existed before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    events.sort(key=lambda event: event.start_ns())
    return max(itertools.accumulate(event.nbytes() for event in events))


@pytest.mark.skipif(not EMULATED, reason="the CPU's budget bounds the logits alone")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 1.1])
def test_a_call_needs_no_more_memory_than_results_and_budget(dtype: torch.dtype, share: float) -> None:
    n_rows, n_features, n_classes = 700, 64, 4000
    x, weight, target = (
        t.detach().requires_grad_(t.is_floating_point()) for t in arguments(n_rows, n_features, n_classes, dtype)
    )
    budget = int(share * n_rows * n_classes * dtype.itemsize) + 4 * n_rows * n_features
    if dtype == torch.bfloat16:
        budget += 2 * n_rows * n_features  # what the emulator's product is before it is added to a sum in float
    results = (x.numel() + weight.numel()) * dtype.itemsize
    losses: list[Tensor] = []
    peak = peak_bytes(lambda: losses.append(functional.linear_cross_entropy(x, weight, target, memory_budget=budget)))
    assert peak <= results + budget + 300 * n_rows


def test_plans_of_the_recommended_sizes() -> None:
    def plan(n: int, d: int, v: int, budget: int = 1 << 30, may_tile: bool = True) -> tuple[int, ...]:
        return _C.linear_cross_entropy_plan(n, d, v, 2, may_tile, budget)

    assert plan(8192, 768, 50257)[0] == 8192
    assert plan(4096, 4096, 128256)[0] == 4096
    assert plan(8192, 2304, 256000, 5 * GB)[0] == 8192
    rows, classes, kept, kept_in_weight = plan(8192, 2304, 256000, GB // 2)
    assert rows == 0
    assert classes >= 8192
    assert kept + kept_in_weight >= 4
    assert plan(8192, 2304, 256000, 6 * GB, may_tile=False)[0] == 8192
    assert plan(8192, 2304, 256000, 4 * GB, may_tile=False)[0] >= 1024
    assert plan(1 << 22, 384, 256)[0] >= 1 << 20  # a copy of so small a weight in float costs nothing


@pytest.mark.parametrize("element_size", [2, 4, 8])
def test_a_plan_keeps_to_the_budget(element_size: int) -> None:
    for n, d, v, share in itertools.product((64, 1000, 8192), (8, 768, 4096), (512, 50257, 256000), (0.1, 0.5, 0.99)):
        logits, half = n * v * element_size, element_size == 2
        budget = int(logits * share) + 4 * half * n * d
        rows, classes, kept, kept_in_weight = _C.linear_cross_entropy_plan(n, d, v, element_size, True, budget)
        if rows > 0:
            assert rows == 1 or rows * v * element_size <= budget
            continue
        stride = classes + 16 // element_size
        n_tiles = -(-v // classes)
        assert kept * n * stride * element_size + 4 * half * n * d <= budget
        assert 1 <= kept + kept_in_weight <= n_tiles
        for k in range(kept_in_weight):  # its rows of the gradient are written while these logits are in the end of it
            assert (kept + k + 1) * classes * d <= v * d - (kept_in_weight - k) * n * stride
