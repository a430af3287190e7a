"""Writes docs/gpu/ROOFLINE.md: the bytes that each CUDA kernel moves, the fewest possible, and a predicted time.

    python scripts/cuda_roofline.py

Bytes between a GPU's memory and its multiprocessors are derived from the algorithms of the kernels. The sizes at which
a launch chooses another path are read from the sources. The predicted time is bytes divided by the nominal bandwidth of
an H100, a lower bound; MEASURED.md has the measurements. A test compares the file with the output of this script.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
OUTPUT = ROOT / "docs" / "gpu" / "ROOFLINE.md"
H100_BYTES_PER_SECOND = 3.35e12  # nominal
H100_SHARED_BYTES = 227 << 10  # of a block
SOFTMAX_SHARED_BYTES = 512  # of these, used by the partial results of a row
TARGET, PARTIAL_SOFTMAX = 8, 16  # bytes; a float32 row's softmax is stored as a maximum and a sum
LAUNCHES = "cross_entropy.cu"
DIGITS = 256  # values of a digit of the sort of indices
DTYPES = {"float32": 4, "bfloat16": 2}

HEADER = """<!-- Written by scripts/cuda_roofline.py; do not edit. -->
# Bytes and predicted times

Bytes that one call moves between a GPU's memory and its multiprocessors, against the fewest possible: for
cross_entropy, the logits and targets are read once and the gradient is written once; for embedding, the indices and the
rows or the gradient are read once and the result is written once. **Predicted** is these bytes over the nominal 3.35
TB/s of an H100; [MEASURED.md](MEASURED.md) holds what was measured on one. The prediction leaves out launches, a few
microseconds each. A second read that hits the second-level cache counts like any other. A row of more than {fits:,}
classes of bfloat16 does not fit in an H100's shared memory: with its gradient, the part beyond that is read a second
time. A backward after "forward and gradient" with unit grad_output reads that one number.

"""


@dataclass(frozen=True)
class Row:
    call: str
    shape: str
    dtype: str
    path: str
    moved: float
    fewest: float


def constant(file: str, name: str) -> int:
    """Reads the value of a constexpr in a kernel file: a product or a shift of numbers."""
    text = (KERNELS / file).read_text(encoding="utf-8")
    found = re.search(rf"\b{name} = ([\d <*]+)[;,]", text)
    if found is None:
        raise LookupError(f"{file} has no constant {name}")
    return int(eval(found[1], {"__builtins__": {}}))


def cross_entropy(call: str, n: int, v: int, dtype: str) -> Row:
    size = DTYPES[dtype]
    row = v * size
    both = call != "forward"
    # The targets are read twice: the divisor of a mean is needed before a gradient is written.
    moved = row * (2 if both else 1) + 2 * TARGET + 8
    path = "block"
    if v <= constant("cross_entropy_small.cuh", "kSmallMaxClasses"):
        path = "small"
    elif call == "backward":
        path = "chunks"
    elif n < constant(LAUNCHES, "kChunksBelowRows") and v > constant(LAUNCHES, "kChunksAboveClasses"):
        path = "chunks"
        chunk = constant("cross_entropy_block.cuh", "kChunkPacks") * 16
        moved += 2 * PARTIAL_SOFTMAX * -(-row // chunk) + (row if both else 0)
    elif both:
        moved += max(0, row - (H100_SHARED_BYTES - SOFTMAX_SHARED_BYTES))
    fewest = row * (2 if both else 1) + TARGET
    return Row(f"cross_entropy {call}", f"{n} × {v}", dtype, path, n * moved, n * fewest)


def embedding(call: str, n: int, v: int, d: int, dtype: str) -> Row:
    size, index = DTYPES[dtype], 8
    table, rows = v * d * size, n * d * size
    if call == "forward":
        # A table that fits the second-level cache is read from memory once.
        read = min(rows, table) if table < 32 << 20 else rows
        return Row(
            "embedding forward", f"{n} of {v} × {d}", dtype, "rows", read + rows + n * index, read + rows + n * index
        )
    fewest = rows + n * index + table
    # The table that blocks sum into has 64 columns at V = 256, and at most as many for more.
    tiles, block_rows = -(-d // 64), constant("embedding_sort.cuh", "kSortRows")
    blocks = constant("embedding_tables.cuh", "kTableBlocks")
    narrow = d * size < constant("embedding_tables.cuh", "kStagedRowBytes")
    if v <= DIGITS and (narrow or n * tiles <= 2 * blocks * block_rows):
        part = max(-(-n // -(-blocks // tiles)), constant("embedding_tables.cuh", "kFewestTableRows"), v)
        moved = fewest + (tiles - 1) * n * index + 2 * -(-n // part) * v * d * 4
        return Row("embedding backward", f"{n} of {v} × {d}", dtype, "tables", moved, fewest)
    if v <= DIGITS:  # indices again, positions out and in; the pieces' sums
        moved = fewest + n * (index + 8) + 2 * (n / constant("embedding_sorted.cuh", "kLongPiece") + v) * d * 4
        return Row("embedding backward", f"{n} of {v} × {d}", dtype, "pieces", moved, fewest)
    # The second digit's keys are counted; keys and positions twice out and in. Segments over whole chunks are rare.
    moved = fewest + n * (index + 4 + 2 * 16)
    return Row("embedding backward", f"{n} of {v} × {d}", dtype, "chunks", moved, fewest)


def rows() -> list[Row]:
    shapes = [(262144, 27), (262144, 65), (65536, 256), (16384, 1024), (8192, 8192), (2048, 32000), (1024, 50257)]
    shapes += [(1024, 65536), (1024, 128256), (16, 128256)]
    losses = [
        cross_entropy(call, n, v, dtype)
        for dtype in ("bfloat16", "float32")
        for call in ("forward", "forward and gradient", "backward")
        for n, v in shapes
    ]
    tables = [(98304, 27, 10), (65536, 65, 384), (65536, 256, 64), (65536, 256, 384), (65536, 50257, 768)]
    return losses + [embedding(call, *shape, "float32") for call in ("forward", "backward") for shape in tables]


def table() -> str:
    lines = [
        "| call | shape | dtype | path | MB moved | × fewest | predicted on an H100 |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in rows():
        microseconds = r.moved / H100_BYTES_PER_SECOND * 1e6
        lines.append(
            f"| {r.call} | {r.shape} | {r.dtype} | {r.path} | {r.moved / 1e6:.1f} | {r.moved / r.fewest:.2f} "
            f"| {microseconds:.3g} µs |"
        )
    fits = (H100_SHARED_BYTES - SOFTMAX_SHARED_BYTES) // DTYPES["bfloat16"]
    return HEADER.format(fits=fits) + "\n".join(lines) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(table(), encoding="utf-8")
