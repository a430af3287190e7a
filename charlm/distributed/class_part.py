"""The classes of a rank, and what the ranks exchange of each row."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from charlm import _checks

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name before torch 2.13


class Part(NamedTuple):
    """The classes of this rank: those from `start` on, `per_rank` of them or what is left."""

    num_classes: int
    group: ProcessGroup
    rank: int
    n_ranks: int
    per_rank: int

    @classmethod
    def of(cls, function: str, num_classes: int, group: ProcessGroup | None) -> Part:
        """The part of this rank in a call of `function`, which an error about num_classes names."""
        num_classes = _checks.integer(function, "num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be > 0, got {num_classes}")
        group = dist.group.WORLD if group is None else group
        n_ranks = dist.get_world_size(group)
        return cls(num_classes, group, dist.get_rank(group), n_ranks, -(-num_classes // n_ranks))

    @property
    def start(self) -> int:
        return min(self.rank * self.per_rank, self.num_classes)

    @property
    def size(self) -> int:
        return self.size_of(self.rank)

    def size_of(self, rank: int) -> int:
        return max(0, min(self.per_rank, self.num_classes - rank * self.per_rank))

    def check(self, name: str, found: int) -> None:
        if found != self.size:
            raise ValueError(
                f"{name} must hold {self.size} of the {self.num_classes} classes on rank {self.rank} of "
                f"{self.n_ranks}, those from {self.start} on, got {found}"
            )


def shares_of(maxima: Tensor, sums: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of the maxima of the ranks (W, n), or 0 for an infinite one, and their sums relative to it."""
    maximum = maxima.amax(0)
    maximum = torch.where(maximum.isinf(), 0, maximum)
    return maximum, sums * (maxima - maximum).exp()


class Copied(Function):
    """A tensor that is the same on every rank, whose gradients of all ranks are summed."""

    @staticmethod
    def forward(ctx: Any, input: Any, part: Any) -> Any:
        ctx.part = part
        return input.view_as(input)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=ctx.part.group)
        return grad, None


class Gathered(Function):
    """(K, n) of each rank → (W, K, n); every rank computes the same from it, so its gradient is its own part.

    The callers join the numbers in float64: a rounding of a row's sum is an error of all its gradients.
    """

    @staticmethod
    def forward(ctx: Any, numbers: Any, part: Any) -> Any:
        ctx.part = part
        gathered = numbers.new_empty((part.n_ranks * len(numbers), *numbers.shape[1:]))
        _all_gather(gathered, numbers.contiguous(), group=part.group)
        return gathered.view(part.n_ranks, *numbers.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Any) -> Any:
        return grad[ctx.part.rank], None
