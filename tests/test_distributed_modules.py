"""charlm.nn in torch's parallel styles, FSDP2, DDP and activation checkpointing: they train as in one process."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from charlm import nn
from tests.sharding_support import Failures, Part, check, no_reference, run_parts

if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInputOutput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

V, T, D, B, N_STEPS = 27, 4, 8, 4, 2  # 27 classes on 2 and 4 processes: shards of two sizes


class Transformer(torch.nn.Module):
    """The layers of a language model that the parallel styles divide; logits (B, T, V)."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(V, D, padding_idx=3)
        self.norm = torch.nn.LayerNorm(D)
        self.up = torch.nn.Linear(D, 4 * D)
        self.down = torch.nn.Linear(4 * D, D)
        self.head = torch.nn.Linear(D, V)
        self.loss = nn.CrossEntropyLoss(lse_square_scale=1e-3)
        self.checkpointed = False

    def block(self, x: Tensor) -> Tensor:
        return x + self.down(self.up(self.norm(x)).tanh())

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        x = self.embedding(tokens)
        x = checkpoint(self.block, x, use_reentrant=False) if self.checkpointed else self.block(x)
        logits = self.head(x)
        if self.checkpointed:
            return checkpoint(self.loss, logits.flatten(0, 1), target.flatten(), use_reentrant=False)
        return self.loss(logits.flatten(0, 1), target.flatten())


class Fused(torch.nn.Module):
    """The first and the last layer by the modules that read the weights of their submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.EmbeddingLinear(V, D, T, 10, activation="tanh")
        self.last = nn.LinearCrossEntropyLoss(10, V, bias=True)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.last(self.first(tokens), target[:, 0])


def batch() -> tuple[Tensor, Tensor]:
    """Tokens and targets, some ignored."""
    generator = torch.Generator().manual_seed(1)
    tokens, target = torch.randint(V, (2, B, T), generator=generator).unbind()
    return tokens, target.masked_fill(torch.rand(target.shape, generator=generator) < 0.2, -100)


def parameters(model: torch.nn.Module) -> list[Tensor]:
    full = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return [p.detach().clone() for p in full]


def train(
    model: torch.nn.Module, tokens: Tensor, target: Tensor, around: Callable[[], Any] = contextlib.nullcontext
) -> tuple[list[float], list[Tensor]]:
    """The losses of some steps, and the parameters after them."""
    optimizer, losses = torch.optim.SGD(model.parameters(), lr=0.5), []
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        with around():
            loss = model(tokens, target)
            loss.backward()
        optimizer.step()
        losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss).item())
    return losses, parameters(model)


def seeded(kind: type[torch.nn.Module]) -> Any:
    """A model in float64: in float32 the products of shards differ by rounding from those of the whole."""
    torch.manual_seed(0)
    return kind().double()


def in_parallel(mesh: DeviceMesh) -> Transformer:
    """Tensor and sequence parallelism as in torch's tutorial; the logits are sharded by their classes."""
    styles = {
        "embedding": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
        "norm": SequenceParallel(),
        "up": ColwiseParallel(input_layouts=Shard(1)),
        "down": RowwiseParallel(output_layouts=Shard(1)),
        "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Shard(-1), use_local_output=False),
    }
    return parallelize_module(seeded(Transformer), mesh, styles)


def same(found: tuple[list[float], list[Tensor]], expected: tuple[list[float], list[Tensor]], **bounds: float) -> None:
    torch.testing.assert_close(found, expected, **bounds)


def parallel_styles(failures: Failures, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    expected = train(seeded(Transformer), *batch())

    def losses_in(around: Callable[[], Any]) -> None:
        with no_reference():
            same(train(in_parallel(mesh), *batch(), around), expected)

    for around in (loss_parallel, contextlib.nullcontext):
        check(failures, around.__name__, losses_in, around)

    def by_columns() -> None:
        model = seeded(Transformer)
        parallelize_module(model, mesh, {"embedding": ColwiseParallel(output_layouts=Replicate())})
        same(train(model, *batch()), expected)

    check(failures, "an embedding by columns", by_columns)

    def fused() -> None:
        model = seeded(Fused)
        styles = {
            "first": PrepareModuleInputOutput(
                input_layouts=Replicate(),
                desired_input_layouts=Replicate(),
                output_layouts=Shard(-1),
                desired_output_layouts=Replicate(),
                use_local_output=False,
            ),
            "first.linear": ColwiseParallel(),
            "last.linear": ColwiseParallel(),
        }
        parallelize_module(model, mesh, styles)
        same(train(model, *batch()), train(seeded(Fused), *batch()))

    check(failures, "fused layers by their outputs", fused)


def checkpointing(failures: Failures, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))

    def run() -> None:
        model = in_parallel(mesh)
        model.checkpointed = True
        same(train(model, *batch(), loss_parallel), train(seeded(Transformer), *batch()))

    check(failures, "checkpoint", run)


def data_parallel(failures: Failures, world: int) -> None:
    """The rows of the batch on each process; without ignored targets the mean of means is the mean."""
    mesh = init_device_mesh("cpu", (world,))
    tokens, target = batch()[0], batch()[0].flip(1)
    own = [x.chunk(world)[mesh.get_local_rank()] for x in (tokens, target)]
    for kind in (Transformer, Fused):
        expected = train(seeded(kind), tokens, target)[1]

        def ddp(kind: Any = kind, expected: Any = expected) -> None:
            torch.testing.assert_close(train(DistributedDataParallel(seeded(kind)), *own)[1], expected)

        check(failures, f"DDP {kind.__name__}", ddp)
        for reshard in (True, False):

            def fsdp(kind: Any = kind, expected: Any = expected, reshard: bool = reshard) -> None:
                model = fully_shard(seeded(kind), mesh=mesh, reshard_after_forward=reshard)
                torch.testing.assert_close(train(model, *own)[1], expected)

            check(failures, f"FSDP2 {kind.__name__} {reshard}", fsdp)

        def mixed(kind: Any = kind) -> None:
            policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
            one, many = seeded(kind).bfloat16().float(), fully_shard(seeded(kind).float(), mesh=mesh, mp_policy=policy)
            losses = train(one, tokens, target)[0], train(many, *own)[0]
            mean = torch.tensor(losses[1])
            torch.distributed.all_reduce(mean)
            torch.testing.assert_close(mean / world, torch.tensor(losses[0]), rtol=2e-2, atol=0)  # bfloat16's

        check(failures, f"FSDP2 mixed precision {kind.__name__}", mixed)


def both(failures: Failures, world: int) -> None:
    """FSDP2 over one dimension of the mesh, tensor parallelism over the other, and a batch that both shard."""
    mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("data", "model"))
    tokens, target = batch()[0], batch()[0].flip(1)
    own = [x.chunk(2)[mesh["data"].get_local_rank()] for x in (tokens, target)]

    def run() -> None:
        model = fully_shard(in_parallel(mesh["model"]), mesh=mesh["data"])
        torch.testing.assert_close(train(model, *own, loss_parallel)[1], train(seeded(Transformer), tokens, target)[1])

    check(failures, "FSDP2 and tensor parallelism", run)


PARTS: dict[int, list[Part]] = {2: [parallel_styles, checkpointing, data_parallel], 4: [parallel_styles, both]}


@pytest.mark.parametrize("world", [pytest.param(n, marks=[] if n == 2 else pytest.mark.exhaustive) for n in PARTS])
def test_modules_train_on_several_processes_as_on_one(world: int, tmp_path: Path) -> None:
    for part, failures in run_parts(PARTS[world], world, tmp_path).items():
        assert failures == {}, part
