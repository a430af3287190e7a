"""What the benchmark times: a list of cases for each device, each case with the goals that it has to reach.

A goal bounds a figure. A figure is a ratio of times that were taken in one run:

    a lower bound ("copy", "scale", "read", "fresh_copy", "read_write", "gemms"): charlm / the bound
    a peer ("eager", "eager_index", "compile", "jax", "liger", "cce", "quack", "best_peer"): the peer / charlm
    copy_bandwidth  bytes per second of charlm / those of a copy

Two figures are memory beyond inputs and outputs, at the worst moment of a call: "bytes_per_row" is bytes / N (a small
bound shows that memory is O(N), not O(N V)), and "extra_mb" is in units of 10^6 bytes. "ms" is the time of a call, and
"over_copy_us" is what it takes longer than a copy.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

DTYPES = ("float32", "float64", "bfloat16", "float16")
LOWER_BOUNDS = ("scale", "copy", "read", "fresh_copy", "read_write", "gemms")
PEERS = ("eager", "eager_index", "drop_in", "compile", "jax", "liger", "cce", "quack")


class BadRequest(ValueError):
    """The request names something that does not exist or does not fit. The text is one line for the user."""


@dataclass(frozen=True)
class Goal:
    """figure <= value, or figure >= value."""

    figure: str
    bound: str
    value: float

    def reached(self, figure: float | None) -> bool | None:
        """None where the figure could not be measured: the goal is unproven."""
        if figure is None:
            return None
        return figure <= self.value if self.bound == "<=" else figure >= self.value


def at_most(figure: str, value: float) -> Goal:
    return Goal(figure, "<=", value)


def at_least(figure: str, value: float) -> Goal:
    return Goal(figure, ">=", value)


@dataclass(frozen=True)
class Case:
    """One line of the table. SHAPES says what the numbers of `shape` are."""

    op: str
    variant: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    goals: tuple[Goal, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}/{self.variant}/{'x'.join(map(str, self.shape))}/{self.dtype}"


# N: rows, or indices into a table. V: classes, or rows of a table. D: columns of a table or of a layer's input.
# T: tokens of a context. H: outputs of a layer.
SHAPES = {
    "cross_entropy": "NxV",
    "embedding": "NxVxD",
    "embedding_backward": "NxVxD",
    "embedding_linear": "NxTxDxHxV",
    "linear_cross_entropy": "NxDxV",
    "train_step": "NxTxDxHxV",
    "entropy": "NxV",
    "kl_divergence": "NxV",
    "kl_div": "NxV",
    "surprisal": "NxV",
}
INFORMATION = ("entropy", "kl_divergence", "surprisal")
GPU_VARIANTS = (
    *("weight", "label_smoothing", "z_loss", "softcap", "logit_scale", "token_weight", "ignore_index"),
    *("reduction_none", "probabilities", "inplace_forward", "inplace_backward"),
)
ROW_MEMORY = at_most("bytes_per_row", 64)


# --- on a CPU -----------------------------------------------------------------------------------------------

LARGE_V = ((16384, 1024), (2048, 8192), (2048, 32000), (512, 50257), (1024, 128256))
OPTIONS_AND_SPEEDUP = {"label_smoothing": 5, "weight": 5, "ignore_index": 5, "probabilities": 4, "reduction_none": 4}


def _cross_entropy(variant: str, shape: tuple[int, int], *goals: Goal, dtype: str = "float32") -> Case:
    # Below 512 rows, one page for each thread is more than 64 bytes a row.
    memory = (ROW_MEMORY,) if shape[0] >= 512 else ()
    return Case("cross_entropy", variant, shape, dtype, (*goals, *memory))


def _cross_entropy_cases() -> Iterable[Case]:
    yield _cross_entropy("default", (32, 27), at_least("eager", 1))
    for classes, at_262144 in ((27, 6), (65, 3.5)):
        yield _cross_entropy("default", (1024, classes), at_least("eager", 3))
        yield _cross_entropy("default", (4096, classes), at_least("eager", 6))
        yield _cross_entropy("default", (65536, classes), at_least("eager", 8), at_least("best_peer", 5))
        yield _cross_entropy("default", (262144, classes), at_least("best_peer", at_262144))
    for shape in ((65536, 256), *LARGE_V):
        yield _cross_entropy("default", shape, at_least("eager", 5), at_least("best_peer", 2.5))
    for shape in ((65536, 27), (65536, 65), (262144, 27), (262144, 65)):
        yield _cross_entropy("inplace_forward", shape, at_most("copy", 1.15), at_least("eager", 10))
    yield _cross_entropy("inplace_forward", (65536, 256), at_most("copy", 1.0))
    for shape in LARGE_V:
        extra = (at_most("scale", 1.35),) if shape == (2048, 32000) else ()
        yield _cross_entropy("inplace_forward", shape, at_most("copy", 0.9), *extra)
        yield _cross_entropy("inplace_backward", shape, at_most("copy", 1.3))
        yield _cross_entropy("forward_only", shape, at_most("read", 1.6))
    for shape in ((65536, 256), (2048, 32000)):
        for dtype in ("bfloat16", "float16"):
            yield _cross_entropy("default", shape, at_least("eager", 4), dtype=dtype)
        for variant, speedup in OPTIONS_AND_SPEEDUP.items():
            yield _cross_entropy(variant, shape, at_least("eager", speedup))


def _embedding_cases() -> Iterable[Case]:
    # 84 MB of output, then the tables of letters, of bytes and of words.
    shapes = ((2097152, 27, 10), (98304, 27, 10), (65536, 256, 64), (262144, 65, 384), (8192, 50257, 768))
    for shape in (*shapes, (16384, 50257, 1024)):
        yield Case("embedding", "int64", shape, goals=(at_most("fresh_copy", 1.2),))
    for shape in shapes[:2]:
        yield Case("embedding", "uint8", shape, goals=(at_most("fresh_copy", 1.2),))
    for shape, eager in (((98304, 27, 10), 20), ((262144, 65, 384), 2.5), ((65536, 256, 64), 7)):
        goals = (at_least("eager", eager), at_least("eager_index", 15))
        yield Case("embedding_backward", "default", shape, goals=goals)
    yield Case("embedding_backward", "default", (8192, 50257, 768), goals=(at_least("eager", 2),))


def _layer_cases() -> Iterable[Case]:
    for shape, by_index, eager in (
        ((4096, 8, 24, 200, 27), 12, 8),
        ((32, 3, 10, 200, 27), 1.8, 1.8),
        ((4096, 8, 32, 256, 256), 5, 4),
    ):
        goals = (at_least("eager_index", by_index), at_least("eager", eager))
        yield Case("embedding_linear", "default", shape, goals=goals)
    for shape, in_float, in_half in (
        ((1024, 512, 32000), (1.1, 1.35), (1.15, 1.9)),
        ((512, 768, 50257), (1.1, 1.35), (1.15, 1.9)),
        ((8192, 512, 32000), (1.2, 1.45), (1.25, 2.0)),
        ((4096, 768, 50257), (1.2, 1.45), (1.25, 2.0)),
    ):
        half_memory = round(100 + 4e-6 * shape[1] * shape[2])  # a float gradient of the weight is kept besides
        for dtype, (gemms, eager), memory in (("float32", in_float, 100), ("bfloat16", in_half, half_memory)):
            goals = (at_most("gemms", gemms), at_least("eager", eager), at_most("extra_mb", memory))
            yield Case("linear_cross_entropy", "default", shape, dtype, goals)
    goals = (at_least("eager", 6), at_least("best_peer", 4))
    yield Case("train_step", "default", (4096, 8, 24, 200, 27), goals=goals)
    yield Case("train_step", "default", (32, 3, 10, 200, 27), goals=(at_least("eager", 2),))


def _information_cases() -> Iterable[Case]:
    for op in INFORMATION:
        for shape, speedup in (((65536, 256), 4), ((2048, 32000), 4), ((4096, 27), 2), ((32, 27), 1)):
            memory = (ROW_MEMORY,) if shape[0] >= 512 else ()
            yield Case(op, "default", shape, goals=(at_least("eager", speedup), *memory))
        yield Case(op, "default", (2048, 32000), "bfloat16", (at_least("eager", 4), ROW_MEMORY))


# Is any shape slower than torch? Odd and round ones, up to a gigabyte of logits.
GRID_N = (1, 3, 32, 129, 1000, 4099, 16384, 65537, 262147, 1_000_000)
GRID_V = (1, 2, 5, 27, 65, 256, 1023, 4099, 32000, 50257, 262144)
GRID_EMBEDDINGS = ((1, 27, 10), (96, 27, 10), (33, 1000, 17), (4096, 65, 24), (32768, 256, 129), (8192, 50257, 768))


def grid() -> Iterable[Case]:
    """Each size in one dtype; the dtypes go round."""
    goals = (at_least("eager", 0.95),)
    for i, shape in enumerate((n, v) for n in GRID_N for v in GRID_V if n * v <= 1 << 28):
        yield Case("cross_entropy", "default", shape, DTYPES[i % len(DTYPES)], goals)
    for shape in GRID_EMBEDDINGS:
        yield Case("embedding", "int64", shape, goals=goals)
        yield Case("embedding_backward", "default", shape, goals=goals)


# --- on a GPU -----------------------------------------------------------------------------------------------

HALF, FLOAT = "bfloat16", "float32"
# The least share of a copy's bytes per second that a loss with its gradient has to reach, in bfloat16 and in float32.
GPU_SHARES = (  # N, V, and the two shares
    *((262144, 27, 0.62, 0.74), (262144, 50, 0.56, 0.67), (262144, 65, 0.72, 0.82), (262144, 100, 0.65, 0.74)),
    *((262144, 128, 0.75, 0.82), (65536, 256, 0.74, 0.82), (262144, 256, 0.84, 0.88), (262144, 257, 0.76, 0.79)),
    *((262144, 512, 0.87, 0.87), (65536, 1000, 0.78, 0.78), (65536, 1024, 0.87, 0.87), (65536, 2048, 0.87, 0.87)),
    *((16384, 4096, 0.87, 0.87), (16384, 8192, 0.92, 0.92), (8192, 32000, 0.92, 0.92), (8192, 50257, 0.92, 0.92)),
    *((4096, 65536, 0.92, 0.92), (4096, 128256, 0.9, 0.9)),
)
GPU_OPTIONS = {(65536, 256): 0.85 * 0.74, (8192, 32000): 0.85 * 0.92}  # the least share with any option, in bfloat16
# The most that the gradient of a table may take, in reads of the gradient of the output.
GPU_TABLES = {
    (27, 10): 2.0,
    (27, 768): 1.1,
    (65, 384): 1.18,
    (256, 64): 1.45,
    (256, 768): 1.12,
    (50257, 64): 3.3,
    (50257, 768): 1.45,
}
GPU_INDICES = 262144
# Milliseconds and 10^6 bytes of linear_cross_entropy on an H200.
GPU_LINEAR = (
    ("default", (8192, 768, 50257), 3.6, None),
    ("large_budget", (8192, 2304, 256000), 47.0, 5600),
    ("small_budget", (8192, 2304, 256000), 58.0, 1700),
    ("default", (4096, 4096, 128256), 17.2, None),
    ("default", (65536, 384, 65), 0.17, None),
    ("default", (65536, 384, 256), 0.22, None),
    ("default", (65536, 200, 27), 0.13, None),
)
MLP = (8, 24, 200, 27)


def _gpu_cases() -> Iterable[Case]:
    for n, v, half, float32 in GPU_SHARES:
        for dtype, share in ((HALF, half), (FLOAT, float32)):
            yield Case("cross_entropy", "default", (n, v), dtype, (at_least("copy_bandwidth", share),))
    for v in (27, 65, 128):
        for dtype in (HALF, FLOAT):
            yield Case("cross_entropy", "default", (65536, v), dtype, (at_most("over_copy_us", 4.5),))
    yield Case("cross_entropy", "padded", (8192, 50257), HALF, (at_least("copy_bandwidth", 0.83),))
    for shape, share in GPU_OPTIONS.items():
        for variant in GPU_VARIANTS:
            yield Case("cross_entropy", variant, shape, HALF, (at_least("copy_bandwidth", share),))
    for n in (1, 16, 256):
        yield Case("cross_entropy", "default", (n, 128256), HALF, (at_least("eager", 1.0),))
    for op in (*INFORMATION, "kl_div"):
        for shape in ((65536, 256), (2048, 32000)):
            for dtype in (HALF, FLOAT):
                yield Case(op, "default", shape, dtype, (at_least("copy_bandwidth", 0.9),))
    for (v, d), reads in GPU_TABLES.items():
        goals = (at_most("read", reads), at_least("eager", 2.0))
        yield Case("embedding_backward", "default", (GPU_INDICES, v, d), FLOAT, goals)
        goals = (at_least("copy_bandwidth", 0.9),) if (4 * d >= 128 and v <= 256) or d == 64 else ()
        yield Case("embedding", "int64", (GPU_INDICES, v, d), FLOAT, goals)
    for variant, shape, ms, mb in GPU_LINEAR:
        memory = () if mb is None else (at_most("extra_mb", mb),)
        yield Case("linear_cross_entropy", variant, shape, HALF, (at_most("ms", ms), *memory))
    for batch, ms in ((4096, 0.15), (65536, 0.7)):
        yield Case("train_step", "gradients", (batch, *MLP), FLOAT, (at_most("ms", ms), at_least("drop_in", 1.0)))
    yield Case("train_step", "graph", (32, *MLP), FLOAT, (at_most("ms", 0.08), at_least("drop_in", 1.0)))
    yield Case("train_step", "graph", (4096, *MLP), FLOAT, (at_least("drop_in", 1.0),))
    yield Case("embedding_backward", "default", (GPU_INDICES, 256, 768), HALF)
    yield Case("embedding_linear", "default", (65536, 8, 32, 256, 256))


def worth_compiling(case: Case) -> bool:
    """On a GPU torch.compile takes seconds, so it takes part in one case of a kind."""
    kinds = {
        "cross_entropy": ((65536, 27), (65536, 65), (65536, 256), (65536, 1024), (8192, 32000)),
        "embedding_backward": ((GPU_INDICES, 256, 768), (GPU_INDICES, 50257, 64)),
        "train_step": ((4096, *MLP), (65536, *MLP)),
    }
    dtype = HALF if case.op == "cross_entropy" else FLOAT
    shapes = kinds.get(case.op, ((65536, 256), (2048, 32000)))
    return case.variant in ("default", "gradients") and case.dtype == dtype and case.shape in shapes


# --- choosing -----------------------------------------------------------------------------------------------

CASES: dict[str, tuple[Case, ...]] = {
    "cpu": (*_cross_entropy_cases(), *_embedding_cases(), *_layer_cases(), *_information_cases()),
    "cuda": tuple(_gpu_cases()),
}
OPS = tuple(SHAPES)
VARIANTS = {
    op: tuple(dict.fromkeys(case.variant for cases in CASES.values() for case in cases if case.op == op)) for op in OPS
}


def dry_run(device: str) -> list[Case]:
    """A few rows of one case of each kind, without goals: shows that everything runs, and its times mean nothing."""
    kinds = {(case.op, case.variant, case.dtype): case for case in CASES[device]}
    return [
        replace(case, shape=(33, *(min(size, 300) for size in case.shape[1:])), goals=()) for case in kinds.values()
    ]


def of_shape(text: str, ops: Iterable[str], variants: list[str], dtypes: list[str], device: str) -> list[Case]:
    """Cases of one shape, for each of the ops that takes such a shape; listed ones with their goals."""
    parts = text.lower().split("x")
    if not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise BadRequest(f"impossible shape {text!r}: it is numbers from 1 on with an x between them, such as 4096x27")
    shape = tuple(map(int, parts))
    fitting = [op for op in ops if len(shape) == len(SHAPES[op].split("x"))]
    if not fitting:
        raise BadRequest(f"impossible shape {text!r}: " + ", ".join(f"{op} takes {SHAPES[op]}" for op in ops))
    listed = {case.name: case for case in CASES[device]}
    chosen = []
    for op in fitting:
        for variant in [name for name in variants if name in VARIANTS[op]] or VARIANTS[op][:1]:
            if variant == "uint8" and shape[1] > 256:
                raise BadRequest(f"impossible shape {text!r}: uint8 indices reach 256 rows, not {shape[1]}")
            for dtype in dtypes or DTYPES[:1]:
                case = Case(op, variant, shape, dtype)
                chosen.append(listed.get(case.name, case))
    return chosen


def select(ops: Iterable[str], variants: list[str], dtypes: list[str], device: str) -> list[Case]:
    """The listed cases of these ops; of these variants and dtypes, where any are given."""
    return [
        case
        for case in CASES[device]
        if case.op in ops and (case.variant in variants or not variants) and (case.dtype in dtypes or not dtypes)
    ]
