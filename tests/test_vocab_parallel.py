"""Losses whose classes are divided among ranks equal those of one process, by the rule of charlm.testing.

A rank runs all cases in turn and returns its failures by the names of the cases: starting processes takes seconds.
"""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils.checkpoint import checkpoint

from charlm import functional, reference
from charlm.distributed import vocab_parallel, vocab_parallel_cross_entropy, vocab_parallel_linear_cross_entropy
from charlm.testing import (
    SampleInput,
    assert_matches_reference,
    sample_inputs_cross_entropy,
    sample_inputs_linear_cross_entropy,
)
from tests.cuda_emulator.ops import run_cpu_ops_on_emulator
from tests.sharding_support import with_special_values

EMULATED = os.environ.get("CHARLM_CUDA_EMULATED")
ALL_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
Check = Callable[[], None]


class Whole(torch.autograd.Function):
    """A tensor of which each rank uses its own part: the gradients of all ranks are summed."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad


def part_of(tensor: Tensor, dim: int) -> Tensor:
    """This rank's part, as `Shard(dim)` divides a tensor."""
    per_rank = -(-tensor.shape[dim] // dist.get_world_size())
    start = min(dist.get_rank() * per_rank, tensor.shape[dim])
    return tensor.narrow(dim, start, min(per_rank, tensor.shape[dim] - start))


def of_whole_logits(input: Tensor, target: Tensor, **options: Any) -> Any:
    """`vocab_parallel_cross_entropy` with the arguments of `cross_entropy`."""
    logits = part_of(Whole.apply(input), 1)
    return vocab_parallel_cross_entropy(logits, target, input.shape[1], **options)


def of_whole_weight(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None, **options: Any
) -> Any:
    """`vocab_parallel_linear_cross_entropy` with the arguments of `linear_cross_entropy`."""
    bias = None if linear_bias is None else part_of(Whole.apply(linear_bias), 0)
    weight = part_of(Whole.apply(linear_weight), 0)
    return vocab_parallel_linear_cross_entropy(
        input, weight, target, len(linear_weight), linear_bias=bias, **{"ignore_index": -100, **options}
    )


def is_supported(sample: SampleInput) -> bool:
    """Whether a sample has rows of logits, classes on their second dimension, and class indices."""
    input, target = sample.arguments["input"], sample.arguments["target"]
    return input.dim() > 1 and not target.is_floating_point() and target.shape == input.shape[:1] + input.shape[2:]


def of_samples(dtypes: tuple[torch.dtype, ...]) -> Iterator[tuple[str, Check]]:
    for dtype in dtypes:
        for sample in sample_inputs_cross_entropy(dtype):
            if is_supported(sample):
                sample.arguments.pop("inplace", None)
                yield f"cross_entropy {dtype} {sample.name}", matching(of_whole_logits, "cross_entropy", sample)
        for sample in sample_inputs_linear_cross_entropy(dtype):
            input, weight, target = (sample.arguments[name] for name in ("input", "linear_weight", "target"))
            plain = input.dim() == weight.dim() == 2 and target.shape == input.shape[:1]
            if plain and not target.is_floating_point() and "options" not in sample.arguments:
                # Blocks of 16 rows: torch's float32 product of so few rounds more than that of the whole batch.
                for budget in (None,) if dtype == torch.float32 else (None, 1):
                    op = with_budget(budget)
                    name = f"linear_cross_entropy {dtype} {sample.name} budget {budget}"
                    yield name, matching(op, "linear_cross_entropy", sample)


def matching(op: Callable[..., Any], name: str, sample: SampleInput) -> Check:
    return lambda: assert_matches_reference(op, getattr(reference, name), sample)


def with_budget(budget: int | None) -> Callable[..., Any]:
    return lambda *args, **kwargs: of_whole_weight(*args, memory_budget=budget, **kwargs)


# ------------------------------------------------------------------------------------------------- single properties


def batch(n_classes: int, n: int = 12) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(n_classes)
    target = torch.randint(n_classes, (n,), generator=generator)
    target[1] = -100
    return torch.randn(n, n_classes, generator=generator), target


def check_metrics_and_their_gradients() -> None:
    for n_classes in (3, 10, 301):
        logits, target = batch(n_classes)
        grads = []
        outputs = []
        for op in (functional.cross_entropy, of_whole_logits):
            leaf = logits.clone().requires_grad_()
            output = op(leaf, target, reduction="none", softcap=4.0, **EVERYTHING)
            rows = torch.arange(1.0, 13.0)
            ((output.loss + output.lse * rows + output.entropy / rows).sum()).backward()
            grads.append(leaf.grad)
            outputs.append(output)
        torch.testing.assert_close(outputs[1], outputs[0])
        torch.testing.assert_close(grads[1], grads[0])


EVERYTHING = dict.fromkeys(("return_lse", "return_entropy", "return_predicted_tokens", "return_token_accuracy"), True)


def check_special_logits() -> None:
    for n_classes in (3, 10, 40):
        targets = torch.tensor([0, -(-n_classes // 2) - 1, -(-n_classes // 2), n_classes - 1, -100])
        special = with_special_values(n_classes)
        logits, target = special.repeat_interleave(len(targets), 0), targets.repeat(len(special))
        weight = torch.rand(n_classes, generator=torch.Generator().manual_seed(2)) + 0.5
        for options in (
            {},
            {"label_smoothing": 0.1},
            {"label_smoothing": 1.0},
            {"label_smoothing": 0.1, "weight": weight},
            {"softcap": 4.0, "label_smoothing": 0.2},
            {"lse_square_scale": 0.1, "label_smoothing": 0.1},
            {"logit_scale": -0.5, "label_smoothing": 0.1},
            {"logit_scale": 0.0},
            {"token_weight": torch.rand(len(target), generator=torch.Generator().manual_seed(3))},
        ):
            for metrics in ({}, EVERYTHING):
                results = []
                for op in (functional.cross_entropy, of_whole_logits):
                    leaf = logits.clone().requires_grad_()
                    output = op(leaf, target, reduction="none", **options, **metrics)
                    if metrics:
                        (output.loss + output.lse * 2 + output.entropy * 3).sum().backward()
                        output = tuple(field.detach() for field in output)
                    else:
                        output.sum().backward()
                        output = output.detach()
                    results.append((output, leaf.grad))
                torch.testing.assert_close(results[1], results[0], equal_nan=True)


def check_logits_of_minus_infinity_on_a_whole_rank() -> None:
    logits, target = batch(10)
    logits[:, 5:] = -torch.inf
    target = torch.where(target >= 5, target - 5, target)
    expected = logits.clone().requires_grad_()
    functional.cross_entropy(expected, target, return_entropy=True).loss.backward()
    found = logits.clone().requires_grad_()
    of_whole_logits(found, target, return_entropy=True).loss.backward()
    torch.testing.assert_close(found.grad, expected.grad)


def check_predicted_tokens_that_float32_would_round() -> None:
    per_rank = 2**24 + 3
    logits = torch.zeros(2, per_rank, dtype=torch.bfloat16)
    if dist.get_rank() == dist.get_world_size() - 1:
        logits[0, -2] = 1
    n_classes = per_rank * dist.get_world_size()
    target = torch.tensor([n_classes - 2, 0])
    with torch.no_grad():
        output = vocab_parallel_cross_entropy(
            logits, target, n_classes, return_predicted_tokens=True, return_token_accuracy=True
        )
    assert output.predicted_tokens.tolist() == target.tolist()
    assert output.token_accuracy == 1


def check_ignored_rows_of_any_logits_have_no_gradient() -> None:
    logits, target = batch(10)
    target[:5] = -100
    logits[0], logits[1, 3], logits[2, 7], logits[3] = 200.0, torch.nan, torch.inf, -torch.inf
    weight = torch.tensor([torch.inf, *range(1, 10)])
    target[5:] = target[5:].clamp(min=1)
    for options in (
        {},
        {"label_smoothing": 0.1},
        {"token_weight": torch.tensor([torch.inf, torch.nan, *[1.0] * 10])},
        {"weight": weight},
        {"lse_square_scale": 0.1, "return_lse": True},
    ):
        results = []
        for op in (functional.cross_entropy, of_whole_logits):
            leaf = logits.clone().requires_grad_()
            loss = op(leaf, target, **options)
            loss = getattr(loss, "loss", loss)
            loss.backward()
            results.append((loss.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0])
        assert torch.equal(results[1][1][:5], torch.zeros(5, 10))


def check_what_changes_between_forward_and_backward() -> None:
    logits, target = batch(11)
    grads = []
    for changes in (False, True):
        leaf, weight = logits.clone().requires_grad_(), torch.ones(11)
        loss = of_whole_logits(leaf, target, weight=weight, label_smoothing=0.5)
        if changes:
            weight.mul_(100)
        loss.backward()
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])
    x, weight = torch.randn(12, 5), torch.randn(11, 5)
    grads = []
    for enabled in (False, True):
        leaf = part_of(weight, 0).clone().requires_grad_()
        loss = vocab_parallel_linear_cross_entropy(x, leaf, target, 11)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            loss.backward(retain_graph=True)
            loss.backward()  # computes the logits anew
        grads.append(leaf.grad)
    assert torch.equal(grads[0], grads[1])


def check_logits_in_place() -> None:
    logits, target = batch(11)
    expected = logits.clone().requires_grad_()
    functional.cross_entropy(expected, target, lse_square_scale=0.1).backward()
    leaf = part_of(logits, 1).clone().requires_grad_()
    given = leaf * 1
    kept = given.detach().clone()
    loss = vocab_parallel_cross_entropy(given, target, 11, lse_square_scale=0.1, inplace="backward")
    assert torch.equal(given, kept)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, part_of(expected.grad, 1))
    assert given.numel() == 0 or torch.equal(given, leaf.grad)
    if given.numel():
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


def check_communication() -> None:
    n_classes, n = 301, 12
    logits, target = batch(n_classes, n)
    leaf = part_of(logits, 1).clone().requires_grad_()
    with CommDebugMode() as seen:
        loss = vocab_parallel_cross_entropy(leaf, target, n_classes)
    assert seen.get_total_counts() == 1
    with CommDebugMode() as seen:
        loss.backward()
    assert seen.get_total_counts() == 0
    x, weight = torch.randn(n, 5, requires_grad=True), part_of(torch.randn(n_classes, 5), 0).requires_grad_()
    with CommDebugMode() as seen:
        loss = vocab_parallel_linear_cross_entropy(x, weight, target, n_classes)
    assert seen.get_total_counts() == 1
    with CommDebugMode() as seen:
        loss.backward()
    assert seen.get_total_counts() == 1


def check_checkpointing_and_compile() -> None:
    logits, target = batch(11)
    x, weight = torch.randn(12, 5), torch.randn(11, 5)

    def of_logits(x: Tensor) -> Tensor:
        return vocab_parallel_cross_entropy(x * 2, target, 11, label_smoothing=0.1)

    def of_linear(x: Tensor) -> Tensor:
        return vocab_parallel_linear_cross_entropy(x, part_of(weight, 0), target, 11)

    for function, argument in ((of_logits, part_of(logits, 1)), (of_linear, x)):
        ways: list[Callable[[Tensor], Tensor]] = [
            function,
            lambda x, function=function: checkpoint(function, x, use_reentrant=False),
        ]
        if dist.get_world_size() == 2 and not EMULATED:
            ways.append(torch.compile(function, backend="aot_eager", fullgraph=True))
        grads = []
        for way in ways:
            leaf = argument.clone().requires_grad_()
            way(leaf).backward()
            grads.append(leaf.grad)
        for grad in grads[1:]:
            torch.testing.assert_close(grad, grads[0])


def check_without_kernels() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vocab_parallel, "have_kernels", lambda *args: False)
        check_metrics_and_their_gradients()
        check_logits_of_minus_infinity_on_a_whole_rank()
        check_autocast()
    logits, target = batch(3)
    results = []
    for has_kernels in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(vocab_parallel, "have_kernels", lambda *args, found=has_kernels: found)
            leaves = [tensor.requires_grad_() for tensor in (torch.eye(12), part_of(logits.T, 0).clone())]
            options = {"label_smoothing": 0.2, "weight": torch.tensor([1.0, 2.0, 3.0])}
            loss = vocab_parallel_linear_cross_entropy(*leaves, target, 3, **options)
            results.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[1], results[0])


