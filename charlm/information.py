"""Entropy and related measures of distributions and counts, and the conditional entropies of a text.

Every function takes weights >= 0 and divides them by their sum along the last axis (the last two for a joint
distribution), so counts need no preparation. Results are in nats; with `base=2` they are in bits. numpy arrays and
lists give numpy results. torch tensors give tensors on their device, differentiable by torch. Arithmetic and results
are float64.

Formulas (Shannon 1948; Cover and Thomas, "Elements of Information Theory", 2006), with 0 log 0 = 0::

    entropy             H(p)      = -Σ p log p
    cross-entropy       H(p, q)   = -Σ p log q                   = H(p) + KL(p ‖ q)
    Kullback-Leibler    KL(p ‖ q) =  Σ p log (p / q)
    Jensen-Shannon      JS(p, q)  = ½ KL(p ‖ m) + ½ KL(q ‖ m),   m = ½ (p + q)
    mutual information  I(X; Y)   = KL(p(x, y) ‖ p(x) p(y))      = H(X) + H(Y) - H(X, Y)
    perplexity          PP(p)     = e^H(p)
    order k             H_k       = -1/(N - k) Σ n(c x) log (n(c x) / n(c)),   c the k tokens before x
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from charlm import ngrams

Weights = np.ndarray | Tensor | Sequence[Any]

# The largest distance of a sum from 1 with normalize=False: rounding of probabilities to float32.
SUM_TOLERANCE = 1e-5

__all__ = [
    "conditional_entropies",
    "conditional_entropy",
    "cross_entropy",
    "entropy",
    "js_divergence",
    "kl_divergence",
    "mutual_information",
    "perplexity",
]


def entropy(p: Weights, *, base: float = math.e, normalize: bool = True) -> Any:
    """The entropy H(p) of a distribution: the mean cost of a token under the best code for it.

    Args:
        p: (..., V) weights.
        base: the base of the logarithm: e for nats, 2 for bits.
        normalize: divide the weights by their sum; if False, sums that are not 1 (within 1e-5) are an error.

    Returns:
        (...) float64, from 0 to log V.

    Raises:
        ValueError: a weight that is negative, infinite or NaN; a distribution whose weights are all 0; no weights at
            all; a base that is not above 1; with `normalize=False`, a sum that is not 1. The text names the value and
            its position.

    Example:
        >>> float(charlm.information.entropy([2, 1, 1], base=2))
        1.5
    """
    return _returned(_entropy(_distribution(p, "p", normalize)), base, p)


def cross_entropy(p: Weights, q: Weights, *, base: float = math.e, normalize: bool = True) -> Any:
    """The cross-entropy H(p, q): the mean cost of a token of p under the best code for q.

    Args:
        p, q: (..., V) weights; their leading axes are broadcast.
        base, normalize: as in `entropy`.

    Returns:
        (...) float64, at least H(p); infinite where p > 0 and q = 0.

    Raises:
        ValueError: as in `entropy`; last axes that differ.

    Example:
        >>> round(float(charlm.information.cross_entropy([1, 1], [1, 3], base=2)), 6)  # (log2 4 + log2 4/3) / 2
        1.207519
    """
    p_, q_ = _pair(p, q, normalize)
    return _returned(-torch.xlogy(p_, q_).sum(-1), base, p, q)  # 0 where p = 0, infinite where only q = 0


def kl_divergence(p: Weights, q: Weights, *, base: float = math.e, normalize: bool = True) -> Any:
    """The Kullback-Leibler divergence KL(p ‖ q): the extra cost of the code for q over that for p.

    Args:
        p, q: (..., V) weights; their leading axes are broadcast.
        base, normalize: as in `entropy`.

    Returns:
        (...) float64, at least 0 up to rounding; infinite where p > 0 and q = 0.

    Raises:
        ValueError: as in `entropy`; last axes that differ.

    Example:
        >>> float(charlm.information.kl_divergence([1, 0], [1, 1], base=2))
        1.0
    """
    return _returned(_kl(*_pair(p, q, normalize)), base, p, q)


def js_divergence(p: Weights, q: Weights, *, base: float = math.e, normalize: bool = True) -> Any:
    """The Jensen-Shannon divergence JS(p, q): symmetric and finite.

    Args:
        p, q: (..., V) weights; their leading axes are broadcast.
        base, normalize: as in `entropy`.

    Returns:
        (...) float64, from 0 (equal) to log 2 (disjoint). Both distributions have the weight one half, whatever the
        sums of their counts.

    Raises:
        ValueError: as in `entropy`; last axes that differ.

    Example:
        >>> float(charlm.information.js_divergence([5, 0], [0, 1], base=2))
        1.0
    """
    p_, q_ = _pair(p, q, normalize)
    middle = (p_ + q_) / 2
    return _returned((_kl(p_, middle) + _kl(q_, middle)) / 2, base, p, q)


def mutual_information(joint: Weights, *, base: float = math.e, normalize: bool = True) -> Any:
    """The mutual information I(X; Y): the reduction of the cost of one variable if the other is known.

    Args:
        joint: (..., X, Y) weights of the joint distribution, for example counts of pairs.
        base, normalize: as in `entropy`; the sums are over both axes.

    Returns:
        (...) float64, at least 0 up to rounding.

    Raises:
        ValueError: as in `entropy`; fewer than two axes.

    Example:
        >>> float(charlm.information.mutual_information([[1, 0], [0, 1]], base=2))
        1.0
    """
    weights = _as_tensor(joint, "joint")
    if weights.ndim < 2:
        raise ValueError(f"joint has shape {tuple(weights.shape)}, but must have an axis for each of two variables")
    both = _normalized(weights, "joint", (-2, -1), normalize)
    independent = both.sum(-1, keepdim=True) * both.sum(-2, keepdim=True)
    return _returned(_kl(both.flatten(-2), independent.flatten(-2)), base, joint)


def perplexity(p: Weights, *, normalize: bool = True) -> Any:
    """The perplexity e^H(p): the number of equally probable tokens with the same entropy.

    Args:
        p: (..., V) weights.
        normalize: as in `entropy`.

    Returns:
        (...) float64, from 1 to V. It does not depend on the base of the logarithm.

    Raises:
        ValueError: as in `entropy`.

    Example:
        >>> round(float(charlm.information.perplexity([1, 1, 1, 1])), 12)
        4.0
    """
    return _returned(_entropy(_distribution(p, "p", normalize)).exp(), math.e, p)


def conditional_entropies(text: ngrams.Tokens, max_order: int, *, base: float = math.e) -> np.ndarray:
    """H_0, ..., H_max_order of a text: the entropy of a token given the k tokens before it, from the text's own counts.

    Args:
        text: N tokens: a str (its code points), bytes, or a one-dimensional array or tensor of integers >= 0.
        max_order: the largest k, from 0 to 999.
        base: the base of the logarithm: e for nats, 2 for bits.

    Returns:
        (max_order + 1,) float64, for each token. H_k is the mean over the N - k tokens that have k tokens before them.

    Raises:
        TypeError: tokens that are not integers.
        ValueError: a text of max_order tokens or fewer; a negative token; an order or a base out of range.

    Example:
        >>> charlm.information.conditional_entropies("abababab", 1, base=2).round(12)
        array([1., 0.])

    Note:
        The counts are in-sample: nothing is smoothed or held out, so high orders of a short text tend to 0. All orders
        are counted in one call, natively and in bounded memory: see `charlm.ngrams`.
    """
    tokens = ngrams.as_tokens(text)
    if not 0 <= max_order < ngrams.MAX_LENGTH:
        raise ValueError(f"the order is {max_order}, but must be at least 0 and at most {ngrams.MAX_LENGTH - 1}")
    if len(tokens) <= max_order:
        raise ValueError(f"a text of {len(tokens)} tokens has none with {max_order} before it")
    unit = _unit(base)
    grams, contexts = ngrams.count_spectra(tokens, max_order + 1)
    total = len(tokens) - np.arange(max_order + 1)
    surprisals = [
        _count_log_count(context) - _count_log_count(gram) for gram, context in zip(grams, contexts, strict=True)
    ]
    return np.maximum(np.array(surprisals), 0.0) / total / unit  # rounding may make an exact 0 negative


def conditional_entropy(text: ngrams.Tokens, order: int, *, base: float = math.e) -> float:
    """H_order of a text.

    Args:
        text, base: as in `conditional_entropies`.
        order: k, from 0 to 999.

    Returns:
        A float.

    Raises:
        TypeError, ValueError: as in `conditional_entropies`.

    Example:
        >>> charlm.information.conditional_entropy("abababab", 1)
        0.0
    """
    return float(conditional_entropies(text, order, base=base)[order])


# ---- weights


def _as_tensor(weights: Weights, name: str) -> Tensor:
    """float64, on the device of the weights."""
    if not isinstance(weights, Tensor):
        weights = torch.from_numpy(np.array(weights, dtype=np.float64))
    if weights.is_complex():
        raise ValueError(f"{name} is of {weights.dtype}, but weights are real")
    return weights.double()


def _normalized(weights: Tensor, name: str, axes: int | tuple[int, int], normalize: bool) -> Tensor:
    """The weights divided by their sums along `axes`; ValueError for weights that make no distribution."""
    if weights.ndim == 0 or weights.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(weights.shape)}, which holds no distribution")
    _check(name, weights, (weights >= 0) & weights.isfinite(), "is not a finite number of at least 0")
    sums = weights.sum(axes, keepdim=True)
    _check(f"the sum of {name}", sums, (sums > 0) & sums.isfinite(), "is not a finite number above 0")
    if not normalize:
        _check(f"the sum of {name}", sums, (sums - 1).abs() <= SUM_TOLERANCE, "is not 1")
        return weights
    return weights / sums


def _check(name: str, values: Tensor, holds: Tensor, problem: str) -> None:
    if not holds.all():
        place = tuple((~holds).nonzero()[0].tolist())
        shown = f"({', '.join(map(str, place))}{',' if len(place) == 1 else ''})"
        raise ValueError(f"{name} at position {shown} is {values[place].item():g}, which {problem}")


def _distribution(weights: Weights, name: str, normalize: bool) -> Tensor:
    return _normalized(_as_tensor(weights, name), name, -1, normalize)


def _pair(p: Weights, q: Weights, normalize: bool) -> tuple[Tensor, Tensor]:
    p_, q_ = _distribution(p, "p", normalize), _distribution(q, "q", normalize)
    if p_.shape[-1] != q_.shape[-1]:
        raise ValueError(f"p has {p_.shape[-1]} weights on its last axis, but q has {q_.shape[-1]}")
    return p_, q_


# ---- sums, in nats


def _entropy(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1) + 0.0  # + 0.0: no -0.0


def _kl(p: Tensor, q: Tensor) -> Tensor:
    # The ratio is set to 1 where p is 0, so that 0 log (0 / 0) is 0.
    return torch.xlogy(p, torch.where(p > 0, p / q, 1.0)).sum(-1)


def _count_log_count(spectrum: ngrams.Spectrum) -> float:
    """Σ n log n over all n-grams."""
    count = spectrum.count.astype(np.float64)
    return math.fsum(spectrum.ngrams * (count * np.log(count)))


def _unit(base: float) -> float:
    """One unit of `base` in nats."""
    if not (1 < base < math.inf):
        raise ValueError(f"base is {base}, but must be above 1")
    return math.log(base)


def _returned(nats: Tensor, base: float, *given: Weights) -> Any:
    """The result in units of `base`; a tensor if a tensor was given, else numpy."""
    result = nats / _unit(base)
    return result if any(isinstance(weights, Tensor) for weights in given) else result.numpy()[()]
