"""How a call's tensors are sharded over a mesh, described by labels of their dimensions.

A rule gives each dimension of each tensor a label, as the letters of an einsum do: the rows of the logits and of the
target have the same label. A dimension of the mesh may shard one label, in every tensor that has it. Where a label may
be sharded, each process can compute the op on its shards:

- a tensor that has the label is sharded, and so is its gradient;
- a tensor that lacks it is replicated, and each process adds a part of its gradient: the gradient is `Partial`.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed._functional_collectives import AsyncCollectiveTensor, all_reduce
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

Labels: TypeAlias = tuple["int | str | None", ...]  # of a tensor's dimensions; None: it may not be sharded


CLASSES = "classes"  # the label of the classes


class Layout(NamedTuple):
    """The labels that a mesh shards.

    Attributes:
        mesh: of all DTensors of the call.
        labels: for each dimension of the mesh the label that it shards, or None: all tensors are replicated there.
    """

    mesh: DeviceMesh
    labels: Labels

    @property
    def is_replicated(self) -> bool:
        return all(label is None for label in self.labels)

    def placements(self, labels: Labels) -> tuple[Placement, ...]:
        """Of a tensor with these labels: sharded where it has the label that the mesh shards, else replicated."""
        return tuple(
            Replicate() if label is None or label not in labels else Shard(labels.index(label)) for label in self.labels
        )

    def partial(self, labels: Labels) -> tuple[Placement, ...]:
        """Of a sum over all other labels: `placements`, with `Partial` for each sharded label that it lacks."""
        return tuple(
            placement if label is None or label in labels else Partial()
            for placement, label in zip(self.placements(labels), self.labels, strict=True)
        )

    def has_one_group(self, label: int | str) -> bool:
        """Whether one dimension of the mesh shards the label, among groups whose ranks have the order of the mesh."""
        return self.labels.count(label) == 1 and _is_in_order(self.mesh, self.labels.index(label))

    def without_classes(self) -> tuple[ProcessGroup | None, Layout]:
        """The group that shards the classes, if any, and the layout of what is the same on all of its ranks."""
        if CLASSES not in self.labels:
            return None, self
        labels = tuple(None if label == CLASSES else label for label in self.labels)
        return self.mesh.get_group(self.labels.index(CLASSES)), self._replace(labels=labels)

    def shard(self, label: int | str, size: int) -> tuple[int, int]:
        """The first index and the number of the indices of this process, of `size` that have the label."""
        start = 0
        for mesh_dim, sharded in enumerate(self.labels):
            if sharded == label:
                chunk = -(-size // self.mesh.size(mesh_dim))
                first = min(chunk * self.mesh.get_local_rank(mesh_dim), size)
                start, size = start + first, min(chunk, size - first)
        return start, size

    def local(self, tensor: Tensor, labels: Labels) -> Tensor:
        """This process's shard. A plain tensor is replicated; what is replicated and has a sharded label is cut."""
        if not isinstance(tensor, DTensor):
            tensor = DTensor.from_local(tensor, self.mesh, [Replicate()] * self.mesh.ndim, run_check=False)
        wanted = self.placements(labels)
        if tensor.placements != wanted:
            tensor = tensor.redistribute(placements=wanted)
        local = tensor.to_local(grad_placements=self.partial(labels))
        return _Wait.apply(local) if isinstance(local, AsyncCollectiveTensor) else local

    def wrap(self, local: Tensor, labels: Labels, shape: Sequence[int]) -> DTensor:
        """The DTensor of `shape` whose shards are the contiguous `local`; a sum where it lacks a sharded label."""
        strides = [1] * len(shape)
        for i in range(len(shape) - 1, 0, -1):
            strides[i - 1] = strides[i] * max(shape[i], 1)
        return DTensor.from_local(
            local, self.mesh, self.partial(labels), run_check=False, shape=torch.Size(shape), stride=tuple(strides)
        )

    def all_reduce(self, local: Tensor) -> Tensor:
        """The sum over all processes that hold different shards, on each: one all-reduce a dimension of the mesh."""
        return _Sum.apply(local, self.mesh, [i for i, label in enumerate(self.labels) if label is not None])

    def replicated(self, local: Tensor) -> DTensor:
        return DTensor.from_local(local, self.mesh, self.placements(()), run_check=False)


def find_layout(
    tensors: Sequence[tuple[Tensor | None, Labels]], may_shard: Collection[int | str | None]
) -> Layout | None:
    """The layout of a call, or None for a call that needs more than its local shards.

    Args:
        tensors: each tensor of the call and its labels, the input first.
        may_shard: the labels that a mesh may shard.

    Returns:
        None for an input that is plain: the rows of this process, of which the others have other ones, could be taken
        for the whole. None for placements other than `Shard` and `Replicate`; for another label that is sharded, or two
        by one dimension of the mesh; for two meshes; and where a tensor that must be cut has a gradient, which would
        have to be gathered.
    """
    if not isinstance(tensors[0][0], DTensor):
        return None
    sharded = [(tensor, labels) for tensor, labels in tensors if isinstance(tensor, DTensor)]
    mesh = sharded[0][0].device_mesh
    if mesh.get_coordinate() is None or any(tensor.device_mesh != mesh for tensor, _ in sharded):
        return None
    found: list[int | str | None] = [None] * mesh.ndim
    for tensor, labels in sharded:
        if len(labels) != tensor.dim():
            return None
        for mesh_dim, placement in enumerate(tensor.placements):
            if type(placement) is Replicate:
                continue
            if type(placement) is not Shard:
                return None
            label = labels[placement.dim]
            if label is None or label not in may_shard or found[mesh_dim] not in (None, label):
                return None
            found[mesh_dim] = label
    layout = Layout(mesh, tuple(found))
    if not all(tensor is None or _is_cut_freely(tensor, layout.placements(labels)) for tensor, labels in tensors):
        return None
    return layout


def _is_cut_freely(tensor: Tensor, wanted: tuple[Placement, ...]) -> bool:
    """Whether `wanted` is what the tensor is, or a part of what this process holds of it."""
    given = tensor.placements if isinstance(tensor, DTensor) else (Replicate(),) * len(wanted)
    cut = [mesh_dim for mesh_dim, pair in enumerate(zip(given, wanted, strict=True)) if pair[0] != pair[1]]
    if not cut:
        return True
    # A later dimension of the mesh divides what an earlier one leaves: cut before it, other rows would be its own.
    in_order = all(given[later] != wanted[first] for first in cut for later in range(first + 1, len(given)))
    return in_order and not (tensor.requires_grad and torch.is_grad_enabled())


@torch.compiler.assume_constant_result
def _is_in_order(mesh: DeviceMesh, mesh_dim: int) -> bool:
    """Whether ranks increase along a dimension of the mesh, in all its groups: all processes must decide alike."""
    return bool((mesh.mesh.diff(dim=mesh_dim) > 0).all())


class _Sum(torch.autograd.Function):
    """A sum over processes, which all use in the same way: the gradient of each part is that of the sum."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, mesh: DeviceMesh, mesh_dims: list[int]) -> Tensor:
        for mesh_dim in mesh_dims:
            local = all_reduce(local, "sum", (mesh, mesh_dim))
        return local.wait() if isinstance(local, AsyncCollectiveTensor) else local

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None]:
        return grad_output, None, None


class _Wait(torch.autograd.Function):
    """The tensor that an asynchronous collective of DTensor computes, when it is computed."""

    @staticmethod
    def forward(ctx: Any, pending: Tensor) -> Tensor:
        value = pending.wait()  # type: ignore[attr-defined]
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        return grad_output
