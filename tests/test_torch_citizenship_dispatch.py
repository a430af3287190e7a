"""Which kernels run: ours in every ordinary call, torch's formula for functorch, forward AD and create_graph
alone.

`torch.library.opcheck` on every op, with the arguments that real calls give it; autocast; the dispatch keys.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from charlm import functional
from charlm.testing import (
    SampleInput,
    evaluate,
    sample_inputs_cross_entropy,
    sample_inputs_embedding,
    sample_inputs_embedding_linear,
    sample_inputs_entropy,
    sample_inputs_kl_div,
    sample_inputs_kl_divergence,
    sample_inputs_linear_cross_entropy,
    sample_inputs_surprisal,
    strided_copy,
)

# What torch's own formulas are made of. None of them is needed beside our kernels.
TORCH_FORMULA = (
    "softmax",
    "nll_loss",
    "logsumexp",
    "aten.exp.",
    "aten.log.",
    "aten.tanh",
    "aten.gather",
    "aten.index",
    "aten.mean",
    "aten.embedding.",
    "aten.embedding_dense_backward",
)


class _RecordOps(TorchDispatchMode):
    """Notes every op that reaches the dispatcher below autograd, and what it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    @property
    def names(self) -> list[str]:
        return [str(func) for func, _, _ in self.calls]

    @property
    def ours(self) -> list[str]:
        return [name for name in self.names if name.startswith("charlm.")]

    @property
    def torchs(self) -> list[str]:
        return [name for name in self.names if any(part in name for part in TORCH_FORMULA)]


CROSS_ENTROPY_SAMPLES = list(sample_inputs_cross_entropy(torch.float32))
EMBEDDING_SAMPLES = list(sample_inputs_embedding(torch.float32))


def test_every_cross_entropy_runs_our_kernels_forward_and_backward() -> None:
    for sample in CROSS_ENTROPY_SAMPLES:
        with _RecordOps() as record:
            evaluate(functional.cross_entropy, sample)
        forwards = {"charlm.cross_entropy.default", "charlm.cross_entropy_with_metrics.default"}
        assert forwards & set(record.ours), sample.name
        assert "charlm._cross_entropy_backward.default" in record.ours, sample.name
        assert record.torchs == [], sample.name


def test_every_embedding_runs_our_kernels_forward_and_backward() -> None:
    for sample in EMBEDDING_SAMPLES:
        with _RecordOps() as record:
            evaluate(functional.embedding, sample)
        assert "charlm.embedding.default" in record.ours, sample.name
        if sample.arguments.get("sparse"):  # torch assembles the sparse gradient: rows are moved, nothing is summed
            assert "aten.embedding_dense_backward.default" not in record.torchs, sample.name
        else:
            assert "charlm._embedding_backward.default" in record.ours, sample.name
            assert record.torchs == [], sample.name


@pytest.mark.parametrize(
    ("op", "kernel", "samples"),
    [
        (functional.entropy, "entropy", sample_inputs_entropy),
        (functional.kl_divergence, "kl_div", sample_inputs_kl_divergence),
        (functional.surprisal, "cross_entropy", sample_inputs_surprisal),
    ],
    ids=["entropy", "kl_divergence", "surprisal"],
)
def test_every_entropy_divergence_or_surprisal_runs_our_kernels_forward_and_backward(
    op: Callable[..., torch.Tensor], kernel: str, samples: Callable[[torch.dtype], Iterator[SampleInput]]
) -> None:
    for sample in samples(torch.float32):
        with _RecordOps() as record:
            evaluate(op, sample)
        assert record.ours == [f"charlm.{kernel}.default", f"charlm._{kernel}_backward.default"], sample.name
        assert record.torchs == [], sample.name


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode], ids=lambda context: context.__name__)
def test_calls_without_grad_run_our_kernels(context: Callable[[], Any]) -> None:
    with context(), _RecordOps() as record:
        for sample in CROSS_ENTROPY_SAMPLES:
            functional.cross_entropy(**sample.arguments)
    n_calls = [record.ours.count(f"charlm.cross_entropy{suffix}.default") for suffix in ("", "_with_metrics")]
    assert sum(n_calls) == len(CROSS_ENTROPY_SAMPLES)
    assert record.torchs == []


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_probabilities_of_another_dtype_are_promoted_as_torchs_are(context: Callable[[], Any]) -> None:
    logits, probabilities = torch.randn(33, 27), torch.randn(33, 27).softmax(1)
    for dtypes in ((torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float64, torch.float16)):
        arguments = [tensor.to(dtype) for tensor, dtype in zip((logits, probabilities), dtypes, strict=True)]
        with context():
            loss, of_torch = functional.cross_entropy(*arguments), F.cross_entropy(*arguments)
        assert loss.dtype == of_torch.dtype
        expected = F.cross_entropy(*(tensor.double() for tensor in arguments))
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_autocast_runs_our_kernels(dtype: torch.dtype) -> None:
    x = torch.randn(33, 27).to(dtype).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16), _RecordOps() as record:
        functional.cross_entropy(x, torch.randint(27, (33,)), label_smoothing=0.1).backward()
    assert record.ours == ["charlm.cross_entropy.default", "charlm._cross_entropy_backward.default"]
    assert record.torchs == []


