"""Rows of a table, selected by index."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_compiling
from torch.overrides import handle_torch_function, has_torch_function_variadic

from charlm import _checks, reference

from .kernels import _C, by_sharding_rule, have_kernels


def embedding(
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Tensor:
    """Rows of `weight`, one for each index: `F.embedding`.

    Args:
        input: indices, any shape (*), any integer dtype, each in [0, V).
        weight: (V, D), any dtype and strides.
        padding_idx: a row whose gradient is zero, in [-V, V). The output at this index is the row itself.
        max_norm: the largest norm of a row. Before the lookup each row that is picked and has a larger norm is scaled
            down to it, in `weight` itself.
        norm_type: p of the p-norm for `max_norm`.
        scale_grad_by_freq: divide a row's gradient by the number of times its index occurs in `input`.
        sparse: give `weight` a sparse COO gradient.

    Returns:
        (*, D), the dtype of `weight`. Differentiable with respect to `weight`, to any order.

    Raises:
        IndexError: an index outside [0, V); the text names the index, its position and V. Nothing is written then. On
            CUDA see `charlm.synchronize`.
        RuntimeError: indices that are not integers (bool included); a weight that is not 2-D; in backward, `sparse`
            together with `scale_grad_by_freq`.
        AssertionError: `padding_idx` outside [-V, V).

    Formula:
        out[..., :] = weight[input[...], :], which is one_hot(input) @ weight without the product. The gradient of a row
        is the sum of the gradients where its index occurs, in an order that does not depend on the threads.

    Example:
        >>> embedding(torch.tensor([2, 0], dtype=torch.uint8), torch.eye(3))
        tensor([[0., 0., 1.],
                [1., 0., 0.]])
    """
    if has_torch_function_variadic(input, weight):
        return handle_torch_function(
            embedding,
            (input, weight),
            input,
            weight,
            padding_idx=padding_idx,
            max_norm=max_norm,
            norm_type=norm_type,
            scale_grad_by_freq=scale_grad_by_freq,
            sparse=sparse,
        )
    if type(norm_type) is not float:
        norm_type = _checks.number("embedding", "norm_type", norm_type)
    if max_norm is not None:
        max_norm = _checks.number("embedding", "max_norm", max_norm)
        if not have_kernels("embedding", ("input", "weight"), (input, weight)):
            return reference.embedding(input, weight, padding_idx, max_norm, norm_type, scale_grad_by_freq, sparse)
        with torch.no_grad():
            # embedding_renorm_ scales rows until it finds a bad index. This lookup raises before any row is scaled.
            embedding(input, weight, padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse)
            if weight.is_cuda:
                # In torch's function, which waits for the device anyway, a bad index would destroy the CUDA context.
                torch.ops.charlm._synchronize.default(weight)
            if weight.numel():  # torch's kernel reads one number of an empty table: pytorch#195185
                torch.embedding_renorm_(weight, input.to(torch.int64).contiguous(), max_norm, norm_type)
    if _C is not None and not is_compiling():
        rows = _C.embedding(weight, input, padding_idx, scale_grad_by_freq, sparse)
        if rows is not NotImplemented:
            return rows
    has_kernels = have_kernels("embedding", ("input", "weight"), (input, weight))
    scale_grad_by_freq = _checks.boolean("embedding", "scale_grad_by_freq", scale_grad_by_freq)
    sparse = _checks.boolean("embedding", "sparse", sparse)
    row = _checks.padding_row("embedding", padding_idx, weight.size(0)) if weight.dim() > 0 else -1
    if not has_kernels:
        padding_idx = None if padding_idx is None else row
        rows = by_sharding_rule(
            "embedding", (input, weight), padding_idx=padding_idx, scale_grad_by_freq=scale_grad_by_freq, sparse=sparse
        )
        if rows is not NotImplemented:
            return rows
        return reference.embedding(input, weight, padding_idx, None, norm_type, scale_grad_by_freq, sparse)
    return torch.ops.charlm.embedding.default(weight, input, row, scale_grad_by_freq, sparse)
