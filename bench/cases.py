"""What the benchmark times: one list of cases per op, each with the goals that it has to reach.

A goal bounds a figure, which is always a ratio of times taken in one run: ours / floor for the floors ("copy", "scale",
"read", "fresh_copy", "read_write", "gemms": at most so much) and peer / ours for the others ("eager", "eager_index",
"best_peer": at least so much). Besides:

    noop          (ours - no-op) / (eager - no-op), the no-op being an autograd call that does nothing
    float32       ours in float32 / ours in this half type
    int64         ours with int64 indices / ours with these
    threads       ours on 1 thread / ours on 2, where the in-place scaling itself gains as much
    bytes_per_row peak memory beyond inputs and outputs, divided by N: bounded where it is O(N) and not O(N V)
    extra_mb      peak memory beyond inputs and outputs, in 10^6 bytes
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

DTYPES = ("float32", "float64", "bfloat16", "float16")
FLOORS = ("scale", "copy", "read", "fresh_copy", "read_write", "gemms")


class BadRequest(ValueError):
    """What was asked for does not exist or does not fit; the text is one line for the user."""


@dataclass(frozen=True)
class Goal:
    """figure at_most value (bound "<="), or at_least (">=")."""

    figure: str
    bound: str
    value: float

    def reached(self, figure: float | None) -> bool | None:
        """None where the figure could not be measured: the goal is unproven."""
        if figure is None:
            return None
        return figure <= self.value if self.bound == "<=" else figure >= self.value

    def __str__(self) -> str:
        return f"{self.figure} {'≤' if self.bound == '<=' else '≥'} {self.value:g}"


def at_most(figure: str, value: float) -> Goal:
    return Goal(figure, "<=", value)


def at_least(figure: str, value: float) -> Goal:
    return Goal(figure, ">=", value)


@dataclass(frozen=True)
class Case:
    """One line of the table.

    shape: (N, V) of logits; (N, V, D) of an embedding: N indices into a (V, D) table; for the others see SHAPES.
    """

    op: str
    variant: str
    shape: tuple[int, ...]
    dtype: str = "float32"
    goals: tuple[Goal, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.op}/{self.variant}/{'x'.join(map(str, self.shape))}/{self.dtype}"


# Goals of memory and threads, which many cases share.
ROW_MEMORY = at_most("bytes_per_row", 64)
TWO_THREADS = at_least("threads", 1.7)

LARGE_V = ((16384, 1024), (2048, 8192), (2048, 32000), (512, 50257), (1024, 128256))
HALVES = ("bfloat16", "float16")
OPTIONS_AND_SPEEDUP = {
    "label_smoothing": 5,
    "weight": 5,
    "ignore_index": 5,
    "probabilities": 4,
    "reduction_none": 4,
}


def _cross_entropy(variant: str, shape: tuple[int, int], *goals: Goal, dtype: str = "float32") -> Case:
    # Below 512 rows a page for each thread is more than 64 bytes a row: no sign of O(N V).
    memory = (ROW_MEMORY,) if shape[0] >= 512 else ()
    return Case("cross_entropy", variant, shape, dtype, (*goals, *memory))


def _tiny_vocabulary() -> Iterable[Case]:
    yield _cross_entropy("default", (32, 27), at_most("noop", 0.5))
    for classes, at_262144 in ((27, 6), (65, 3.5)):
        yield _cross_entropy("default", (1024, classes), at_least("eager", 3))
        yield _cross_entropy("default", (4096, classes), at_least("eager", 6))
        yield _cross_entropy("default", (65536, classes), at_least("eager", 8), at_least("best_peer", 5))
        yield _cross_entropy("default", (262144, classes), at_least("best_peer", at_262144))


def _default() -> Iterable[Case]:
    for shape in ((65536, 256), *LARGE_V):
        threads = (TWO_THREADS,) if shape in ((65536, 256), (2048, 32000)) else ()
        yield _cross_entropy("default", shape, at_least("eager", 5), at_least("best_peer", 2.5), *threads)


def _inplace() -> Iterable[Case]:
    for shape in ((65536, 27), (65536, 65), (262144, 27), (262144, 65)):
        yield _cross_entropy("inplace_forward", shape, at_most("copy", 1.15), at_least("eager", 10))
    yield _cross_entropy("inplace_forward", (65536, 256), at_most("copy", 1.0), TWO_THREADS)
    for shape in LARGE_V:
        extra = (at_most("scale", 1.35), TWO_THREADS) if shape == (2048, 32000) else ()
        yield _cross_entropy("inplace_forward", shape, at_most("copy", 0.9), *extra)
    for shape in LARGE_V:
        yield _cross_entropy("inplace_backward", shape, at_most("copy", 1.3))


def _others() -> Iterable[Case]:
    for shape in LARGE_V:
        yield _cross_entropy("forward_only", shape, at_most("read", 1.6))
    for shape in ((65536, 256), (2048, 32000)):
        for dtype in HALVES:
            yield _cross_entropy("default", shape, at_least("eager", 4), at_least("float32", 1), dtype=dtype)
        for variant, speedup in OPTIONS_AND_SPEEDUP.items():
            yield _cross_entropy(variant, shape, at_least("eager", speedup))


def _embedding() -> Iterable[Case]:
    # 84 MB of output, then the four tables of the backward: a name's letters, bytes, words of 768 numbers.
    shapes = ((2097152, 27, 10), (98304, 27, 10), (65536, 256, 64), (262144, 65, 384), (8192, 50257, 768))
    for shape in (*shapes, (16384, 50257, 1024)):
        yield Case("embedding", "int64", shape, goals=(at_most("fresh_copy", 1.2),))
    for shape in shapes[:2]:
        yield Case("embedding", "uint8", shape, goals=(at_most("fresh_copy", 1.2), at_least("int64", 1)))


def _embedding_backward() -> Iterable[Case]:
    for shape, eager in (((98304, 27, 10), 20), ((262144, 65, 384), 2.5), ((65536, 256, 64), 7)):
        goals = (at_least("eager", eager), at_least("eager_index", 15))
        yield Case("embedding_backward", "default", shape, goals=goals)
    yield Case("embedding_backward", "default", (8192, 50257, 768), goals=(at_least("eager", 2),))


def _embedding_linear() -> Iterable[Case]:
    for shape, by_index, eager in (
        ((4096, 8, 24, 200, 27), 12, 8),
        ((32, 3, 10, 200, 27), 1.8, 1.8),
        ((4096, 8, 32, 256, 256), 5, 4),
    ):
        goals = (at_least("eager_index", by_index), at_least("eager", eager))
        yield Case("embedding_linear", "default", shape, goals=goals)


def _linear_cross_entropy() -> Iterable[Case]:
    op = "linear_cross_entropy"
    # The logits of the last two are 0.8 to 1 GB of float32.
    for shape, in_float, in_half in (
        ((1024, 512, 32000), (1.1, 1.35), (1.15, 1.9)),
        ((512, 768, 50257), (1.1, 1.35), (1.15, 1.9)),
        ((8192, 512, 32000), (1.2, 1.45), (1.25, 2.0)),
        ((4096, 768, 50257), (1.2, 1.45), (1.25, 2.0)),
    ):
        memory = at_most("extra_mb", 100)
        yield Case(op, "default", shape, goals=(*_of_products(*in_float), memory))
        a_float_gradient = 4e-6 * shape[1] * shape[2]  # of the weight
        memory = at_most("extra_mb", round(100 + a_float_gradient))
        yield Case(op, "default", shape, "bfloat16", (*_of_products(*in_half), memory))


def _of_products(gemms: float, eager: float) -> tuple[Goal, Goal]:
    return at_most("gemms", gemms), at_least("eager", eager)


def _train_step() -> Iterable[Case]:
    first = (at_least("eager", 6), at_least("best_peer", 4))
    yield Case("train_step", "default", (4096, 8, 24, 200, 27), goals=first)
    yield Case("train_step", "default", (32, 3, 10, 200, 27), goals=(at_least("eager", 2),))


def _information(op: str) -> Iterable[Case]:
    """entropy, kl_divergence, surprisal: torch makes several passes or, for few classes, several calls."""
    for shape, speedup in (((65536, 256), 4), ((2048, 32000), 4), ((4096, 27), 2), ((32, 27), 1)):
        memory = (ROW_MEMORY,) if shape[0] >= 512 else ()
        yield Case(op, "default", shape, goals=(at_least("eager", speedup), *memory))
    yield Case(op, "default", (2048, 32000), "bfloat16", (at_least("eager", 4), ROW_MEMORY))


SHAPES = {
    "cross_entropy": "NxV",
    "embedding": "NxVxD",
    "embedding_backward": "NxVxD",
    "embedding_linear": "NxTxDxHxV",
    "linear_cross_entropy": "NxDxV",
    "train_step": "NxTxDxHxV",
    "entropy": "NxV",
    "kl_divergence": "NxV",
    "surprisal": "NxV",
}
CASES: dict[str, list[Case]] = {
    "cross_entropy": [*_tiny_vocabulary(), *_default(), *_inplace(), *_others()],
    "embedding": [*_embedding()],
    "embedding_backward": [*_embedding_backward()],
    "embedding_linear": [*_embedding_linear()],
    "linear_cross_entropy": [*_linear_cross_entropy()],
    "train_step": [*_train_step()],
    **{op: [*_information(op)] for op in ("entropy", "kl_divergence", "surprisal")},
}
OPS = tuple(CASES)
VARIANTS = {op: tuple(dict.fromkeys(case.variant for case in cases)) for op, cases in CASES.items()}

# What --quick runs of the above: seconds, and no torch.compile.
QUICK = {
    "cross_entropy": [
        ("default", (32, 27)),
        ("default", (4096, 27)),
        ("default", (4096, 65)),
        ("default", (65536, 27)),
        ("inplace_forward", (65536, 27)),
    ],
    "embedding": [("int64", (98304, 27, 10)), ("uint8", (98304, 27, 10))],
    "embedding_backward": [("default", (98304, 27, 10)), ("default", (65536, 256, 64))],
    "embedding_linear": [("default", (4096, 8, 24, 200, 27)), ("default", (32, 3, 10, 200, 27))],
    "linear_cross_entropy": [],
    "train_step": [("default", (4096, 8, 24, 200, 27)), ("default", (32, 3, 10, 200, 27))],
    **{op: [("default", (4096, 27)), ("default", (32, 27))] for op in ("entropy", "kl_divergence", "surprisal")},
}


def parse_shape(text: str) -> tuple[int, ...]:
    """'4096x27' → (4096, 27), '98304x27x10' → (98304, 27, 10)."""
    parts = text.lower().split("x")
    if not 2 <= len(parts) <= 5 or not all(part.isascii() and part.isdigit() and int(part) > 0 for part in parts):
        raise BadRequest(f"impossible shape {text!r}: NxV for cross_entropy, NxVxD for an embedding, each at least 1")
    return tuple(map(int, parts))


def case_for_shape(op: str, shape: tuple[int, ...], variant: str, dtype: str) -> Case:
    """The listed case of this shape, with its goals, or a new one without."""
    wanted = SHAPES[op]
    if len(shape) != len(wanted.split("x")):
        raise BadRequest(f"impossible shape {'x'.join(map(str, shape))!r} for {op}: it takes {wanted}")
    if variant == "uint8" and shape[1] > 256:
        raise BadRequest(f"impossible shape: uint8 indices reach 256 rows, not {shape[1]}")
    asked = Case(op, variant, shape, dtype)
    return next((case for case in CASES[op] if case.name == asked.name), asked)


def select(op: str, quick: bool, variants: list[str], dtypes: list[str]) -> list[Case]:
    """The cases of one op. A dtype other than float32 takes the float32 list too, without its goals."""
    cases = CASES[op]
    if quick:
        cases = [case for case in cases if (case.variant, case.shape) in QUICK[op] and case.dtype == "float32"]
    if variants:
        cases = [case for case in cases if case.variant in variants]
    if not dtypes:
        return cases
    chosen = {case.name: case for case in cases if case.dtype in dtypes}
    for dtype in dtypes:
        for case in cases:
            if case.dtype == "float32":
                other = replace(case, dtype=dtype, goals=())
                chosen.setdefault(other.name, other)
    return list(chosen.values())
