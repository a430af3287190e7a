"""The ops that the benchmark knows: one `Workload` class each."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from bench.cases import INFORMATION, BadRequest, Case
from bench.ops.cross_entropy import CrossEntropy
from bench.ops.embedding import Embedding, EmbeddingBackward, EmbeddingLinear
from bench.ops.information import Information
from bench.ops.linear_cross_entropy import LinearCrossEntropy
from bench.ops.train_step import TrainStep
from bench.providers import Workload

WORKLOADS: dict[str, type[Workload]] = {
    "cross_entropy": CrossEntropy,
    "embedding": Embedding,
    "embedding_backward": EmbeddingBackward,
    "embedding_linear": EmbeddingLinear,
    "linear_cross_entropy": LinearCrossEntropy,
    "train_step": TrainStep,
    **dict.fromkeys((*INFORMATION, "kl_div"), Information),
}
MEMINFO = Path("/proc/meminfo")
# Tensors of the size of the main one that are alive at once at the worst moment: the inputs, charlm's gradient, two of
# lower bounds, three of torch eager's backward, and JAX's copy with its gradient.
TENSORS_AT_ONCE = 10


def make_workload(case: Case, device: str = "cpu", tensors_at_once: int = TENSORS_AT_ONCE) -> Workload:
    """BadRequest where memory is short."""
    available = available_memory(device)
    # torch.randn makes float32: half types need as much while they are made.
    needed = tensors_at_once * max(4, getattr(torch, case.dtype).itemsize) * without_memory(case).elements()
    if available is not None and needed > available:
        raise BadRequest(f"too little memory: it needs about {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are free")
    return WORKLOADS[case.op](case, device)


def without_memory(case: Case) -> Workload:
    """The workload of a case without its memory."""
    return WORKLOADS[case.op](case, "meta")


def available_memory(device: str) -> int | None:
    """Bytes that can be had without swapping; None where the system does not say."""
    if device == "cuda":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    if MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in MEMINFO.read_text(encoding="ascii").splitlines())
        return int(fields["MemAvailable"].split()[0]) * 1024
    if hasattr(os, "sysconf") and "SC_AVPHYS_PAGES" in os.sysconf_names:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return None
