"""The n-gram model: interpolated Kneser–Ney smoothing with a discount for each order, or add-k.

Kneser–Ney (Kneser & Ney 1995; interpolated, with D_m estimated for each order: Chen & Goodman 1999)

    p_m(x | c) = (a(c x) - D_m) / A(c)  +  D_m T(c) / A(c) · p_{m-1}(x | c')      the first term only where a(c x) > 0
    p_0(x)     = 1 / V                                                            so nothing has probability 0
    D_m        = n_1 / (n_1 + 2 n_2)

c is the context of m - 1 tokens, c' the same without its first token, A(c) the sum of a(c x) over x, T(c) the number
of x that occur after c, n_1 and n_2 the number of n-grams of length m with a = 1 and a = 2. After a context that never
occurred p_m is p_{m-1}. At the highest order a is the count of the n-gram; below, where a shorter n-gram only speaks
for contexts not seen, it is the number of distinct tokens that stand before it. Nothing stands before an item, so
n-grams that begin where an item does keep their counts, and no context reaches beyond it.

Add-k (Lidstone; k = 1 is Laplace's), at the highest order alone

    p(x | c)   = (n(c x) + k) / (n(c) + k V)

The counts form a trie of contexts, read from the nearest token backwards, so that the contexts of all orders lie on one
path: node 0 is the empty context, and `context_keys` holds the other nodes' (parent · V + token), sorted, so that
node i is at i - 1. `ngram_keys` holds (node · V + next token) of every n-gram of every order, sorted too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

import charlm.functional as F
from charlm.lm.examples import Examples
from charlm.lm.models.base import reduced
from charlm.lm.models.counts import CountModel
from charlm.ngrams import NgramLevel, count_ngrams

SMOOTHINGS = ("kneser-ney", "add-k")
DISCOUNT_WITHOUT_SINGLES = 0.5  # where no n-gram of an order occurs once the estimate would be 0, and leave no rest


class NGram(CountModel):
    """The next token given the last `order - 1`, from their counts.

    Args:
        vocab_size, block_size, pad_token: as `LanguageModel`; block_size is at least order - 1.
        order: length n of the longest n-gram; None is block_size + 1.
        smoothing: "kneser-ney" or "add-k".
        add_k: k of add-k.

    Before `fit` every token is as probable as any other.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int = 1,
        pad_token: int = 0,
        *,
        order: int | None = None,
        smoothing: str = "kneser-ney",
        add_k: float = 1.0,
    ) -> None:
        super().__init__(vocab_size, block_size, pad_token)
        self.order = block_size + 1 if order is None else order
        if not 1 <= self.order <= block_size + 1:
            raise ValueError(f"order is {order}, but must be at least 1 and at most block_size + 1, {block_size + 1}")
        if smoothing not in SMOOTHINGS:
            raise ValueError(f"smoothing is {smoothing!r}, but must be one of {', '.join(SMOOTHINGS)}")
        self.smoothing = smoothing
        self.add_k = add_k
        self.context_keys: Tensor  # (C - 1,) int64 for C contexts
        self.ngram_keys: Tensor  # (G,) int64
        self.ngram_counts: Tensor  # (G,) int64: a, or n with add-k
        self.items: Tensor  # () bool: whether the pad token begins an item, and ends a context
        for name in ("context_keys", "ngram_keys", "ngram_counts"):
            self.register_buffer(name, torch.empty(0, dtype=torch.int64))
        self.register_buffer("items", torch.tensor(False))
        self._derive()

    def fit(self, examples: Examples) -> None:
        """Counts `examples`: all those of a split, one after the other as `Corpus.examples` gives them.

        Raises:
            ValueError: a context that does not end in the target before it.
        """
        stream, items = as_stream(examples, self.pad_token)
        boundary = self.pad_token if items else None
        levels = count_ngrams(stream.numpy()[::-1], self.order, starts=len(examples), boundary=boundary)
        counts = [level.count for level in levels] if self.smoothing == "add-k" else adjusted_counts(levels)
        arrays = index_by_context(levels, counts, self.vocab_size)
        self.context_keys, self.ngram_keys, self.ngram_counts = (
            torch.from_numpy(array).to(self.items.device) for array in arrays
        )
        self.items.fill_(items)
        self._derive()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T), targets (B,) → logits (B, V) float64, log-probabilities, and the loss in nats."""
        p = torch.full((len(idx), self.vocab_size), 1 / self.vocab_size, dtype=torch.float64, device=idx.device)
        for node, seen in self._contexts(idx):
            p *= torch.where(seen, self.rest[node], 1.0)[:, None]
            first = self.first_ngram[node]  # (B,) … of those of this context
            size = torch.where(seen, self.first_ngram[node + 1] - first, 0)
            row = torch.arange(len(idx), device=idx.device).repeat_interleave(size)  # (R,) n-grams in all
            ngram = (first - size.cumsum(0) + size)[row] + torch.arange(len(row), device=idx.device)
            p[row, self.ngram_keys[ngram] % self.vocab_size] += self.share[ngram]  # no pair twice
        logits = p.log_()
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """`forward`'s loss, of which only the targets' probabilities are made: () or, with "none", (B,)."""
        p = torch.full((len(idx),), 1 / self.vocab_size, dtype=torch.float64, device=idx.device)
        targets = targets.long()
        for node, seen in self._contexts(idx):
            ngram, occurs = find(self.ngram_keys, node * self.vocab_size + targets)
            share = torch.where(seen & occurs, self.share[ngram], 0.0)
            p = p * torch.where(seen, self.rest[node], 1.0) + share
        return reduced(-p.log(), reduction)

    def _contexts(self, idx: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """The contexts that p is made from, the shortest first: (B,) nodes, and (B,) whether training saw them."""
        if len(self.ngram_keys) == 0:
            return
        node = torch.zeros(len(idx), dtype=torch.int64, device=idx.device)
        seen = torch.ones_like(node, dtype=torch.bool)
        whole = torch.zeros_like(seen)  # the context reaches back to where the item begins
        if self.smoothing == "kneser-ney":
            yield node, seen
        for back in range(1, self.order):
            token = idx[:, -back].long()
            place, known = find(self.context_keys, node * self.vocab_size + token)
            node = torch.where(known, place + 1, node)
            if self.smoothing == "kneser-ney":
                seen = seen & known
                yield node, seen
            else:
                seen = seen & (known | whole)
                whole = whole | (self.items & (token == self.pad_token))
        if self.smoothing == "add-k":
            yield node, seen

    def _derive(self) -> None:
        """What `forward` looks up, from the counts.

        first_ngram (C + 1,): where the n-grams of each context begin. share (G,): what an n-gram adds to p.
        rest (C,): what the probability of the shorter context is multiplied by.
        """
        contexts = len(self.context_keys) + 1
        nodes = torch.arange(contexts + 1, device=self.ngram_keys.device)
        first = torch.searchsorted(self.ngram_keys, nodes * self.vocab_size)
        node = self.ngram_keys // self.vocab_size  # (G,)
        total = torch.zeros(contexts, dtype=torch.float64, device=node.device)
        total.index_add_(0, node, self.ngram_counts.double())  # integers: exact in any order
        if self.smoothing == "add-k":
            smoothed = total + self.add_k * self.vocab_size
            share, rest = self.ngram_counts / smoothed[node], self.add_k * self.vocab_size / smoothed
        else:
            discount = self._discounts(first)  # (C,)
            share = (self.ngram_counts - discount[node]) / total[node]
            rest = discount * first.diff() / total
        for name, tensor in {"first_ngram": first, "share": share, "rest": rest}.items():
            self.register_buffer(name, tensor, persistent=False)

    def _discounts(self, first_ngram: Tensor) -> Tensor:
        """D of each context: (C,) float64, one value for all contexts of one length."""
        discounts = []
        start, stop = 0, 1  # the nodes of one length: those whose parents are the nodes of the length before
        while start < stop:
            counts = self.ngram_counts[first_ngram[start] : first_ngram[stop]]
            once, twice = ((counts == n).sum().item() for n in (1, 2))
            discount = once / (once + 2 * twice) if once else DISCOUNT_WITHOUT_SINGLES
            discounts.append(torch.full((stop - start,), discount, dtype=torch.float64))
            start, stop = stop, 1 + int(torch.searchsorted(self.context_keys, stop * self.vocab_size).item())
        return torch.cat(discounts).to(first_ngram.device)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """Takes tensors of any size: how many n-grams there are is known only after training."""
        for name in ("context_keys", "ngram_keys", "ngram_counts"):
            if prefix + name in state_dict:
                setattr(self, name, getattr(self, name).new_empty(state_dict[prefix + name].shape))
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._derive()


def as_stream(examples: Examples, pad_token: int) -> tuple[Tensor, bool]:
    """The text that `examples` are windows of, on the CPU, and whether it is items.

    It is the first context and all targets: (T + N,). Items follow one another with a separator between, which is the
    target that ends the one and the pad that begins the next. They are told from running text by their contexts:
    in front of their pads stand only pads.
    """
    contexts, targets = examples.contexts, examples.targets
    last = contexts[:, -1]
    gaps = last[1:] != targets[:-1]
    if gaps.any():
        place = int(gaps.int().argmax().item()) + 1
        raise ValueError(f"the context of example {place} does not end in the target of the example before it")
    stream = torch.cat([contexts[:1].flatten(), targets]).cpu()
    if contexts.shape[1] < 2:
        return stream, False  # nothing lies behind one token
    return stream, not bool(((last == pad_token) & (contexts[:, -2] != pad_token)).any())


def adjusted_counts(levels: list[NgramLevel]) -> list[np.ndarray]:
    """a of each n-gram of `levels`, whose n-grams are read backwards: a longer one has a token more in front.

    How many distinct tokens stand in front; where there can be none, the count.
    """
    longer = [level.parent for level in levels[1:]]
    in_front = [np.bincount(parent, minlength=len(level.count)) for parent, level in zip(longer, levels, strict=False)]
    return [*(np.where(n > 0, n, level.count) for n, level in zip(in_front, levels, strict=False)), levels[-1].count]


def index_by_context(
    levels: list[NgramLevel], counts: list[np.ndarray], vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(context_keys, ngram_keys, ngram_counts) of n-grams that are read backwards, the predicted token first."""
    context_keys, ngram_keys, ngram_counts = [], [], []
    nodes = 1
    for length, (level, count) in enumerate(zip(levels, counts, strict=True), start=1):
        if length == 1:
            node, target = np.zeros(len(count), np.int64), level.token
        else:
            keys, node = np.unique(node[level.parent] * vocab_size + level.token, return_inverse=True)
            node += nodes
            nodes += len(keys)
            target = target[level.parent]
            context_keys.append(keys)
        keys = node * vocab_size + target
        order = np.argsort(keys)
        ngram_keys.append(keys[order])
        ngram_counts.append(count[order])
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *context_keys]), np.concatenate(ngram_keys), np.concatenate(ngram_counts)


def find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where `wanted` (B,) stand in the sorted, non-empty `keys`, and whether they do; a place is always valid."""
    place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return place, keys[place] == wanted
