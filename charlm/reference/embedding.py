"""Rows of a table, selected by index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding as _torch_embedding

from .indices import raise_if_out_of_range, widened


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of `weight`, one for each index: torch's own `F.embedding`.

    Arguments and errors are those of `charlm.functional.embedding`.

    Returns:
        (*, D), the dtype of `weight`.

    Example:
        >>> embedding(torch.tensor([2, 0]), torch.eye(3))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if weight.is_cuda and weight.numel() == 0:  # torch's kernels read past the end: pytorch#189668, #195185
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return embedding(input.cpu(), weight.cpu(), *options).to(weight.device)
    index = widened(input, "indices")
    try:
        if max_norm is not None:
            # embedding_renorm_ scales rows until it finds a bad index. This lookup raises before any row is scaled.
            with torch.no_grad():
                _torch_embedding(index, weight)
        return _torch_embedding(index, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    except IndexError:
        raise_if_out_of_range(input, index, weight.size(0), "index", "embeddings")
        raise
