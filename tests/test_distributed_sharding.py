"""Sharded tensors: every op on 1, 2 and 4 processes equals one process, by our kernels and with few collectives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import charlm.functional as F
from charlm import reference, testing
from tests.sharding_support import Failures, Part, check, no_reference, run_parts, with_special_values

if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard

Dims = dict[str, int]  # the dimension of each argument that is sharded; an argument that is not named is replicated


def sharded(op: Callable[..., Any], mesh: DeviceMesh, *dims: Dims) -> Callable[..., Any]:
    """`op` of plain tensors, computed on DTensors; the i-th dimension of the mesh shards `dims[i]`."""

    def distribute(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        whole = DTensor.from_local(value, mesh, [Replicate()] * mesh.ndim)
        return whole.redistribute(placements=[Shard(each[name]) if name in each else Replicate() for each in dims])

    def call(**arguments: Any) -> Any:
        output = op(**{name: distribute(name, value) for name, value in arguments.items()})
        if isinstance(output, Tensor):
            return output.full_tensor()
        return type(output)(*(x.full_tensor() if isinstance(x, Tensor) else x for x in output))

    return call


def loss_dims(arguments: dict[str, Any]) -> Iterator[Dims]:
    """Of cross_entropy: each dimension of the logits; the classes for class indices only."""
    n = arguments["input"].dim()
    is_index = arguments["target"].shape != arguments["input"].shape
    for dim in (0, *range(2, n)) if n > 1 else ():
        row = max(dim - 1, 0)
        yield {"input": dim, "target": row if is_index else dim, "token_weight": row}
    if n > 1 and is_index:
        yield {"input": 1}


def leading(*names: str) -> Callable[[dict[str, Any]], Iterator[Dims]]:
    """Each dimension of the first argument but the last, which the other arguments have too."""

    def dims(arguments: dict[str, Any]) -> Iterator[Dims]:
        first = arguments[names[0]]
        if all(arguments[name].dim() >= first.dim() - 1 for name in names):
            for dim in range(first.dim() - 1):
                yield {name: dim for name in names if name in arguments}

    return dims


def broadcast(last: int, *names: str) -> Callable[[dict[str, Any]], Iterator[Dims]]:
    """Each dimension of the broadcast arguments but their `last`, in those that do not repeat it."""

    def dims(arguments: dict[str, Any]) -> Iterator[Dims]:
        shapes = {name: arguments[name].shape for name in names}
        sizes = torch.broadcast_shapes(*shapes.values())
        for dim in range(len(sizes) - last):
            own = {name: dim - len(sizes) + len(shape) for name, shape in shapes.items()}
            yield {name: i for name, i in own.items() if i >= 0 and shapes[name][i] == sizes[dim]}

    return dims


def and_classes(rows: Callable[..., Iterator[Dims]], *names: str) -> Callable[[dict[str, Any]], Iterator[Dims]]:
    """The dimensions of `rows`, and the classes: of rows of logits, or of a divergence from p that are logits."""

    def dims(arguments: dict[str, Any]) -> Iterator[Dims]:
        yield from rows(arguments)
        if arguments.get("p_kind", "logits") == "logits" and (
            arguments[names[0]].dim() > 1 or "target" not in arguments
        ):
            yield {name: arguments[name].dim() - 1 for name in names}

    return dims


def table_dims(arguments: dict[str, Any]) -> Iterator[Dims]:
    """Of embedding: the rows of the table (RowwiseParallel), its columns (ColwiseParallel), the indices."""
    yield from ({"weight": 0}, {"weight": 1})
    yield from ({"input": dim} for dim in range(arguments["input"].dim()))


def layer_dims(arguments: dict[str, Any]) -> Iterator[Dims]:
    """Of embedding_linear: the features of the layer (ColwiseParallel), the contexts."""
    yield {"linear_weight": 0, "linear_bias": 0}
    yield from ({"input": dim} for dim in range(arguments["input"].dim() - 1))


def rows_dims(arguments: dict[str, Any]) -> Iterator[Dims]:
    """Of linear_cross_entropy: the rows, the classes."""
    if arguments["input"].dim() > 1:
        yield {"input": 0, "target": 0, "token_weight": 0}
        if arguments["target"].dim() == 1 and arguments["linear_weight"].dim() == 2:
            yield {"linear_weight": 0, "linear_bias": 0}


OPS = {
    "cross_entropy": loss_dims,
    "linear_cross_entropy": rows_dims,
    "embedding": table_dims,
    "embedding_linear": layer_dims,
    "entropy": and_classes(leading("logits"), "logits"),
    "kl_divergence": and_classes(broadcast(1, "p", "q"), "p", "q"),
    "kl_div": broadcast(0, "input", "target"),
    "surprisal": and_classes(leading("logits", "target"), "logits"),
}


def compare(op: str, mesh: DeviceMesh, sample: testing.SampleInput, *dims: Dims) -> None:
    """By the rule of charlm.testing, with the reference made to fail: only kernels may compute."""
    ours, theirs = getattr(F, op), getattr(reference, op)

    types = []

    def by_kernels(**arguments: Any) -> Any:
        with no_reference():
            output = sharded(ours, mesh, *dims)(**arguments)
            types.extend([type(output), type(ours(**arguments))])
        return output

    testing.assert_matches_reference(by_kernels, theirs, sample)
    assert types[0] is types[1]


def is_left_to_torch(sample: testing.SampleInput, *dims: Dims) -> bool:
    """A table whose rows are scaled, that has a sparse gradient, or whose indices are counted over processes; classes
    of an entropy or divergence that two dimensions of the mesh divide."""
    options = sample.arguments
    counted = options.get("scale_grad_by_freq") and any(each and each != {"weight": 1} for each in dims)
    classes = {name: options[name].dim() - 1 for name in ("logits", "p") if name in options}
    divided_twice = len(dims) == 2 and all(classes.items() & each.items() for each in dims)
    return options.get("max_norm") is not None or options.get("sparse") or counted or divided_twice


def compare_all(failures: Failures, op: str, dtype: torch.dtype, mesh: DeviceMesh, largest: float) -> None:
    """Every sample of at most `largest` elements, on each way to shard it."""
    for sample in getattr(testing, f"sample_inputs_{op}")(dtype):
        if sum(x.numel() for x in sample.arguments.values() if isinstance(x, Tensor)) > largest:
            continue
        one = [{}, *OPS[op](sample.arguments)]
        first, last = one[min(1, len(one) - 1)], one[-1]
        two = [(first, {}), ({}, first), (first, first), (first, last), (last, first)] if first else []
        for dims in two if mesh.ndim == 2 else [(dims,) for dims in one]:
            if not is_left_to_torch(sample, *dims):
                check(failures, f"{op} {sample.name} {dtype} {dims}", compare, op, mesh, sample, *dims)


def in_float32(failures: Failures, world: int, largest: float = 900) -> None:
    for op in OPS:
        compare_all(failures, op, torch.float32, init_device_mesh("cpu", (world,)), largest)


def in_other_dtypes(failures: Failures, world: int, largest: float = 400) -> None:
    for op in OPS:
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            compare_all(failures, op, dtype, init_device_mesh("cpu", (world,)), largest)


def on_two_dimensions(failures: Failures, world: int, largest: float = 300) -> None:
    for op in OPS:
        compare_all(failures, op, torch.float32, init_device_mesh("cpu", (world // 2, 2)), largest)


def special_logits(failures: Failures, world: int) -> None:
    """Entropy and divergence of rows with infinite, NaN and very large logits, divided by their classes."""
    mesh = init_device_mesh("cpu", (world,))
    dims: Dims = {"logits": 1, "p": 1, "q": 1}

    def same(op: Callable[..., Any], arguments: dict[str, Tensor], options: dict[str, str]) -> None:
        results = []
        for each in (op, sharded(op, mesh, dims)):
            leaves = {name: x.clone().requires_grad_() for name, x in arguments.items()}
            output = each(**leaves, **options)
            output.sum().backward()
            results.append((output.detach(), [x.grad for x in leaves.values()]))
        torch.testing.assert_close(results[1], results[0], equal_nan=True)

    for n_classes in (3, 10, 40):
        special = with_special_values(n_classes)
        check(failures, f"entropy {n_classes}", same, F.entropy, {"logits": special}, {})
        p, q = special.repeat_interleave(len(special), 0), special.repeat(len(special), 1)
        for q_kind, values in (("logits", q), ("log_probs", q.log_softmax(1)), ("probs", q.softmax(1))):
            check(
                failures, f"kl {n_classes} {q_kind}", same, F.kl_divergence, {"p": p, "q": values}, {"q_kind": q_kind}
            )


def all_samples(failures: Failures, world: int) -> None:
    for part in (in_float32, in_other_dtypes, *([on_two_dimensions] if world == 4 else [])):
        part(failures, world, math.inf)


@pytest.mark.parametrize("world", [pytest.param(1, marks=pytest.mark.exhaustive), 2])
def test_sharded_tensors_give_what_one_process_gives(world: int, tmp_path: Path) -> None:
    parts: list[Part] = [in_float32, in_other_dtypes, special_logits]
    for part, failures in run_parts(parts, world, tmp_path).items():
        assert failures == {}, part


@pytest.mark.exhaustive
def test_samples_on_a_mesh_of_two_dimensions_give_what_one_process_gives(tmp_path: Path) -> None:
    for part, failures in run_parts([on_two_dimensions], 4, tmp_path).items():
        assert failures == {}, part


@pytest.mark.exhaustive
@pytest.mark.parametrize("world", [1, 2, pytest.param(4, marks=pytest.mark.on_demand)])
def test_all_samples_that_are_sharded_give_what_one_process_gives(world: int, tmp_path: Path) -> None:
    for part, failures in run_parts([all_samples, special_logits], world, tmp_path).items():
        assert failures == {}, part
