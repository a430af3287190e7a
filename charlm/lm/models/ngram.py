"""The n-gram model: interpolated Kneser–Ney smoothing with one discount per order, or add-k smoothing.

Kneser–Ney (Kneser & Ney 1995; interpolated, with one D_m per order: Chen & Goodman 1999)

    p_m(x | c) = (a(c x) - D_m) / A(c)  +  D_m T(c) / A(c) · p_{m-1}(x | c')      the first term only if a(c x) > 0
    p_0(x)     = 1 / V                                                            so that no probability is 0
    D_m        = n_1 / (n_1 + 2 n_2)

c is the context of m - 1 tokens, c' is c without its first token, A(c) is the sum of a(c x) over x, T(c) is the number
of distinct x that occur after c, and n_1 and n_2 are the numbers of n-grams of length m with a = 1 and a = 2. After a
context that did not occur, p_m is p_{m-1}. At the highest order a is the count of the n-gram. At lower orders, which
matter only for contexts that did not occur, a is the number of distinct tokens before the n-gram. An n-gram at the
beginning of an item has no token before it and keeps its count, and no context reaches beyond its item.

Add-k (Lidstone; k = 1 is Laplace smoothing), at the highest order only

    p(x | c)   = (n(c x) + k) / (n(c) + k V)

The counts form a trie of contexts that is read backwards from the nearest token, so that the contexts of all orders lie
on one path. Node 0 is the empty context. `context_keys` holds (parent · V + token) of the other nodes in sorted order;
node i is at index i - 1. `ngram_keys` holds (node · V + next token) of every n-gram of every order, also sorted.

The state dict holds the three arrays in one tensor of bytes, `tables`: their differences, compressed. That is 1 to 2
bytes for each n-gram of a text in place of 24. A state dict that holds the arrays themselves, as it was before, can be
loaded too.
"""

from __future__ import annotations

import zlib
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

import charlm.functional as F
from charlm._errors import UserError
from charlm.lm.examples import Examples
from charlm.lm.models.base import reduce
from charlm.lm.models.counts import CountModel
from charlm.ngrams import NgramLevel, count_ngrams

# (B,) int64 nodes, and a (B,) mask of those that were seen in training, of each length of context.
Contexts = list[tuple[Tensor, Tensor]]

TABLES = ("context_keys", "ngram_keys", "ngram_counts")
SMOOTHINGS = ("kneser-ney", "add-k")
SCANNED_EXAMPLES = 1 << 18  # examples that are written at a time
BYTES_PER_NGRAM = 112  # of memory while the tables are built; the tables themselves take at most 48
DEFAULT_DISCOUNT = 0.5  # used if no n-gram of an order has a = 1, where the estimate of 0 would disable smoothing


