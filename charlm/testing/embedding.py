"""Sample calls of embedding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .samples import SampleInput, laid_out


@dataclass(frozen=True)
class _Case:
    name: str
    index_shape: tuple[int, ...]
    weight_shape: tuple[int, int]
    index: torch.dtype = torch.int64
    weight_layout: str = "contiguous"
    hot: bool = False
    options: dict[str, Any] = field(default_factory=dict)


_CASES = (
    _Case("one_row_table", (3,), (1, 1)),
    _Case("names", (33, 3), (27, 10)),
    _Case("scalar_index", (), (7, 5)),
    _Case("four_dimensional_index", (3, 1, 5, 2), (65, 24)),
    _Case("empty_index", (0,), (27, 10)),
    _Case("empty_index_2d", (3, 0), (27, 10)),
    _Case("empty_rows", (3,), (27, 0)),
    _Case("uint8_index", (257, 8), (256, 33), index=torch.uint8),
    _Case("int16_index", (33,), (1000, 17), index=torch.int16),
    _Case("large_table", (257,), (4099, 65), index=torch.int32),
    _Case("hot_row", (4099,), (27, 10), hot=True),
    _Case("many_indices", (9001,), (27, 2)),
    _Case("hot_row_of_a_large_table", (17001,), (1000, 3), hot=True),
    _Case("transposed_weight", (33,), (27, 10), weight_layout="transposed"),
    _Case("sliced_weight", (33,), (27, 10), weight_layout="sliced_columns"),
    _Case("every_other_weight_row", (33,), (27, 10), weight_layout="every_other_row"),
    _Case("padding_idx", (257,), (27, 10), options={"padding_idx": 3}),
    _Case("padding_idx_0", (257,), (7, 10), options={"padding_idx": 0}),
    _Case("negative_padding_idx", (257,), (7, 10), options={"padding_idx": -1}),
    _Case("scale_grad_by_freq", (257,), (27, 10), options={"scale_grad_by_freq": True}),
    _Case("scale_grad_by_freq_padding", (257,), (7, 10), options={"scale_grad_by_freq": True, "padding_idx": 2}),
    _Case("sparse", (33, 3), (27, 10), options={"sparse": True}),
    _Case("sparse_padding", (33, 3), (7, 10), options={"sparse": True, "padding_idx": 2}),
    _Case("max_norm", (33,), (65, 10), options={"max_norm": 1.5}),
    _Case("max_norm_1", (33, 2), (27, 10), options={"max_norm": 2.0, "norm_type": 1.0}),
    _Case("max_norm_3", (33,), (27, 129), options={"max_norm": 2.0, "norm_type": 3.0}),
    _Case("max_norm_inf", (33,), (27, 10), options={"max_norm": 1.0, "norm_type": torch.inf}),
    _Case("max_norm_sliced", (33,), (27, 10), weight_layout="sliced_columns", options={"max_norm": 1.0}),
)


def sample_inputs_embedding(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Sample calls of `embedding`, about one for each option, shape and index dtype."""
    for seed, case in enumerate(_CASES):
        generator = torch.Generator(device).manual_seed(seed)
        n_rows = case.weight_shape[0]
        index = torch.randint(0, n_rows, case.index_shape, generator=generator, device=device)
        if case.hot:
            index[torch.rand(index.shape, generator=generator, device=device) < 0.9] = 0
        weight = torch.randn(case.weight_shape, generator=generator, device=device).to(dtype)
        arguments = {"input": index.to(case.index), "weight": laid_out(weight, case.weight_layout)}
        yield SampleInput(case.name, {**arguments, **case.options}, ("weight",))