def check_autocast() -> None:
    _, target = batch(11)
    x, weight = torch.randn(12, 5), torch.randn(11, 5)
    results = []
    for op in (functional.linear_cross_entropy, of_whole_weight):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = op(leaf, weight, target)
        loss.backward()
        assert loss.dtype == torch.float32
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0], rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.bfloat16):  # which leaves float64 as it is, and converts weights
        loss, expected = (
            op(x.double(), weight.double(), target) for op in (of_whole_weight, functional.linear_cross_entropy)
        )
        torch.testing.assert_close(loss, expected)
        logits, half = torch.randn(12, 11).bfloat16(), torch.rand(11).bfloat16()
        loss, expected = (op(logits, target, weight=half) for op in (of_whole_logits, functional.cross_entropy))
        torch.testing.assert_close(loss, expected)


def check_refusals() -> None:
    logits, target = batch(11)
    part = part_of(logits, 1)

    def refuses(error: type[Exception], text: str, *args: Any, **options: Any) -> None:
        with pytest.raises(error, match=text):
            vocab_parallel_cross_entropy(*args, **options)

    if dist.get_world_size() > 1:
        refuses(ValueError, "logits must hold [0-9]+ of the 40 classes on rank", part, target, 40)
    bad = target.clone()
    bad[3] = 11
    if not EMULATED:
        refuses(IndexError, r"target 11 at position \(3,\) is out of range for 11 classes", part, bad, 11)
        bad[2] = -100
        text = r"target -100 at position \(1,\) is out of range"
        refuses(IndexError, text, part, bad, 11, ignore_index=2)
    refuses(ValueError, "inplace must be None or", part, target, 11, inplace="forward")
    refuses(RuntimeError, "of an integer dtype", part, logits.softmax(1), 11)
    refuses(RuntimeError, "weight must hold", part, target, 11, weight=torch.ones(5))
    refuses(RuntimeError, "must not require grad", part, target, 11, weight=torch.ones(11, requires_grad=True))
    refuses(RuntimeError, "token_weight must hold", part, target, 11, token_weight=torch.ones(5))
    refuses(RuntimeError, "label_smoothing must be", part, target, 11, label_smoothing=1.5)
    leaf = part.clone().requires_grad_()
    refuses(RuntimeError, "leaf", leaf, target, 11, inplace="backward")
    refuses(RuntimeError, "leaf", leaf[:], target, 11, inplace="backward")
    refuses(ValueError, "logit_scale must be finite", part, target, 11, logit_scale=1e39)
    refuses(NotImplementedError, "floating dtype", part.int(), target, 11)
    loss = vocab_parallel_cross_entropy(leaf, target, 11)
    (grad,) = torch.autograd.grad(loss, leaf, create_graph=True)
    if grad.numel() and grad.requires_grad:
        with pytest.raises(RuntimeError, match="once_differentiable"):
            grad.sum().backward()


