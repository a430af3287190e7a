"""N-gram counts: native against plain numpy and against a dict, however the range of keys is cut."""

from __future__ import annotations

import doctest
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import charlm
from charlm import ngrams
from charlm.reference import ngrams as reference

BUFFERS = [1, 400, 5000, 2**20]  # bytes: from one window a part to one part in all


def as_dicts(levels: list[ngrams.NgramLevel]) -> list[dict[tuple[int, ...], int]]:
    """The trie written out: {n-gram: count} for each length, in the order of the level."""
    before = [()]
    result = []
    for parent, token, count in levels:
        before = [(*before[p], t) for p, t in zip(parent.tolist(), token.tolist(), strict=True)]
        result.append(dict(zip(before, count.tolist(), strict=True)))
    return result


def by_hand(tokens: list[int], max_length: int, starts: int, boundary: int | None) -> list[dict[tuple[int, ...], int]]:
    counters = [Counter() for _ in range(max_length)]
    for start in range(starts):
        for stop in range(start + 1, min(start + max_length, len(tokens)) + 1):
            window = tuple(tokens[start:stop])
            if boundary in window[1:-1]:
                break
            counters[stop - start - 1][window] += 1
    return [dict(sorted(counter.items())) for counter in counters]


def assert_equal_levels(ours, theirs):
    assert len(ours) == len(theirs)
    for level, other in zip(ours, theirs, strict=True):
        for array, expected in zip(level, other, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


@given(
    tokens=st.lists(st.integers(0, 4), max_size=60),
    max_length=st.integers(1, 9),
    share=st.floats(0, 1),
    boundary=st.none() | st.integers(0, 5),
    buffer_bytes=st.sampled_from(BUFFERS),
)
def test_counts_are_those_of_a_dict(tokens, max_length, share, boundary, buffer_bytes):
    starts = int(share * len(tokens))
    array = np.array(tokens, np.uint8)
    expected = by_hand(tokens, max_length, starts, boundary)
    native = ngrams._count_ngrams(array, max_length, starts, boundary, buffer_bytes)
    assert as_dicts(native) == expected
    assert [list(level) for level in as_dicts(native)] == [list(level) for level in expected]  # and in this order
    assert_equal_levels(native, reference.count_ngrams(array, max_length, starts, boundary))


@pytest.mark.covering(2)
# One word a window, several; ids of 8, 16 and 32 bits; tokens of each width, and above what the kernels take.
@pytest.mark.parametrize("buffer_bytes", BUFFERS[1:])
@pytest.mark.parametrize("max_length", [1, 6, 40])
@pytest.mark.parametrize("top", [1, 27, 256, 70_000, 2**31 - 1])
def test_vocabularies_and_orders_of_any_size_count_as_numpy_does(top, max_length, buffer_bytes):
    rng = np.random.default_rng(top)
    tokens = rng.integers(max(0, top - 100_000), top + 1, 800)
    tokens[100:400] = tokens[0]  # one long run
    tokens[500:600] = tokens[600:700]
    tokens = ngrams.as_tokens(tokens)
    native = ngrams._count_ngrams(tokens, max_length, 700, int(tokens[3]), buffer_bytes)
    assert_equal_levels(native, reference.count_ngrams(tokens, max_length, 700, int(tokens[3])))
    for ours, theirs in zip(
        ngrams._count_spectra(tokens, max_length, buffer_bytes),
        reference.count_spectra(tokens, max_length),
        strict=True,
    ):
        assert_equal_levels(ours, theirs)


def test_one_hundred_thousand_code_points_are_counted():
    text = "".join(map(chr, [*range(0x20, 0xD800), *range(0xE000, 0x20000)])) * 2
    assert len(set(text)) > 100_000
    singles, pairs = ngrams.count_ngrams(text, 2)
    assert singles.count.tolist() == [2] * len(set(text))
    assert pairs.count.sum() == len(text) - 1
    assert sorted(set(pairs.count.tolist())) == [1, 2]


def test_counts_do_not_depend_on_the_threads(n_threads):
    tokens = np.random.default_rng(0).integers(0, 30, 20_000).astype(np.uint8) % 29
    ours = ngrams._count_ngrams(tokens, 6, len(tokens), 3, 2**16)
    assert_equal_levels(ours, reference.count_ngrams(tokens, 6, len(tokens), 3))


def test_a_str_bytes_arrays_and_tensors_of_any_width_are_one_text():
    expected = ngrams.count_ngrams("abracadabra", 3)
    raw = np.frombuffer(b"abracadabra", np.uint8)
    widths = [np.uint8, np.uint16, np.uint32, np.uint64, np.int8, np.int16, np.int32, np.int64]
    texts = [b"abracadabra", *(raw.astype(width) for width in widths), torch.tensor(raw), torch.tensor(raw).int()]
    texts.append(np.repeat(raw, 2)[::2])  # strided
    for text in texts:
        assert_equal_levels(ngrams.count_ngrams(text, 3), expected)
    wide = ngrams.count_ngrams("abracadabra€", 3)
    assert wide[0].token.tolist() == [*expected[0].token.tolist(), ord("€")]


def test_an_empty_text_has_no_ngrams():
    assert [len(level.token) for level in ngrams.count_ngrams("", 3)] == [0, 0, 0]
    assert all(len(spectrum.count) == 0 for each in ngrams.count_spectra("", 2) for spectrum in each)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ngrams.count_ngrams([1, 2], 2), TypeError, "but got list"),
        (lambda: ngrams.count_ngrams(np.ones(3), 2), TypeError, "integer dtype, but got float64"),
        (lambda: ngrams.count_ngrams(np.ones((2, 2), int), 2), ValueError, r"shape \(2, 2\)"),
        (lambda: ngrams.count_ngrams(np.array([4, -3]), 2), ValueError, "token -3 at position 1 "),
        (lambda: ngrams.count_ngrams(np.array([4, 2**32]), 2), ValueError, "token 4294967296 at position 1 "),
        (lambda: ngrams.count_ngrams(np.array([4, 2**31]), 2), ValueError, "token 2147483648 at position 1 "),
        (lambda: ngrams.count_ngrams("ab", 0), ValueError, "max_length is 0"),
        (lambda: ngrams.count_spectra("ab", 1001), ValueError, "max_length is 1001"),
        (lambda: ngrams.count_ngrams("ab", 2, starts=3), ValueError, "starts is 3"),
    ],
)
def test_bad_arguments_are_refused_by_name_and_place(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.exhaustive
def test_the_reference_backend_counts_the_same_without_anything_compiled():
    code = (
        "import sys, charlm; assert 'charlm._C' not in sys.modules;"
        "print([c.tolist() for level in charlm.ngrams.count_ngrams('abracadabra', 4, boundary=98) for c in level],"
        " charlm.information.conditional_entropies('abracadabra', 3).tolist())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], env={"CHARLM_BACKEND": "reference"}, capture_output=True, text=True, check=True
    )
    levels = [column.tolist() for level in ngrams.count_ngrams("abracadabra", 4, boundary=98) for column in level]
    assert result.stdout.strip() == f"{levels} {charlm.information.conditional_entropies('abracadabra', 3).tolist()}"


@pytest.mark.parametrize("module", [ngrams, charlm.information], ids=lambda module: module.__name__)
def test_examples_in_docstrings_print_what_they_say(module):
    result = doctest.testmod(module, extraglobs={"charlm": charlm})
    assert result.attempted > 0
    assert result.failed == 0


def test_a_field_of_a_structured_array_is_counted():
    table = np.zeros(6, [("token", np.uint16), ("flag", np.uint8)])
    table["token"], table["flag"] = [1, 2] * 3, 9
    assert ngrams.count_ngrams(table["token"], 1)[0].token.tolist() == [1, 2]
