"""Data parallel training of a model: replicated (DDP), or sharded over the processes (FSDP2).

Both average the gradients over the processes. Sharded, each process keeps a part of every parameter, of its gradient
and of the optimizer's moments, as DTensors, and the weights of a block are gathered when it runs.

FSDP2 and DTensor take most of a second to import: only a run that shards imports them.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from charlm._errors import UserError
from charlm.lm.config import Config
from charlm.lm.models import GPT, LanguageModel, Mixture
from charlm.lm.models.batch_norm import BatchNorm
from charlm.lm.processes import Processes, is_under_torchrun

PARALLEL = ("ddp", "fsdp")
# The buffers of a model are equal in all processes; torch 2.13 has renamed the option that keeps DDP from sending them.
DDP_OPTIONS = inspect.signature(DistributedDataParallel).parameters
NO_BUFFERS = "forward_sync_buffers" if "forward_sync_buffers" in DDP_OPTIONS else "broadcast_buffers"


def check_parallel(parallel: str, config: Config, processes: Processes) -> None:
    """Raises UserError unless the processes can train a model of `config` so."""
    if parallel not in PARALLEL:
        raise UserError(f"parallel is {parallel!r}, but must be {' or '.join(PARALLEL)}")
    if processes.size > config.batch_size:
        raise UserError(
            f"batch_size is {config.batch_size}, but must be at least the number of processes, {processes.size}"
        )
    if parallel == "fsdp":
        if config.type != "gpt":
            raise UserError(f"parallel is fsdp, which shards the gpt; the {config.type} takes ddp")
        if processes.size == 1 and not is_under_torchrun():
            raise UserError(
                "parallel is fsdp, which shards the model over the processes of torchrun: start it with that"
            )
        if config.compile:
            raise UserError("--compile does not go with --parallel fsdp: leave one of them out")


def distribute(model: LanguageModel, parallel: str, processes: Processes, device: torch.device) -> None:
    """Makes `model`, which is the same in all processes, one of several processes; before the optimizer is built."""
    if processes.size == 1:
        return
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.is_shared = True
    if parallel == "fsdp":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        network = model.network if isinstance(model, Mixture) else model
        assert isinstance(network, GPT)
        mesh = init_device_mesh(device.type, (processes.size,))
        for block in network.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(network, mesh=mesh)
        register_fsdp_forward_method(network, "loss")


class SharedLoss:
    """The loss of a model as a function whose gradients are averaged over the processes.

    Args:
        model: The model, after `distribute`.
        loss_of: Its `loss`, or a compiled form of it.
        processes: The processes of the run.
    """

    def __init__(self, model: LanguageModel, loss_of: Callable[..., Tensor], processes: Processes) -> None:
        self._loss_of = loss_of
        self._sharded: list[Any] = []  # the modules that FSDP shards
        if is_sharded(model):
            from torch.distributed.fsdp import FSDPModule

            self._sharded = [module for module in model.modules() if isinstance(module, FSDPModule)]
        self._replica: DistributedDataParallel | None = None
        if processes.size > 1 and not self._sharded:
            options = {NO_BUFFERS: False, "gradient_as_bucket_view": True}
            self._replica = DistributedDataParallel(_Loss(model, loss_of), **options)
            # After its first backward DDP arranges the gradients anew, in the order in which they came. Here that is
            # before the first step, so that every step of a run that is resumed adds in the order of an uninterrupted
            # one.
            self._replica().backward()
            model.zero_grad()

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        return (self._replica or self._loss_of)(*arguments, **keywords)

    def exchanging(self, wanted: bool) -> AbstractContextManager[Any]:
        """Inside, forward and backward exchange gradients only if `wanted`; otherwise they add to those of the next."""
        if self._replica is not None and not wanted:
            return self._replica.no_sync()
        for module in self._sharded:
            module.set_requires_gradient_sync(wanted, recurse=False)
        return nullcontext()


class _Loss(nn.Module):
    """The loss as a forward, which DDP needs; without arguments, a sum that every parameter has a gradient of."""

    def __init__(self, model: LanguageModel, loss_of: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model = model
        self.loss_of = loss_of

    def forward(self, *arguments: Any, **keywords: Any) -> Tensor:
        if not arguments:
            return torch.stack([parameter.sum() for parameter in self.model.parameters()]).sum()
        return self.loss_of(*arguments, **keywords)


def is_sharded(model: nn.Module) -> bool:
    """Whether processes share the parameters of `model`."""
    return any(map(_is_dtensor, model.parameters()))


def _is_dtensor(tensor: Tensor | None) -> bool:
    module = sys.modules.get("torch.distributed.tensor")  # no DTensor exists before it is imported
    return module is not None and isinstance(tensor, module.DTensor)


def gathered(tensors: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Copies of whole `tensors` on the CPU of rank 0; of other ranks nothing. All ranks must call it.

    A process holds one whole tensor at a time, and rank 0 the copies.
    """
    found = {}
    for name in sorted(tensors):  # equal in all processes, unlike the order of tensors from a file
        tensor = tensors[name]
        whole = tensor.full_tensor() if _is_dtensor(tensor) else tensor  # type: ignore[operator]
        if processes.rank == 0:
            found[name] = whole.detach().to("cpu", copy=True)
    return found


def parts_to_save(tensors: Mapping[str, Tensor], rank: int) -> dict[str, Tensor]:
    """Copies on the CPU of what process `rank` saves: its rows of sharded `tensors`; rank 0 also all other tensors."""
    return {
        name: (tensor.to_local() if _is_dtensor(tensor) else tensor).detach().to("cpu", copy=True)  # type: ignore[operator]
        for name, tensor in tensors.items()
        if rank == 0 or _is_dtensor(tensor)
    }


def scattered(tensors: Iterable[tuple[str, Tensor]], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of this process's parts of whole `tensors`, as `like` of the same name is sharded, and on its device.

    Raises:
        ValueError: A tensor has another dtype than that of `like`, which torch would convert.
    """
    found = {}
    for name, tensor in tensors:
        template: Any = like.get(name, tensor)
        if tensor.dtype != template.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, but must be {template.dtype}")
        if _is_dtensor(template) and tensor.shape == template.shape:
            from torch.distributed.tensor import distribute_tensor

            found[name] = distribute_tensor(
                tensor.to(template.device), template.device_mesh, template.placements, src_data_rank=None
            )
        else:
            found[name] = tensor.to(template.device, copy=True)
    return found
