"""Rows of a table, picked by index."""

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
    """Rows of a table: `out[..., :] = weight[input[...], :]`. Same arguments as `F.embedding`.

    Args:
        input: indices, any shape (*), any integer dtype; each in [0, V). Never negative.
        weight: (V, D), any floating dtype; a view with any strides.
        padding_idx: a row whose gradient is zero, in [-V, V). The output at this index is the row itself.
        max_norm: first scale every row that is looked up and whose p-norm is larger down to this norm, in
            `weight` itself. Nothing is written if an index is out of range.
        norm_type: p of that norm.
        scale_grad_by_freq: divide a row's gradient by the number of times its index occurs in `input`.
        sparse: give `weight` a sparse COO gradient.

    Returns:
        (*, D), the dtype of `weight`.

    Raises:
        IndexError: an index outside [0, V); the text names the index, its position and V.
        RuntimeError: indices that are not integers (bool included), a weight that is not 2-D, and, in
            backward, `sparse` together with `scale_grad_by_freq`.
        AssertionError: `padding_idx` outside [-V, V).

    Example:
        >>> weight = torch.eye(3)
        >>> embedding(torch.tensor([2, 0]), weight)
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if weight.is_cuda and weight.numel() == 0:  # torch's kernels read what is not there: pytorch#189668, pytorch#195185
        options = (padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        return embedding(input.cpu(), weight.cpu(), *options).to(weight.device)
    index = widened(input, "indices")
    try:
        if max_norm is not None:
            # embedding_renorm_ writes until it meets a bad index: look all of them up before.
            with torch.no_grad():
                _torch_embedding(index, weight)
        return _torch_embedding(index, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
    except IndexError:
        raise_if_out_of_range(input, index, weight.size(0), "index", "embeddings")
        raise