@pytest.mark.parametrize("mode", ["backward", "forward"])
def test_calls_in_place_run_our_kernels(mode: str) -> None:
    x = torch.randn(33, 27, requires_grad=True) * 1
    with _RecordOps() as record:
        functional.cross_entropy(x, torch.randint(27, (33,)), inplace=mode).backward()
    assert f"charlm.cross_entropy_inplace_{mode}.default" in record.ours
    assert record.torchs == []


def _create_graph(x: torch.Tensor, y: torch.Tensor) -> None:
    (gradient,) = torch.autograd.grad(functional.cross_entropy(x, y), x, create_graph=True)
    gradient.sum().backward()


def _forward_ad(x: torch.Tensor, y: torch.Tensor) -> None:
    with torch.autograd.forward_ad.dual_level():
        functional.cross_entropy(torch.autograd.forward_ad.make_dual(x.detach(), torch.ones_like(x)), y)


HANDED_OVER: dict[str, Callable[[torch.Tensor, torch.Tensor], Any]] = {
    "create_graph": _create_graph,
    "forward_ad": _forward_ad,
    "func_grad": lambda x, y: torch.func.grad(functional.cross_entropy)(x.detach(), y),
    "jvp": lambda x, y: torch.func.jvp(lambda x: functional.cross_entropy(x, y), (x.detach(),), (torch.ones_like(x),)),
}


@pytest.mark.parametrize("name", HANDED_OVER)
def test_functorch_and_create_graph_run_torchs_formula(name: str) -> None:
    # This also shows that the mode above would have seen it.
    with _RecordOps() as record:
        HANDED_OVER[name](torch.randn(33, 27, requires_grad=True), torch.randint(27, (33,)))
    assert "aten._log_softmax.default" in record.torchs


INFORMATION_SAMPLES = (
    "sum_probs",
    "none_log_probs",
    "four_dimensions",
    "minus_infinity",
    "probs_logits",
    "logits_log_probs",
)


def _recorded_calls() -> dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]]:
    """Calls of all our ops as `functional` makes them; arguments are copied before they are changed."""
    found: dict[str, tuple[Any, tuple[Any, ...], dict[str, Any]]] = {}

    class Keep(_RecordOps):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if str(func).startswith("charlm."):
                copies = [strided_copy(a) if isinstance(a, torch.Tensor) else a for a in args]
                found[f"{func}{len(found)}"] = (func, tuple(copies), kwargs or {})
            return func(*args, **(kwargs or {}))

    samples = {sample.name: sample for sample in (*CROSS_ENTROPY_SAMPLES, *EMBEDDING_SAMPLES)}
    with Keep():
        for name in (
            "names_batch",
            "all_extras",
            "probabilities_all_extras",
            "three_dimensions",
            "returns_none",
        ):
            evaluate(functional.cross_entropy, samples[name])
        for name in ("names", "uint8_index", "scale_grad_by_freq_padding"):
            evaluate(functional.embedding, samples[name])
        evaluate(functional.embedding, samples["max_norm"])
        for mode in ("backward", "forward"):
            x = torch.randn(33, 27, requires_grad=True) * 1
            functional.cross_entropy(x, torch.randint(27, (33,)), inplace=mode).backward()
        torch.ops.charlm._synchronize.default(torch.randn(33, 27))  # never called by an op under a dispatch mode
        logits, target = torch.randn(33, 27), torch.randint(27, (33,))
        functional.cross_entropy(logits, target, return_predicted_tokens=True)
        options = (1, -100, 0.0, 0.0, 0.0, 1.0, False)  # only programs exported by earlier versions call this op
        tensors = (logits, torch.randn(5, 27), torch.arange(33) % 5, None, None, None)
        torch.ops.charlm.linear_cross_entropy_metrics.default(*tensors, False, 0, 0, *options)
        linear = {sample.name: sample for sample in sample_inputs_linear_cross_entropy(torch.float32)}
        for name in ("names", "no_batch_dimension", "all_extras", "returns_none", "probabilities_all_extras"):
            evaluate(functional.linear_cross_entropy, linear[name])
        layers = {sample.name: sample for sample in sample_inputs_embedding_linear(torch.float32)}
        for name in ("names_folded", "names_gelu_gathered", "padding_idx_folded", "no_bias_gathered"):
            evaluate(functional.embedding_linear, layers[name])
        for op, samples in (
            (functional.entropy, sample_inputs_entropy(torch.float32)),
            (functional.kl_div, sample_inputs_kl_div(torch.float32)),
            (functional.kl_divergence, sample_inputs_kl_divergence(torch.float32)),
        ):
            for sample in samples:
                if sample.name in INFORMATION_SAMPLES:
                    evaluate(op, sample)
    return found


