"""Indices of any integer dtype for torch's ops, which take int64, and the IndexError of one that is out of range."""

from __future__ import annotations

import torch
from torch import Tensor

INDEX_DTYPES = (
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.uint8,
    torch.uint16,
    torch.uint32,
    torch.uint64,
)
_INT64_MAX = torch.iinfo(torch.int64).max


def widened(index: Tensor, name: str, ignore_index: int | None = None) -> Tensor:
    """Indices of any integer dtype as int64. bool raises a RuntimeError; other tensors are left for torch to check."""
    if not isinstance(index, Tensor) or index.is_floating_point() or index.is_complex():
        return index
    if index.dtype not in INDEX_DTYPES:
        raise RuntimeError(f"expected {name} of an integer dtype, got {index.dtype}")
    wide = index.to(torch.int64)
    if index.dtype == torch.uint64:
        # Values that int64 cannot hold become one that is out of range: 2**64 - 100 must not become -100.
        out_of_range = _INT64_MAX - 1 if ignore_index == _INT64_MAX else _INT64_MAX
        wide = torch.where(wide < 0, out_of_range, wide)
    return wide


def raise_if_out_of_range(
    given: Tensor, wide: Tensor, limit: int, noun: str, things: str, ignore_index: int | None = None
) -> None:
    """Raises an IndexError that names the first index outside [0, limit), if there is one.

    Args:
        given: the indices as the caller passed them.
        wide: the same as int64.
        limit: the number of `things`.
        noun, things: the words for an index and for what it selects.
        ignore_index: an index that is allowed.
    """
    bad = (wide < 0) | (wide >= limit)
    if ignore_index is not None:
        bad &= wide != ignore_index
    positions = bad.nonzero()
    if len(positions) > 0:
        position = tuple(positions[0].tolist())
        value = given[position].item()
        raise IndexError(f"{noun} {value} at position {position} is out of range for {limit} {things}")
