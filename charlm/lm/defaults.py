"""The defaults of a training run, which follow the corpus: its size, its format and its alphabet.

A list of items with few characters, such as names, is learned best by an mlp, in seconds. For everything else the
default is a gru of two to four minutes on two cores. All networks are mixed with an n-gram, see
`charlm.lm.models.mixture`. docs/language_model.md has what this reaches on seven corpora.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from charlm.lm.config import NETWORKS, RECURRENT, TYPE_DEFAULTS, Config, check_options, types_with
from charlm.lm.corpus import Corpus

FEW_TOKENS = 400_000  # of train, for which the default is an mlp
LARGE_ALPHABET = 1000  # tokens from which on most of the work is the softmax
TOKENS_PER_BATCH = 1200  # of items, nearly
OF_CORPUS = ("block_size", "n_hidden", "dropout", "max_steps", "batch_size", "learning_rate", "eval_tokens")


def config_for(corpus: Corpus, given: Mapping[str, Any]) -> Config:
    """The configuration of a run on `corpus` with the options `given`; of all others the default.

    Raises:
        UserError: An option is out of its range, or the type does not have it.
    """
    type = given.get("type") or default_type(corpus, given)
    check_options(type, given)
    mixed = {"mix_ngram": None} if type in NETWORKS else {}
    return Config(**{**TYPE_DEFAULTS.get(type, {}), **_of_corpus(type, corpus), **mixed, **given, "type": type})


def default_type(corpus: Corpus, given: Iterable[str] = ()) -> str:
    """The type of model for `corpus` where none is given: of the two, the one that has the options `given`."""
    is_small = corpus.tokens("train") <= FEW_TOKENS and len(corpus.vocabulary) < LARGE_ALPHABET
    types = ["mlp", "gru"] if corpus.format == "line" and is_small else ["gru", "mlp"]
    return next((type for type in types if all(type in types_with(name) for name in given)), types[0])


def _of_corpus(type: str, corpus: Corpus) -> dict[str, Any]:
    """The defaults of a recurrent network that depend on the corpus, which are some of OF_CORPUS."""
    if type not in RECURRENT:
        return {}
    tokens = corpus.tokens("train")
    if corpus.format == "text":
        text = {"block_size": 64, "batch_size": 32, "max_steps": 3500, "eval_tokens": 100_000}
        return {"n_hidden": 256, "dropout": 0.0, **text}
    has_few, is_large = tokens <= FEW_TOKENS, len(corpus.vocabulary) >= LARGE_ALPHABET
    return {
        "n_hidden": 192 if is_large else 256,
        "dropout": 0.3 if has_few else 0.1,
        "block_size": max(16, min(64, corpus.longest_item("train") + 1)),
        "batch_size": 2 ** max(3, min(8, round(math.log2(TOKENS_PER_BATCH * corpus.sizes["train"] / tokens)))),
        "max_steps": 2000 if is_large else 5000,
        "learning_rate": 4e-3,
    }