PROPERTIES: dict[str, Check] = {
    name.removeprefix("check_"): value for name, value in list(globals().items()) if name.startswith("check_")
}


def work(rank: int, world: int, dtypes: tuple[torch.dtype, ...], folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if EMULATED:
        run_cpu_ops_on_emulator(EMULATED)
    rendezvous, timeout = f"file://{folder}/rendezvous", timedelta(seconds=60)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world, timeout=timeout)
    failures: dict[str, str] = {}
    count = 0
    for name, check in (*of_samples(dtypes), *PROPERTIES.items()):
        torch.manual_seed(0)
        count += 1
        try:
            check()
        except Exception:
            failures[name] = traceback.format_exc()
            if name in PROPERTIES:  # the ranks may have parted within a check: the next collective would not match
                break
    torch.save((count, failures), f"{folder}/{rank}.pt")
    if not failures:
        dist.barrier()
    os._exit(0)  # see test_fsdp.py


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("world", "dtypes"),
    [
        (1, ALL_DTYPES),
        (2, ALL_DTYPES),
        (4, (torch.float32,)),
    ],
)
def test_losses_of_divided_classes_equal_those_of_one_process(
    world: int, dtypes: tuple[torch.dtype, ...], tmp_path: Path
) -> None:
    torch.multiprocessing.spawn(work, (world, dtypes, str(tmp_path)), nprocs=world)
    for rank in range(world):
        count, failures = torch.load(tmp_path / f"{rank}.pt")
        assert count > 50
        text = "\n".join(f"rank {rank}, {name}:\n{error}" for name, error in failures.items())
        assert not failures, f"{len(failures)} of {count} cases:\n{text[-6000:]}"