RECORDED_CALLS = _recorded_calls()


@pytest.mark.parametrize("name", RECORDED_CALLS)
def test_opcheck_passes(name: str) -> None:
    func, args, kwargs = RECORDED_CALLS[name]
    ops = torch.ops.charlm
    public = func in (
        ops.embedding.default,
        ops.cross_entropy.default,
        ops.cross_entropy_with_metrics.default,
        ops.linear_cross_entropy.default,
        ops.linear_cross_entropy_with_metrics.default,
    )
    copies = [strided_copy(a) if isinstance(a, torch.Tensor) else a for a in args]
    if public:
        copies[0].requires_grad_()
    if func is ops.embedding_linear.default:
        public = True
        for parameter in copies[1:3]:
            parameter.requires_grad_()
    if func in (ops.entropy.default, ops.kl_div.default, ops.pointwise_kl_div.default):
        public = True
        for logits in copies[: 1 + (func is not ops.entropy.default)]:
            logits.requires_grad_()
    # The ops that only backward calls, or that write, have no derivative of their own to register.
    tests = ["test_schema", "test_faketensor"] + [
        "test_autograd_registration",
        "test_aot_dispatch_dynamic",
    ] * public
    torch.library.opcheck(func, tuple(copies), kwargs, test_utils=tests)


def test_opcheck_saw_every_registered_op() -> None:
    registered = {
        name.replace("charlm::", "charlm.") + ".default"
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("charlm::")
    }
    assert {str(func) for func, _, _ in RECORDED_CALLS.values()} == registered


@pytest.mark.parametrize(
    "op", ["cross_entropy", "linear_cross_entropy", "embedding_linear", "entropy", "kl_div", "pointwise_kl_div"]
)
@pytest.mark.parametrize("key", ["CPU", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA", "FuncTorchBatched"])
def test_ops_with_products_and_losses_are_registered_to_the_dispatch_key(key: str, op: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"charlm::{op}", key)


def test_embedding_has_no_autocast_rule_like_torch() -> None:
    weight = torch.randn(27, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert functional.embedding(torch.tensor([1]), weight).dtype == torch.float32
        assert functional.embedding(torch.tensor([1]), weight.bfloat16()).dtype == torch.bfloat16


AUTOCAST_CALLS: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "indices": lambda f, x: f.cross_entropy(x, torch.tensor([0, 1, 4])),
    "smoothing": lambda f, x: f.cross_entropy(x, torch.tensor([0, 1, 4]), label_smoothing=0.1),
    "none": lambda f, x: f.cross_entropy(x, torch.tensor([0, 1, 4]), reduction="none"),
    "weight_float32": lambda f, x: f.cross_entropy(x, torch.tensor([0, 1, 4]), torch.ones(5)),
    "weight_bfloat16": lambda f, x: f.cross_entropy(x, torch.tensor([0, 1, 4]), torch.ones(5).bfloat16()),
    "probabilities_bfloat16": lambda f, x: f.cross_entropy(x, torch.eye(5)[:3].bfloat16()),
    "probabilities_float32": lambda f, x: f.cross_entropy(x, torch.eye(5)[:3]),
}


@pytest.mark.covering(2)
@pytest.mark.parametrize("call", AUTOCAST_CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("enabled", [True, False])
def test_autocast_gives_torchs_dtype_and_gradient_or_error(call: str, dtype: torch.dtype, enabled: bool) -> None:
    logits = torch.randn(3, 5).to(dtype)
    outcomes = []
    for f in (functional, F):
        x = logits.clone().requires_grad_()
        try:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                loss = AUTOCAST_CALLS[call](f, x)
            loss.sum().backward()
            outcomes.append((loss.detach(), x.grad))
        except RuntimeError:
            outcomes.append(RuntimeError)
    ours, theirs = outcomes
    if call == "weight_float32" and dtype.itemsize == 2 and not enabled:
        assert theirs is RuntimeError  # ours accepts float32 class weights beside half logits
    elif RuntimeError in outcomes:
        assert ours is theirs
    else:
        # Half logits: torch rounds log_softmax to their dtype. test_cross_entropy.py judges the accuracy.
        rtol = 5e-2 if dtype.itemsize == 2 else 1e-5
        torch.testing.assert_close(ours, theirs, rtol=rtol, atol=rtol / 10)


def test_extras_follow_autocast_too() -> None:
    x = torch.randn(3, 5).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = functional.cross_entropy(x, torch.tensor([0, 1, 4]), softcap=3.0, token_weight=torch.ones(3))
    assert loss.dtype == torch.float32