class NGram(CountModel):
    """An n-gram model of the next token given the last `order - 1` tokens. Before `fit` it is uniform.

    Args:
        vocab_size, block_size, pad_token: As in `LanguageModel`; block_size is at least order - 1.
        order: Length of the longest n-gram; None is block_size + 1.
        smoothing: "kneser-ney" or "add-k".
        add_k: The constant k of add-k smoothing.

    Raises:
        ValueError: `order` is out of its range, or `smoothing` is unknown.
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
        self.ngram_counts: Tensor  # (G,) int64: a of Kneser–Ney, or n of add-k
        self.items: Tensor  # () bool: whether the pad token starts an item, which ends a context
        for name in TABLES:
            self.register_buffer(name, torch.empty(0, dtype=torch.int64), persistent=False)
        self.register_buffer("items", torch.tensor(False))
        self._packed: Tensor | None = None  # the three tables as the state dict holds them, once it has been asked for
        self._derive()

    def fit(self, examples: Examples, *, memory: int | None = None, directory: str | Path | None = None) -> None:
        """Counts `examples`, which must be all of those of a split in the order of `Corpus.examples`.

        Args:
            examples: The examples.
            memory: The largest number of bytes to allocate, beside SCANNED_EXAMPLES examples, for counting on disk;
                None counts in memory. The model itself is in memory: with BYTES_PER_NGRAM for each distinct n-gram it
                must fit in the same bound.
            directory: The folder of the temporary files, as in `charlm.ngrams.count_ngrams`.

        Raises:
            ValueError: A context does not end in the target of the example before it, or too little `memory` to count.
            UserError: The tables of the model do not fit in `memory`.
            OSError: As in `count_ngrams`.
        """
        with nullcontext() if memory is None else TemporaryFile(dir=directory) as file:
            stream = as_stream(examples, file)
        # Padding ends the context at the beginning of an item. It does not matter for one token of context.
        items = examples.protocol == "items" and examples.block_size > 1 and len(examples) > 0
        levels = count_ngrams(
            stream.numpy()[::-1],
            self.order,
            starts=len(examples),
            boundary=self.pad_token if items else None,
            memory=memory,
            directory=directory,
        )
        ngrams = sum(len(level.count) for level in levels)
        if memory is not None and ngrams * BYTES_PER_NGRAM > memory:
            raise UserError(
                f"the n-gram model of order {self.order} has {ngrams:,} distinct n-grams, whose tables need "
                f"{ngrams * BYTES_PER_NGRAM:,} bytes, but memory is {memory:,}: lower the order or raise the memory"
            )
        counts = [level.count for level in levels] if self.smoothing == "add-k" else adjusted_counts(levels)
        arrays = index_by_context(levels, counts, self.vocab_size)
        self.context_keys, self.ngram_keys, self.ngram_counts = (
            torch.from_numpy(array).to(self.items.device) for array in arrays
        )
        self._packed = None
        self.items.fill_(items)
        self._derive()

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `LanguageModel.forward`; the logits are log-probabilities, (B, V) float64."""
        logits = self.log_probs(self.contexts(idx))
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """As `LanguageModel.loss`; only the probabilities of the targets are computed."""
        return reduce(self.surprisal(self.contexts(idx), targets), reduction)

    def log_probs(self, contexts: Contexts) -> Tensor:
        """The log-probabilities of all tokens after `contexts`, (B, V) float64."""
        node, _ = contexts[0]
        p = torch.full((len(node), self.vocab_size), 1 / self.vocab_size, dtype=torch.float64, device=node.device)
        for node, seen in contexts if len(self.ngram_keys) else []:
            p *= torch.where(seen, self.rest[node], 1.0)[:, None]
            first = self.first_ngram[node]  # (B,) index of the first n-gram of each context
            size = torch.where(seen, self.first_ngram[node + 1] - first, 0)  # (B,) n-grams of each context
            row = torch.arange(len(node), device=node.device).repeat_interleave(size)  # (R,) for R n-grams in total
            ngram = (first - size.cumsum(0) + size)[row] + torch.arange(len(row), device=node.device)
            p[row, self.ngram_keys[ngram] % self.vocab_size] += self.share[ngram]  # each pair occurs once
        return p.log_()

    def surprisal(self, contexts: Contexts, targets: Tensor) -> Tensor:
        """-log p of `targets` (B,) after `contexts`, (B,) float64 nats."""
        targets = targets.long()
        p = torch.full((len(targets),), 1 / self.vocab_size, dtype=torch.float64, device=targets.device)
        for node, seen in contexts if len(self.ngram_keys) else []:
            ngram, occurs = find(self.ngram_keys, node * self.vocab_size + targets)
            share = torch.where(seen & occurs, self.share[ngram], 0.0)
            p = p * torch.where(seen, self.rest[node], 1.0) + share
        return -p.log_()

    def evidence(self, contexts: Contexts) -> tuple[Tensor, Tensor, Tensor]:
        """What training has seen of the longest known one of `contexts`.

        Returns:
            Its length in tokens, (B,) int64; the sum A of its counts; and the number T of distinct tokens after it, two
            of (B,) float64.
        """
        node, _ = contexts[0]
        length, longest = torch.zeros_like(node), node
        for number, (node, seen) in enumerate(contexts):
            length, longest = torch.where(seen, number, length), torch.where(seen, node, longest)
        distinct = self.first_ngram[longest + 1] - self.first_ngram[longest]
        return length, self.total[longest], distinct.double()

    def contexts(self, idx: Tensor) -> Contexts:
        """The contexts of idx (B, T) that contribute to p, shortest first."""
        node = torch.zeros(len(idx), dtype=torch.int64, device=idx.device)
        seen = torch.ones_like(node, dtype=torch.bool)
        found = [(node, seen)]
        if len(self.ngram_keys) == 0:
            return found
        is_add_k = self.smoothing == "add-k"
        whole = torch.zeros_like(seen)  # whether the context reaches the beginning of its item
        for back in range(1, self.order):
            token = idx[:, -back].long()
            index, known = find(self.context_keys, node * self.vocab_size + token)
            node = torch.where(known, index + 1, node)
            seen = seen & (known | whole)
            if is_add_k:
                whole = whole | (self.items & (token == self.pad_token))
            found.append((node, seen))
        return found[-1:] if is_add_k else found

    def _derive(self) -> None:
        """Computes the lookup tables of `forward` from the counts.

        first_ngram (C + 1,) is the index of the first n-gram of each context. share (G,) is the term that an n-gram
        adds to p. rest (C,) is the factor of the probability given the next shorter context. total (C,) is A.
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
        for name, tensor in {"first_ngram": first, "share": share, "rest": rest, "total": total}.items():
            self.register_buffer(name, tensor, persistent=False)

    def _discounts(self, first_ngram: Tensor) -> Tensor:
        """The discount D of each context, (C,) float64, equal for all contexts of one length."""
        discounts = []
        start, stop = 0, 1  # the nodes of one context length; their parents are the nodes of the previous length
        while start < stop:
            counts = self.ngram_counts[first_ngram[start] : first_ngram[stop]]
            once, twice = ((counts == n).sum().item() for n in (1, 2))
            discount = once / (once + 2 * twice) if once else DEFAULT_DISCOUNT
            discounts.append(torch.full((stop - start,), discount, dtype=torch.float64))
            start, stop = stop, 1 + int(torch.searchsorted(self.context_keys, stop * self.vocab_size).item())
        return torch.cat(discounts).to(first_ngram.device)

    def _save_to_state_dict(self, destination: dict[str, Tensor], prefix: str, keep_vars: bool) -> None:
        """Packs the tables when they are first asked for: most n-grams are counted to be measured, and not saved."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._packed is None:
            arrays = tuple(getattr(self, name).cpu().numpy() for name in TABLES)
            self._packed = torch.from_numpy(pack(arrays)) if len(arrays[1]) else torch.empty(0, dtype=torch.uint8)
        destination[f"{prefix}tables"] = self._packed

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Tensor],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        """Accepts tables of any size, because the number of n-grams is known only after training."""
        if prefix + TABLES[0] in state_dict:  # of an earlier version
            arrays = tuple(state_dict.pop(prefix + name).cpu().numpy() for name in TABLES)
            self._packed = None
        elif prefix + "tables" in state_dict:
            self._packed = state_dict.pop(prefix + "tables").cpu()
            arrays = unpack(self._packed.numpy(), self.vocab_size)
        else:
            missing_keys.append(prefix + "tables")
            arrays = ()
        for name, array in zip(TABLES, arrays, strict=False):
            setattr(self, name, torch.from_numpy(array).to(self.items.device))
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, *rest)
        self._derive()


