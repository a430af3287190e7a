"""fully_shard and replicate around charlm's modules: two processes on the CPU equal one on the whole batch."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import charlm
from charlm import nn

if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

from torch.distributed._composable.replicate import replicate
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

N_PROCESSES, N_STEPS = 2, 3


class Model(torch.nn.Module):
    """Tokens through torch's modules, which patch_model exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(27, 6)
        self.head = torch.nn.Linear(18, 27)
        self.loss = torch.nn.CrossEntropyLoss()

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.head(self.embedding(tokens).flatten(1)), target)


class FusedModel(torch.nn.Module):
    """The same layers through the modules that read the weights of their submodules."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.EmbeddingLinear(27, 6, 3, 10, activation="tanh")
        self.loss = nn.LinearCrossEntropyLoss(10, 27, bias=True)

    def forward(self, tokens: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.first(tokens), target)


class Doubled(torch.nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_a_doubled_table(model: Model) -> Model:
    torch.nn.utils.parametrize.register_parametrization(model.embedding, "weight", Doubled())
    return model


def make_batch() -> tuple[Tensor, Tensor]:
    """int16, which torch's own ops refuse: who runs shows whose kernels do."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(27, (8, 3), generator=generator, dtype=torch.int16)
    return tokens, torch.randint(27, (8,), generator=generator, dtype=torch.int16)


def train(model: torch.nn.Module, tokens: Tensor, target: Tensor) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        model(tokens, target).backward()
        optimizer.step()


def parameters(model: torch.nn.Module) -> list[Tensor]:
    full = (p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters())
    return [p.detach().clone() for p in full]


def sharded(model: torch.nn.Module, names: tuple[str, ...]) -> torch.nn.Module:
    """Each of the named submodules by itself, and then the rest as one."""
    mesh = init_device_mesh("cpu", (N_PROCESSES,))
    for name in names:
        fully_shard(model.get_submodule(name), mesh=mesh)
    return fully_shard(model, mesh=mesh)


def classes(model: torch.nn.Module) -> list[tuple[bool, bool, bool]]:
    """Of each module: ours; FSDP's; torch.nn's."""
    kinds = ((nn.Embedding, nn.CrossEntropyLoss), FSDPModule, (torch.nn.Embedding, torch.nn.CrossEntropyLoss))
    return [tuple(isinstance(module, kind) for kind in kinds) for module in (model.embedding, model.loss)]


def message(model: torch.nn.Module, *args: Tensor) -> str:
    with pytest.raises(RuntimeError) as caught:
        model(*args)
    return str(caught.value)


def work(rank: int, folder: str) -> None:
    """What one process does; the results of the first are written to `folder`."""
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=N_PROCESSES
    )
    tokens, target = (whole.chunk(N_PROCESSES)[rank] for whole in make_batch())
    results: dict[str, Any] = {}

    for order in ("shard first", "patch first"):
        torch.manual_seed(0)
        model = Model()
        if order == "patch first":
            charlm.patch_model(model)
        model = sharded(model, ("embedding", "head", "loss"))
        if order == "shard first":
            charlm.patch_model(model)
        results[f"{order}: classes"] = classes(model)
        train(model, tokens, target)
        results[order] = parameters(model)

    torch.manual_seed(0)
    model = charlm.patch_model(sharded(with_a_doubled_table(Model()), ("embedding",)))
    results["parametrized: classes"] = [base.__name__ for base in type(model.embedding).__mro__[:4]]
    train(model, tokens, target)
    results["parametrized"] = parameters(model)

    torch.manual_seed(0)
    model = sharded(FusedModel(), ("first", "loss"))
    train(model, tokens, target)
    results["fused"] = parameters(model)

    torch.manual_seed(0)
    model = Model()
    replicate(model.embedding)
    replicate(model.head)
    charlm.patch_model(model)
    results["replicate: class"] = [base.__name__ for base in type(model.embedding).__mro__[:3]]
    train(model, tokens, target)
    results["replicate"] = parameters(model)

    for name in ("first.embedding", "first.linear", "loss.linear"):
        results[name] = message(sharded(FusedModel(), (name,)), tokens, target)
    model = FusedModel()
    replicate(model.loss.linear)
    results["replicate loss.linear"] = message(model, tokens, target)

    if rank == 0:
        torch.save(results, f"{folder}/results.pt")
    torch.distributed.destroy_process_group()
    # A thread of gloo may still hold tensors of the last collective: while the interpreter is finalized it cannot
    # release their Python objects, and ends the process ("terminate called without an active exception").
    os._exit(0)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder: Path = tmp_path_factory.mktemp("fsdp")
    torch.multiprocessing.spawn(work, (str(folder),), nprocs=N_PROCESSES)
    return torch.load(folder / "results.pt")


def in_one_process(model: torch.nn.Module) -> list[Tensor]:
    train(model, *make_batch())
    return parameters(model)


@pytest.mark.parametrize("order", ["shard first", "patch first"])
def test_a_model_that_is_sharded_and_patched_trains_as_in_one_process(results: dict[str, Any], order: str) -> None:
    assert results[f"{order}: classes"] == [(True, True, True), (True, True, True)]
    torch.testing.assert_close(results[order], in_one_process(charlm.patch_model(Model())))


def test_a_parametrized_module_that_is_sharded_and_then_patched_keeps_both(results: dict[str, Any]) -> None:
    layers = ["FSDPParametrizedEmbedding", "FSDPModule", "ParametrizedEmbedding", "Embedding"]
    assert results["parametrized: classes"] == layers
    torch.testing.assert_close(
        results["parametrized"], in_one_process(charlm.patch_model(with_a_doubled_table(Model())))
    )


def test_a_model_that_is_replicated_and_then_patched_trains_as_in_one_process(results: dict[str, Any]) -> None:
    assert results["replicate: class"] == ["DDPEmbedding", "DDP", "Embedding"]
    torch.testing.assert_close(results["replicate"], in_one_process(charlm.patch_model(Model())))


def test_modules_that_read_the_weights_of_submodules_train_sharded_as_wholes(results: dict[str, Any]) -> None:
    torch.testing.assert_close(results["fused"], in_one_process(FusedModel()))


@pytest.mark.parametrize(
    ("wrapped", "owner", "class_"),
    [
        ("first.embedding", "EmbeddingLinear", "FSDPEmbedding"),
        ("first.linear", "EmbeddingLinear", "FSDPLinear"),
        ("loss.linear", "LinearCrossEntropyLoss", "FSDPLinear"),
        ("replicate loss.linear", "LinearCrossEntropyLoss", "DDPLinear"),
    ],
)
def test_a_submodule_that_is_wrapped_apart_is_refused_with_the_cure(
    results: dict[str, Any], wrapped: str, owner: str, class_: str
) -> None:
    name = wrapped.rpartition(".")[2]
    assert f"{owner} reads the weights of its `{name}`" in results[wrapped]
    assert class_ in results[wrapped]
    assert f"apply fully_shard or replicate to the {owner} as a whole" in results[wrapped]
