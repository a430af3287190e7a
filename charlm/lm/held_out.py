"""The end of train that is held out from a network and an n-gram, to choose how they are mixed.

A network that is mixed with an n-gram is not trained on the last HELD_OUT of the tokens of train, nor on more than
MOST_HELD_OUT of these. An n-gram without them is as good on them as one of all of train is on new data. That shows the
order and, with the network's losses, the weights. The n-gram of the finished mixture has counted all of train.

In line format the held-out part begins with an item. Items are in random order; of running text it is the end.
"""

from __future__ import annotations

from typing import TypeVar

import torch

from charlm.lm.corpus import Corpus
from charlm.lm.examples import Examples, Sequences
from charlm.lm.models.ngram import NGram

HELD_OUT = 0.05
MOST_HELD_OUT = 100_000
ORDERS = (1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16)  # that `choose_order` tries
DEFAULT_ORDER = 3  # where nothing is held out
TOLERANCE = 0.003  # of running text: the share of the loss that a longer context may cost on the held-out part
PATIENCE = 2  # orders in a row without a better loss after which `choose_order` stops
COUNTED_TO_CHOOSE = 2_000_000  # tokens that the n-grams of `choose_order` count
MOST_NGRAMS = 6_000_000  # distinct ones of one model: up to 700 MB while they are counted, 10 MB in a checkpoint
CHUNK = 8192  # predictions at a time

Rows = TypeVar("Rows", Examples, Sequences)


def training_end(corpus: Corpus, block_size: int = 1) -> int:
    """The number of tokens of train before the held-out part; all of them if a network needs them all."""
    rows = corpus.examples("train", block_size=1)
    total = len(rows)
    end = total - min(int(HELD_OUT * total), MOST_HELD_OUT)
    if rows.protocol == "items" and end < total:
        stream = rows.stream
        end = int(stream.items(stream.item_of(torch.tensor([end + stream.start])))[0].item()) - stream.start
    least = block_size if rows.protocol != "items" else 1
    return end if end >= least else total


def before(rows: Rows, end: int) -> Rows:
    """Those of all `rows` of train that predict only the first `end` tokens."""
    if end == len(rows.stream):
        return rows
    if isinstance(rows, Examples):
        return rows.slice(0, end)
    if rows.layout == "runs":
        return rows.slice(0, _first_row(rows, end))
    return rows.slice(0, max(1, end - rows.block_size + 1))


def behind(rows: Rows, end: int) -> tuple[Rows, int]:
    """Those of all `rows`, which predict every token of train once, that predict only what is behind the first `end`.

    Returns:
        The rows, and the number of tokens before the first one that they predict.
    """
    total = len(rows.stream)
    if isinstance(rows, Examples):
        return rows.slice(end, total), end
    if rows.layout == "runs":
        return rows.slice(_first_row(rows, end), len(rows)), end
    first = -(-end // rows.block_size)  # windows begin at multiples of their size
    return rows.slice(first, len(rows)), min(total, first * rows.block_size)


def _first_row(rows: Sequences, end: int) -> int:
    """The first row of the item that begins behind the first `end` tokens; the number of rows if there is none."""
    if end == len(rows.stream):
        return len(rows)
    item = rows.stream.item_of(torch.tensor([end + rows.stream.start]))
    return int(rows.unit_rows(item)[0].item())


def counted(corpus: Corpus, order: int, end: int, most: int) -> Examples:
    """The examples of train that an n-gram counts: the last `most` of the first `end`."""
    return corpus.examples("train", max(1, order - 1)).slice(max(0, end - most), end)


def choose_order(corpus: Corpus, largest: int, most: int = COUNTED_TO_CHOOSE) -> tuple[int, int]:
    """The order in ORDERS, at most `largest`, of the Kneser–Ney n-gram with the lowest loss on the held-out part.

    Of running text it is the highest order whose loss is at most TOLERANCE above the lowest: other parts of the text,
    which is not shuffled, may repeat longer passages. In a mixture such a context counts only where it is known.

    Args:
        corpus: The data, of which only train is read.
        largest: The largest order.
        most: The number of tokens that the n-grams may count, the last ones before the held-out part.

    Returns:
        The order, and how many tokens an n-gram of it can count without more than MOST_NGRAMS distinct n-grams. Of more
        text, a smaller share of the n-grams is new, so that the share of those counted here is a bound.
    """
    end, total = training_end(corpus), corpus.tokens("train")
    if end == total:
        return min(DEFAULT_ORDER, largest), MOST_NGRAMS
    losses: dict[int, float] = {}
    sizes: dict[int, int] = {}
    for order in ORDERS:
        best = min(losses, key=losses.__getitem__, default=order)
        if order > largest or len([other for other in losses if other > best]) >= PATIENCE:
            break
        if losses and sizes[last := max(sizes)] * order > MOST_NGRAMS * last:  # it would have about as many a level
            break
        ngram = fitted_ngram(corpus, order, end, most)
        held_out = corpus.examples("train", ngram.block_size).slice(end, total)
        parts = [ngram.loss(idx, targets, reduction="sum").item() for idx, targets in held_out.chunks(CHUNK)]
        losses[order], sizes[order] = sum(parts) / len(held_out), len(ngram.ngram_keys)
    tolerance = TOLERANCE if corpus.format == "text" else 0.0
    best = max(order for order, loss in losses.items() if loss <= min(losses.values()) * (1 + tolerance))
    return best, MOST_NGRAMS * min(end, most) // sizes[best]


def fitted_ngram(corpus: Corpus, order: int, end: int, most: int) -> NGram:
    """A Kneser–Ney n-gram of the last `most` of the first `end` tokens of train."""
    vocabulary = corpus.vocabulary
    ngram = NGram(len(vocabulary), max(1, order - 1), vocabulary.pad_token, order=order).eval()
    ngram.fit(counted(corpus, order, end, most))
    return ngram