def pack(arrays: tuple[np.ndarray, ...]) -> np.ndarray:
    """The tables (TABLES) as bytes, (n,) uint8: their lengths, and the compressed bytes of differences and counts.

    The lowest bytes of all numbers come first, then the second ones, and so on: most of them are equal.
    """
    context_keys, ngram_keys, counts = arrays
    numbers = np.concatenate([np.diff(context_keys, prepend=0), np.diff(ngram_keys, prepend=0), counts])
    planes = np.ascontiguousarray(numbers.astype("<i8").view(np.uint8).reshape(-1, 8).T)
    lengths = np.array([len(context_keys), len(ngram_keys)], "<i8")
    return np.frombuffer(bytearray(lengths.tobytes() + zlib.compress(planes.tobytes(), level=1)), np.uint8)


def unpack(packed: np.ndarray, vocab_size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inverse of `pack`; ValueError if the bytes are not those of tables of `vocab_size` tokens."""
    if not len(packed):
        return tuple(np.empty(0, np.int64) for _ in TABLES)
    data = packed.tobytes()
    contexts, ngrams = (int(length) for length in np.frombuffer(data[:16], "<i8"))
    size = 8 * (contexts + 2 * ngrams)
    # zlib makes at most about 1032 bytes of one, so that a short file cannot ask for much memory.
    if contexts < 0 or ngrams < 1 or size > 1100 * len(data):
        raise ValueError(f"the tables of the n-gram name {contexts} contexts and {ngrams} n-grams")
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data[16:], size + 1)
    except zlib.error as error:
        raise ValueError(f"the tables of the n-gram are damaged: {error}") from error
    if len(raw) != size or not stream.eof:  # at the end zlib compares a checksum
        raise ValueError("the tables of the n-gram are too short or too long")
    numbers = np.ascontiguousarray(np.frombuffer(raw, np.uint8).reshape(8, -1).T).view("<i8").ravel()
    context_keys, ngram_keys = np.cumsum(numbers[:contexts]), np.cumsum(numbers[contexts : contexts + ngrams])
    counts = numbers[contexts + ngrams :].copy()
    steps = np.diff(context_keys), np.diff(ngram_keys)
    in_order = all((step > 0).all() for step in steps) and (context_keys[:1] >= 0).all() and ngram_keys[0] >= 0
    if not in_order or (counts < 1).any() or ngram_keys[-1] >= (contexts + 1) * vocab_size:
        raise ValueError("the tables of the n-gram are not sorted, or name contexts that do not exist")
    return context_keys, ngram_keys, counts


def as_stream(examples: Examples, file: IO[bytes] | None = None) -> Tensor:
    """The first context of `examples`, which follow each other in a split, and all targets: (T + N,) on the CPU.

    Between two items it has one separator, the last target of the first item and the padding of the second. If an empty
    `file` is given, the stream is written to it and mapped into memory.
    """
    if isinstance(examples.index, Tensor) and (gaps := examples.index.diff() != 1).any():
        index = int(gaps.int().argmax().item()) + 1
        raise ValueError(f"the context of example {index} does not end in the target of the example before it")
    first = examples.slice(0, 1).contexts.flatten()
    if file is None or not len(examples):
        return torch.cat([first, examples.targets]).cpu()
    file.write(first.cpu().numpy().tobytes())
    for start in range(0, len(examples), SCANNED_EXAMPLES):
        file.write(examples.slice(start, start + SCANNED_EXAMPLES).targets.cpu().numpy().tobytes())
    return torch.from_numpy(np.memmap(file, first.cpu().numpy().dtype, "r+"))


def adjusted_counts(levels: list[NgramLevel]) -> list[np.ndarray]:
    """The adjusted count a of each n-gram of `levels`, read backwards: a longer n-gram has one more token in front.

    It is the number of distinct tokens before the n-gram, or the count of the n-gram if there are none.
    """
    longer = [level.parent for level in levels[1:]]
    before = [np.bincount(parent, minlength=len(level.count)) for parent, level in zip(longer, levels, strict=False)]
    return [*(np.where(n > 0, n, level.count) for n, level in zip(before, levels, strict=False)), levels[-1].count]


def index_by_context(
    levels: list[NgramLevel], counts: list[np.ndarray], vocab_size: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(context_keys, ngram_keys, ngram_counts) of n-grams that are read backwards from the predicted token."""
    ngrams = sum(len(count) for count in counts)
    ngram_keys, ngram_counts = np.empty(ngrams, np.int64), np.empty(ngrams, np.int64)
    context_keys = []
    nodes, stop = 1, 0
    for length, (level, count) in enumerate(zip(levels, counts, strict=True), start=1):
        if length == 1:
            node, target = np.zeros(len(count), np.int64), level.token
        else:
            keys = node[level.parent]
            keys *= vocab_size
            keys += level.token
            keys, node = np.unique(keys, return_inverse=True)
            node += nodes
            nodes += len(keys)
            target = target[level.parent]
            context_keys.append(keys)
        keys = node * vocab_size
        keys += target
        order = np.argsort(keys)
        start, stop = stop, stop + len(count)
        np.take(keys, order, out=ngram_keys[start:stop])
        np.take(count, order, out=ngram_counts[start:stop])
    return np.concatenate([np.zeros(0, np.int64), *context_keys]), ngram_keys, ngram_counts


def find(keys: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The index of each of `wanted` (B,) in the sorted, non-empty `keys`, and a mask of those found.

    The index of a key that is not found is valid but arbitrary.
    """
    index = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
    return index, keys[index] == wanted
