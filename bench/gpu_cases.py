"""What the benchmark times on a GPU, each case with its goals, and the fewest bytes that each has to move.

Figures: "eager" and the other peers are peer / ours. "copy_bandwidth" is bytes / time of ours over bytes / time of a
device-to-device copy that was sampled in turn with it: 1 is as fast as the memory can be read and written.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.cases import Case, Goal, at_least
from bench.inputs import item_size, main_elements, minimal_bytes
from bench.layers import LAYERS

SMALL_V = (27, 65, 256)
SMALL_N = (65536, 262144)
# V to N; a row of 128256 does not fit into shared memory, so ours reads it twice.
LARGE_V = {1024: 65536, 8192: 16384, 32000: 8192, 50257: 8192, 65536: 4096, 128256: 4096}
TABLES = ((27, 10), (27, 768), (65, 384), (256, 64), (256, 768), (50257, 64), (50257, 768))
N_INDICES = 262144

AS_FAST_AS_A_COPY = at_least("copy_bandwidth", 0.9)
TWICE_TORCH = at_least("eager", 2)
THREE_TIMES_TORCH = at_least("eager", 3)
FOUR_TIMES_TORCH = at_least("eager", 4)


def _cross_entropy(dtype: str) -> Iterable[Case]:
    for v in SMALL_V:
        for n in SMALL_N:
            yield Case("cross_entropy", "default", (n, v), dtype, (TWICE_TORCH,))
    for v, n in LARGE_V.items():
        goals = (AS_FAST_AS_A_COPY,) if dtype == "bfloat16" and 8192 <= v <= 65536 else ()
        yield Case("cross_entropy", "default", (n, v), dtype, goals)


def _other_variants() -> Iterable[Case]:
    shapes = [(SMALL_N[0], v) for v in (27, 256)] + [(LARGE_V[v], v) for v in (8192, 32000, 50257)]
    for variant in ("forward_only", "inplace_forward"):
        for shape in shapes:
            yield Case("cross_entropy", variant, shape, "bfloat16")


def _embeddings(dtype: str, tables: Iterable[tuple[int, int]]) -> Iterable[Case]:
    for v, d in tables:
        goals: tuple[Goal, ...] = (THREE_TIMES_TORCH,) if v <= 256 else ()
        yield Case("embedding_backward", "default", (N_INDICES, v, d), dtype, goals)
        yield Case("embedding", "int64", (N_INDICES, v, d), dtype)


def _information() -> Iterable[Case]:
    for op in ("entropy", "kl_divergence", "surprisal"):
        for shape in ((65536, 256), (2048, 32000)):
            yield Case(op, "default", shape, "float32", (FOUR_TIMES_TORCH,))
            yield Case(op, "default", shape, "bfloat16")


def _layers() -> Iterable[Case]:
    """Without a goal: how fast cuBLAS multiplies bounds the second."""
    for shape in ((4096, 8, 24, 200, 27), (65536, 8, 24, 200, 27), (65536, 8, 32, 256, 256)):
        yield Case("embedding_linear", "default", shape)
    for shape in ((4096, 512, 32000), (65536, 200, 27)):
        yield Case("linear_cross_entropy", "default", shape)
        yield Case("linear_cross_entropy", "default", shape, "bfloat16")


# Those with a goal first: where time runs out, the rest is what is not reached.
CASES = sorted(
    [
        *_cross_entropy("bfloat16"),
        *_embeddings("float32", TABLES),
        *_information(),
        *_layers(),
        *_cross_entropy("float32"),
        *_embeddings("bfloat16", TABLES[3:5]),
        *_other_variants(),
    ],
    key=lambda case: not case.goals,
)


def dry_run() -> list[Case]:
    """A few rows of one case of each kind, without goals: what is timed without a GPU means nothing."""
    kinds = {(case.op, case.variant, case.dtype): case for case in CASES}
    return [
        replace(case, shape=(33, *(min(size, 300) for size in case.shape[1:])), goals=()) for case in kinds.values()
    ]


def names(case: Case, compiled: bool) -> list[str]:
    """The contenders, in the order of their samples."""
    if case.op == "embedding":
        return ["ours", "eager", "copy"]
    if case.op in LAYERS:
        floor = ["copy"] if "copy" in LAYERS[case.op].names(case) else []
        return ["ours", "eager", *["compile"] * (compiled and _is_worth_compiling(case)), *floor]
    peers = ["eager"]
    if case.op == "embedding_backward":
        peers.append("eager_index")
    elif case.variant != "forward_only":
        peers.append("liger")
    return ["ours", *peers, *["compile"] * (compiled and _is_worth_compiling(case)), "copy"]


def _is_worth_compiling(case: Case) -> bool:
    """A compilation takes most of ten seconds, so only one case of a kind has it."""
    if case.op == "embedding_backward":
        return case.dtype == "float32" and case.shape[1:] in (TABLES[0], TABLES[4])
    if case.op in LAYERS:
        return case.dtype == "float32" and case.shape in ((65536, 256), (2048, 32000), (65536, 8, 24, 200, 27))
    return (
        case.variant == "default"
        and case.shape[0] != SMALL_N[1]
        and (case.dtype == "bfloat16" or case.shape[1] in (256, 32000))
    )


def bytes_to_move(case: Case) -> int:
    """One read of the logits and one write of their gradient (forward: the read); of an embedding, all it touches."""
    if case.op == "cross_entropy":
        return (1 if case.variant == "forward_only" else 2) * item_size(case) * main_elements(case)
    return minimal_bytes(case)
