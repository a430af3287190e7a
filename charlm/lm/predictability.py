"""The predictability of a corpus without a network: reference values for the loss of a model.

    in-sample   The conditional entropy H_k of the whole file, from its own counts (charlm.information). It falls to 0
                as k grows, because a long context occurs only once and then determines the next character. It is not a
                bound on the loss on new text.
    held-out    Kneser–Ney n-grams (charlm.lm.models.ngram) with the same contexts, fitted on train and measured on dev:
                how much contexts help on new text.
    gzip, …     The size of the whole file after compression. Items are in the shuffled order of the split: the order of
                a sorted list would tell a compressor what no model of an item can know.

All values are in bits per character. The file is taken as it is modelled: newlines are "\\n"; in line format items are
stripped, empty lines are dropped, and the end of an item is the newline, which counts as a character.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from charlm._errors import UserError
from charlm.information import conditional_entropies
from charlm.lm.data import SPLITS, Corpus, build_corpus, split_items
from charlm.lm.evaluate import evaluate
from charlm.lm.models import NGram

MAX_ORDER = 20
COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: gzip.compress(data, compresslevel=9, mtime=0),
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


@dataclass(frozen=True)
class Predictability:
    """The result of `measure`, with entropies in bits per character. The last four fields are None for running text."""

    format: str  # "line" or "text"
    bytes: int  # of the file as it is modelled
    characters: int
    alphabet: int  # distinct characters
    in_sample: list[float]  # H_0, H_1, …
    held_out: list[float]  # the loss on dev of the n-grams whose context is 0, 1, … characters
    compressed: dict[str, float]  # by the name of the compressor
    items: int | None
    duplicate_items: int | None  # that repeat an earlier one
    dev_items: int | None
    dev_items_in_train: int | None

    def to_json(self) -> dict[str, Any]:
        """The object of `charlm entropy --json`."""
        return asdict(self)


def measure(
    text: str, *, order: int = 5, format: str | None = None, seed: int = 42, name: str = "the input"
) -> Predictability:
    """Measures the predictability of `text`, split as for training; the other arguments are those of `build_corpus`.

    `order` is the longest context k; a short text has fewer in-sample entropies.

    Raises:
        UserError: `order` is below 0 or above MAX_ORDER, or `build_corpus` refuses the text.
    """
    if not 0 <= order <= MAX_ORDER:
        raise UserError(f"order is {order}, but must be from 0 to {MAX_ORDER}")
    corpus = build_corpus(text, format=format, seed=seed, name=name)
    line = corpus.format == "line"
    if line:
        text = "".join(f"{item}\n" for item in split_items(text))
    in_sample = conditional_entropies(text, min(order, len(text) - 1), base=2)
    items = [item for split in SPLITS for item in corpus.parts[split]] if line else []
    data = ("".join(f"{item}\n" for item in items) if line else text).encode()
    return Predictability(
        format=corpus.format,
        bytes=len(data),
        characters=len(text),
        alphabet=len(corpus.vocabulary.chars) + line,
        in_sample=in_sample.tolist(),
        held_out=held_out(corpus, order),
        compressed={name: 8 * len(compress(data)) / len(text) for name, compress in COMPRESSORS.items()},
        items=len(items) if line else None,
        duplicate_items=len(items) - len(set(items)) if line else None,
        dev_items=corpus.sizes["dev"] if line else None,
        dev_items_in_train=corpus.overlap(),
    )


def held_out(corpus: Corpus, order: int) -> list[float]:
    """The loss on dev in bits per character of the n-grams with a context of 0, 1, …, `order` characters."""
    size, pad_token = len(corpus.vocabulary), corpus.vocabulary.pad_token
    block_size = max(2, order)  # an n-gram model needs two tokens of context to tell items from running text
    train, dev = (corpus.examples(split, block_size) for split in ("train", "dev"))
    curve = []
    for k in range(order + 1):
        model = NGram(size, block_size, pad_token, order=k + 1)
        model.fit(train)
        curve.append(evaluate(model, dev, "dev").bits_per_char)
    return curve
