"""Entropies: the identities between them, brute force on small texts, and what is refused."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from charlm import information as info

WEIGHTS = st.lists(st.integers(0, 10**6) | st.floats(1e-6, 1e6), min_size=5, max_size=5).filter(any)


@given(p=WEIGHTS, q=WEIGHTS, base=st.sampled_from([2, math.e, 10]))
def test_cross_entropy_is_entropy_plus_kl(p, q, base):
    cross = info.cross_entropy(p, q, base=base)
    other = info.entropy(p, base=base) + info.kl_divergence(p, q, base=base)
    if any(a > 0 and b == 0 for a, b in zip(p, q, strict=True)):
        assert cross == other == math.inf
    else:
        assert cross == pytest.approx(other, rel=1e-12, abs=1e-14)


@given(p=WEIGHTS, q=WEIGHTS)
def test_js_is_symmetric_bounded_and_made_of_entropies(p, q):
    js = info.js_divergence(p, q)
    assert js == pytest.approx(info.js_divergence(q, p), rel=1e-12, abs=1e-15)
    assert -1e-15 <= js <= math.log(2) + 1e-15
    p, q = np.array(p) / np.sum(p), np.array(q) / np.sum(q)
    assert js == pytest.approx(info.entropy((p + q) / 2) - (info.entropy(p) + info.entropy(q)) / 2, abs=1e-12)


@given(joint=st.lists(WEIGHTS, min_size=1, max_size=4))
def test_mutual_information_is_what_the_margins_cost_more_than_the_whole(joint):
    joint = np.array(joint, float)
    margins = info.entropy(joint.sum(0)) + info.entropy(joint.sum(1))
    assert info.mutual_information(joint) == pytest.approx(margins - info.entropy(joint.ravel()), abs=1e-12)


def test_known_values():
    assert info.entropy([1, 1, 1, 1], base=2) == 2.0
    assert info.entropy([0, 7, 0]) == 0.0
    assert math.copysign(1, info.entropy([0, 7, 0])) == 1.0
    assert info.kl_divergence([1, 0], [1, 3], base=2) == 2.0
    assert info.kl_divergence([1, 1], [1, 0]) == math.inf
    assert info.cross_entropy([0, 1], [0, 1]) == 0.0
    assert info.js_divergence([1, 0], [0, 9]) == pytest.approx(math.log(2))
    assert info.perplexity(np.ones(27)) == pytest.approx(27)
    assert info.mutual_information(np.outer([1, 2, 3], [4, 5])) == pytest.approx(0, abs=1e-15)


def test_leading_axes_are_distributions_of_their_own():
    p, q = np.random.default_rng(0).random((2, 3, 4, 5))
    for function in (info.cross_entropy, info.kl_divergence, info.js_divergence):
        result = function(p, q)
        assert result.shape == (3, 4)
        assert result[1, 2] == pytest.approx(function(p[1, 2], q[1, 2]), rel=1e-13)
        assert function(p, q[0, 0])[2, 3] == pytest.approx(function(p[2, 3], q[0, 0]), rel=1e-13)
    assert info.mutual_information(p).shape == (3,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool])
def test_tensors_of_any_dtype_give_float64_tensors(dtype):
    counts = torch.tensor([1, 1, 0, 1]).to(dtype)
    result = info.entropy(counts)
    assert isinstance(result, torch.Tensor)
    assert result.dtype == torch.float64
    assert result.item() == pytest.approx(math.log(3))


def test_numpy_and_lists_give_numpy():
    assert isinstance(info.entropy([1, 2]), np.float64)
    assert isinstance(info.entropy(np.ones((2, 3), np.uint16)), np.ndarray)


@pytest.mark.parametrize("function", [info.cross_entropy, info.kl_divergence, info.js_divergence])
def test_gradients_are_those_of_the_formula(function):
    p, q = torch.rand(2, 3, 4, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(function, (p, q))


def test_without_normalize_sums_must_be_one():
    p = torch.rand(3, 50).softmax(-1)
    assert torch.equal(info.entropy(p, normalize=False), -(p.double() * p.double().log()).sum(-1))
    with pytest.raises(ValueError, match=r"^the sum of q at position \(1, 0\) is 4, which is not 1$"):
        info.cross_entropy([0.5, 0.5], [[0.5, 0.5], [1, 3]], normalize=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: info.entropy([1, -2]), r"^p at position \(1,\) is -2, which is not a finite number of at least 0$"),
        (lambda: info.entropy([[1, 2], [1, math.nan]]), r"^p at position \(1, 1\) is nan"),
        (lambda: info.entropy([1, math.inf]), r"^p at position \(1,\) is inf"),
        (lambda: info.kl_divergence([1, 1], [0, 0]), r"^the sum of q at position \(0,\) is 0"),
        (lambda: info.entropy([]), r"^p has shape \(0,\)"),
        (lambda: info.entropy(3.0), r"^p has shape \(\)"),
        (lambda: info.js_divergence([1, 1], [1, 1, 1]), "^p has 2 weights on its last axis, but q has 3$"),
        (lambda: info.mutual_information([1, 2]), r"^joint has shape \(2,\)"),
        (lambda: info.entropy([1, 1], base=1), "^base is 1, but must be above 1$"),
        (lambda: info.conditional_entropies("abc", 3), "^a text of 3 tokens has none with 3 before it$"),
        (lambda: info.conditional_entropy("", 0), "^a text of 0 tokens has none with 0 before it$"),
        (lambda: info.conditional_entropy("abc", -1), "^the order is -1"),
        (lambda: info.conditional_entropies("abc", 1000), "^the order is 1000"),
        (lambda: info.conditional_entropies("abc", 1, base=0.5), "^base is 0.5"),
    ],
)
def test_what_is_refused_names_the_value_and_its_place(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ---- texts


def by_hand(text: str, order: int) -> float:
    """Σ over contexts of p(context) · entropy(what follows it)."""
    follows: dict[str, Counter] = {}
    for i in range(order, len(text)):
        follows.setdefault(text[i - order : i], Counter())[text[i]] += 1
    return sum(c.total() * info.entropy(list(c.values())) for c in follows.values()) / (len(text) - order)


@given(text=st.text("abc", min_size=8, max_size=60) | st.text(min_size=8, max_size=20))
def test_conditional_entropies_are_those_of_each_context(text):
    result = info.conditional_entropies(text, 7)
    assert result.tolist() == pytest.approx([by_hand(text, order) for order in range(8)], abs=1e-12)
    bits = info.conditional_entropies(text, 7, base=2)
    assert bits.tolist() == pytest.approx((result / math.log(2)).tolist())


def test_order_zero_is_the_entropy_of_the_counts():
    text = "the quick brown fox jumps over the lazy dog"
    assert info.conditional_entropy(text, 0) == pytest.approx(info.entropy(list(Counter(text).values())))


def test_a_text_of_one_symbol_holds_no_information():
    assert info.conditional_entropies("a" * 1000, 5).tolist() == [0.0] * 6
    assert info.conditional_entropies(b"a", 0).tolist() == [0.0]


def test_a_markov_source_is_measured():
    changes = np.random.default_rng(0).random(200_000) < 0.1
    text = np.cumsum(changes) % 2  # stays nine times out of ten
    h = info.conditional_entropies(text, 3, base=2)
    source = info.entropy([9, 1], base=2)
    assert h.tolist() == pytest.approx([1, source, source, source], abs=5e-3)


def test_entropies_do_not_depend_on_the_threads(n_threads):
    text = np.random.default_rng(0).integers(0, 5, 30_000)
    expected = [by_hand("".join(map(str, text.tolist())), order) for order in range(4)]
    assert info.conditional_entropies(text, 3).tolist() == pytest.approx(expected, abs=1e-12)
