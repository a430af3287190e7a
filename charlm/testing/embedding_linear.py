"""Sample calls of embedding_linear."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from .samples import SampleInput, laid_out


@dataclass(frozen=True)
class _Case:
    """The recipe of a `SampleInput`: input (*shape, T), embedding (V, D), linear weight (H, T * D)."""

    name: str
    input_shape: tuple[int, ...]
    embedding_shape: tuple[int, int]
    hidden: int
    index: torch.dtype = torch.int64
    layout: str = "contiguous"
    bias: bool = True
    options: dict[str, Any] = field(default_factory=dict)


def _both_plans(name: str, *sizes: Any, **others: Any) -> tuple[_Case, ...]:
    options = others.pop("options", {})
    return tuple(
        _Case(f"{name}_{plan}", *sizes, **others, options={**options, "plan": plan}) for plan in ("folded", "gathered")
    )


_CASES = (
    *_both_plans("one_of_each", (1, 1), (1, 1), 1),
    *_both_plans("names", (33, 3), (27, 10), 41, options={"activation": "tanh"}),
    *_both_plans("names_relu", (33, 3), (27, 10), 41, options={"activation": "relu"}),
    *_both_plans("names_gelu", (129, 3), (27, 10), 41, options={"activation": "gelu"}),
    *_both_plans("no_bias", (33, 3), (27, 10), 17, bias=False),
    *_both_plans("many_rows", (4099, 3), (27, 10), 41, options={"activation": "tanh"}),
    *_both_plans("wide", (257, 8), (27, 24), 200, options={"activation": "tanh"}),
    *_both_plans("bytes", (257, 8), (256, 33), 129, index=torch.uint8, options={"activation": "tanh"}),
    *_both_plans("one_context", (5,), (27, 10), 33, options={"activation": "gelu"}),
    *_both_plans("many_tokens", (33, 5), (300, 10), 36, options={"activation": "gelu"}),
    *_both_plans("three_dimensions", (3, 1, 5, 2), (65, 7), 29, index=torch.int16),
    *_both_plans("no_context", (0, 3), (27, 10), 41, options={"activation": "tanh"}),
    *_both_plans("no_place", (3, 0), (27, 10), 5, options={"activation": "tanh"}),
    *_both_plans("no_hidden", (3, 2), (27, 10), 0),
    *_both_plans("no_dimension", (3, 2), (27, 0), 5),
    *_both_plans("padding_idx", (257, 3), (27, 10), 41, options={"padding_idx": 3, "activation": "tanh"}),
    *_both_plans("negative_padding_idx", (33, 3), (7, 10), 9, options={"padding_idx": -1}),
    *_both_plans("transposed", (33, 3), (27, 10), 41, layout="transposed"),
    *_both_plans("sliced", (33, 3), (27, 10), 41, layout="sliced_columns", options={"activation": "relu"}),
    _Case("auto_few_rows", (3, 3), (1000, 10), 41, options={"activation": "tanh"}),
    _Case("auto_many_rows", (1025, 3), (27, 10), 41, options={"activation": "tanh"}),
)


# Measured against long double, for sums of up to 4099 terms by GEMMs: the oracle's own error is up to 60 ulps of the
# largest element (linear_weight.grad of "many_rows"), ours 9.
GEMM_FLOAT64_ULPS = 64.0


def sample_inputs_embedding_linear(dtype: torch.dtype, device: str = "cpu") -> Iterator[SampleInput]:
    """Sample calls of `embedding_linear`, about one for each option, shape and plan."""
    for seed, case in enumerate(_CASES):
        generator = torch.Generator(device).manual_seed(seed)
        vocabulary, dim = case.embedding_shape
        places = case.input_shape[-1]
        index = torch.randint(0, vocabulary, case.input_shape, generator=generator, device=device)
        embedding = torch.randn(case.embedding_shape, generator=generator, device=device)
        weight = torch.randn((case.hidden, places * dim), generator=generator, device=device)
        weight *= 0.5 * max(1, places * dim) ** -0.5  # the scale of an initialised network, so that few units saturate
        arguments: dict[str, Any] = {
            "input": index.to(case.index),
            "embedding_weight": laid_out(embedding.to(dtype), case.layout),
            "linear_weight": laid_out(weight.to(dtype), case.layout),
        }
        differentiable = ["embedding_weight", "linear_weight"]
        if case.bias:
            arguments["linear_bias"] = (torch.randn(case.hidden, generator=generator, device=device) / 10).to(dtype)
            differentiable.append("linear_bias")
        yield SampleInput(case.name, {**arguments, **case.options}, tuple(differentiable), GEMM_FLOAT64_ULPS)
