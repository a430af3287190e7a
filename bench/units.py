"""How the benchmarks print a time and a ratio."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """Three digits: 4.51 ms, 17.2 µs, 312 µs."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size:
            return f"{seconds / size:#.3g} {unit}".replace(". ", " ")
    return f"{seconds * 1e9:.0f} ns"


def ratio(value: float) -> str:
    return f"{value:.2f}" if value < 9.95 else f"{value:.0f}" if value > 99.5 else f"{value:.1f}"
