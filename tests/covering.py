"""Which cases of a large product `make test` runs: few that cover it; `make test-all` runs the others too."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from itertools import combinations

import pytest
from torch import Tensor

from charlm.testing import SampleInput


def covering(cases: Sequence[Sequence[Hashable]], strength: int) -> set[int]:
    """Positions of few cases that hold every combination of `strength` values; chosen greedily.

    Of cases that add equally many combinations, one is chosen that adds the most pairs, so that the values are spread.
    """
    required, pairs = ([set(combinations(enumerate(case), n)) for case in cases] for n in (strength, 2))
    chosen = set()
    while any(required):
        best = max(range(len(cases)), key=lambda i: (len(required[i]), len(pairs[i])))
        chosen.add(best)
        for uncovered in (required, pairs):
            covered = frozenset(uncovered[best])
            for combined in uncovered:
                combined -= covered
    return chosen


def mark_exhaustive(items: Sequence[pytest.Item]) -> None:
    """Marks, of each test that is marked `covering`, the cases that are not chosen as exhaustive."""
    tests = defaultdict(list)
    for item in items:
        if item.get_closest_marker("covering"):
            tests[item.nodeid.partition("[")[0]].append(item)
    for cases in tests.values():
        (strength,) = cases[0].get_closest_marker("covering").args or (1,)
        chosen = covering([_values(item) for item in cases], strength)
        for i, item in enumerate(cases):
            if i not in chosen:
                item.add_marker(pytest.mark.exhaustive)


def _values(item: pytest.Item) -> list[Hashable]:
    """What is the same of equal parameters: of a sample its name and its dtype, of any other value its identity."""
    values: list[Hashable] = []
    for value in item.callspec.params.values():
        if isinstance(value, SampleInput):
            tensors = [given for given in value.arguments.values() if isinstance(given, Tensor)]
            values += [value.name, next(tensor.dtype for tensor in tensors if tensor.is_floating_point())]
        else:
            values.append(id(value))
    return values
