"""Batch normalization whose batch may be shared by several processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class SumOverProcesses(torch.autograd.Function):
    """The sum of a tensor over all processes; the gradient is that of the sum of the losses of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _all_reduced(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _all_reduced(grads[0])


def _all_reduced(x: Tensor) -> Tensor:
    x = x.clone(memory_format=torch.contiguous_format)
    torch.distributed.all_reduce(x)
    return x


class BatchNorm(nn.BatchNorm1d):
    """`nn.BatchNorm1d` for (B, H); with `is_shared`, B counts the rows of all processes of the default group.

    Processes may have different numbers of rows. In forward and in backward, 2 H + 1 numbers are summed over the
    processes. (torch's SyncBatchNorm needs a GPU.)
    """

    is_shared = False

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.is_shared):
            return super().forward(input)
        # Sums of deviations from a value that all processes know: sums of squares would cancel far from 0.
        shift = self.running_mean.detach().clone()
        deviation = input.float() - shift if input.dtype.itemsize < 4 else input - shift
        rows = deviation.new_full((1,), len(input))
        sums = SumOverProcesses.apply(torch.cat([deviation.sum(0), deviation.square().sum(0), rows]))
        total, squares, (count,) = sums.split([self.num_features, self.num_features, 1])
        mean = total / count
        variance = squares / count - mean.square()
        with torch.no_grad():
            self.num_batches_tracked.add_(1)
            self.running_mean.lerp_(shift + mean, self.momentum)
            self.running_var.lerp_(variance * (count / (count - 1)), self.momentum)
        scale = self.weight * (variance + self.eps).rsqrt()
        return ((deviation - mean) * scale + self.bias).to(input.dtype)
