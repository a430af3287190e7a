"""The tensors of a case, made once and shared by all contenders; and whether the machine has room for them."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.cases import BadRequest, Case
from bench.layers import LAYERS

MEMINFO = Path("/proc/meminfo")
# Tensors of the size of the logits, or of an embedding's output, that are alive at once at the worst moment: the
# inputs, our buffer, two floors', three of torch eager's backward, and JAX's copy with its gradient.
TENSORS_AT_ONCE = 10


@dataclass(frozen=True)
class CrossEntropyInputs:
    """logits: (N, V). target: (N) int64, or (N, V) probabilities. options: other arguments of `cross_entropy`.

    cotangent: (N), the gradient of each loss, with reduction "none"; else None.
    """

    logits: Tensor
    target: Tensor
    options: dict[str, Any] = field(default_factory=dict)
    cotangent: Tensor | None = None


@dataclass(frozen=True)
class EmbeddingInputs:
    """index: (N). weight: (V, D). gradient: (N, D), the output's; for the backward only."""

    index: Tensor
    weight: Tensor
    gradient: Tensor | None = None


def make_inputs(
    case: Case, tensors_at_once: int = TENSORS_AT_ONCE, device: str = "cpu"
) -> CrossEntropyInputs | EmbeddingInputs:
    """The same values each time: a record can be compared with another. BadRequest if memory is short."""
    require_memory(bytes_needed(case, tensors_at_once), device)
    with torch.device(device):
        return _inputs(case, torch.Generator(device).manual_seed(0))


def _inputs(case: Case, generator: torch.Generator) -> CrossEntropyInputs | EmbeddingInputs:
    if case.op in LAYERS:
        return LAYERS[case.op].make_inputs(case, generator)
    if case.op == "cross_entropy":
        return _cross_entropy_inputs(case, generator)
    n, v, d = case.shape
    dtype = getattr(torch, case.dtype)
    index = torch.randint(v, (n,), generator=generator)
    weight = torch.randn((v, d), generator=generator).to(dtype)
    if case.op == "embedding":
        return EmbeddingInputs(index.to(getattr(torch, case.variant)), weight)
    return EmbeddingInputs(index, weight, torch.randn((n, d), generator=generator).to(dtype))


def _cross_entropy_inputs(case: Case, generator: torch.Generator) -> CrossEntropyInputs:
    n, v = case.shape
    dtype = getattr(torch, case.dtype)
    logits = torch.randn((n, v), generator=generator).mul_(2).to(dtype)
    target = torch.randint(v, (n,), generator=generator)
    if case.variant == "label_smoothing":
        return CrossEntropyInputs(logits, target, {"label_smoothing": 0.1})
    if case.variant == "weight":
        weight = (torch.rand(v, generator=generator) + 0.5).to(dtype)
        return CrossEntropyInputs(logits, target, {"weight": weight})
    if case.variant == "ignore_index":
        ignored = torch.rand(n, generator=generator) < 0.3
        return CrossEntropyInputs(logits, target.masked_fill(ignored, -100))
    if case.variant == "probabilities":
        return CrossEntropyInputs(logits, torch.randn((n, v), generator=generator).softmax(1).to(dtype))
    if case.variant == "reduction_none":
        cotangent = torch.rand(n, generator=generator).to(dtype)
        return CrossEntropyInputs(logits, target, {"reduction": "none"}, cotangent)
    return CrossEntropyInputs(logits, target)


def item_size(case: Case) -> int:
    return torch.finfo(getattr(torch, case.dtype)).bits // 8


def main_elements(case: Case) -> int:
    """Of the logits; of an embedding's output; of all tensors of a layer."""
    if case.op in LAYERS:
        return LAYERS[case.op].elements(case)
    return prod(case.shape) if case.op == "cross_entropy" else case.shape[0] * case.shape[2]


def bytes_needed(case: Case, tensors_at_once: int) -> int:
    table = 0 if case.op == "cross_entropy" or case.op in LAYERS else case.shape[1] * case.shape[2]
    # torch.randn is float32: half types need as much while they are made.
    return tensors_at_once * max(4, item_size(case)) * (main_elements(case) + table)


def minimal_bytes(case: Case) -> int:
    """What any implementation has to move: each input read once, each output written once."""
    if case.op in LAYERS:
        return LAYERS[case.op].minimal_bytes(case)
    size, elements = item_size(case), main_elements(case)
    if case.op == "cross_entropy":
        passes = {"forward_only": 1, "probabilities": 3}.get(case.variant, 2)
        return passes * size * elements + (0 if case.variant == "probabilities" else 8 * case.shape[0])
    index = case.shape[0] * (1 if case.variant == "uint8" else 8)
    table = case.shape[1] * case.shape[2]
    return index + size * (elements + table)


def available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None


def _available_gpu_memory(device: str) -> int:
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def require_memory(needed: int, device: str) -> None:
    available = available_memory() if device == "cpu" else _available_gpu_memory(device)
    if available is not None and needed > available:
        raise BadRequest(f"too little memory: it needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
