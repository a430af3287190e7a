"""How predictable a corpus is before any network sees it: what a model of it has to beat.

    in-sample   H_k of the whole file, from its own counts (charlm.information): falls towards 0 with k, because a
                long context has occurred once and foretells what followed it. A bound on nothing.
    held-out    Kneser–Ney n-grams (charlm.lm.models.ngram) of the same contexts, fitted on train and measured on dev:
                what contexts are worth on new text.
    gzip, …     the whole file, compressed: a code that learns as it goes.

All in bits a character. The file is taken as it is modelled: newlines as "\\n", in line format items stripped and empty
lines dropped, so that an item's end is its newline, a character.
"""

from __future__ import annotations

import bz2
import gzip
import lzma
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from charlm.information import conditional_entropies
from charlm.lm.data import SPLITS, Corpus, build_corpus
from charlm.lm.errors import UserError
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
    """What `measure` found; entropies in bits a character.

    bytes, characters, alphabet: of the file as it is modelled; how many different characters.
    in_sample:  H_0, H_1, …
    held_out:   of the n-grams whose context is 0, 1, … characters, on dev.
    compressed: by the name of the compressor.
    items:      in line format their number, those that repeat an earlier one, and how many of dev's dev_items stand
                in train as well; None in running text.
    """

    format: str
    bytes: int
    characters: int
    alphabet: int
    in_sample: list[float]
    held_out: list[float]
    compressed: dict[str, float]
    items: int | None
    duplicate_items: int | None
    dev_items: int | None
    dev_items_in_train: int | None

    def to_json(self) -> dict[str, Any]:
        """The fixed form of `charlm entropy --json`."""
        return asdict(self)


def measure(
    text: str, *, order: int = 5, format: str | None = None, seed: int = 42, name: str = "the input"
) -> Predictability:
    """Measures `text`, split as training would split it; `order` is the largest k, less where the text is short.

    Raises:
        UserError: an order below 0 or above MAX_ORDER, or a text that `build_corpus` refuses.
    """
    if not 0 <= order <= MAX_ORDER:
        raise UserError(f"order is {order}, but must be from 0 to {MAX_ORDER}")
    corpus = build_corpus(text, format=format, seed=seed, name=name)
    line = corpus.format == "line"
    if line:
        text = "".join(f"{item}\n" for part in text.split("\n") if (item := part.strip()))
    data = text.encode()
    in_sample = conditional_entropies(text, min(order, len(text) - 1), base=2)
    items = [item for split in SPLITS for item in corpus.parts[split]] if line else []
    return Predictability(
        format=corpus.format,
        bytes=len(data),
        characters=len(text),
        alphabet=len(corpus.vocabulary.chars) + line,
        in_sample=in_sample.tolist(),
        held_out=_held_out(corpus, order),
        compressed={name: 8 * len(compress(data)) / len(text) for name, compress in COMPRESSORS.items()},
        items=len(items) if line else None,
        duplicate_items=len(items) - len(set(items)) if line else None,
        dev_items=len(corpus.parts["dev"]) if line else None,
        dev_items_in_train=corpus.overlap(),
    )


def _held_out(corpus: Corpus, order: int) -> list[float]:
    """Bits a character on dev of the n-grams that see 0, 1, …, `order` characters before."""
    size, pad_token = len(corpus.vocabulary), corpus.vocabulary.pad_token
    block_size = max(2, order)  # an n-gram tells items from running text by two characters of context
    train, dev = (corpus.examples(split, block_size) for split in ("train", "dev"))
    curve = []
    for k in range(order + 1):
        model = NGram(size, block_size, pad_token, order=k + 1)
        model.fit(train)
        curve.append(evaluate(model, dev, "dev").bits_per_char)
    return curve
