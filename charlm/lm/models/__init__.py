"""The models by the name that `--type` takes.

Each is a `LanguageModel`: `logits, loss = model(idx, targets)` and `model.generate(idx, ...)`.
"""

from __future__ import annotations

from typing import Any

from charlm.lm.models.base import LanguageModel
from charlm.lm.models.counts import COUNT_MODELS, Bigram, CountModel, Uniform, Unigram
from charlm.lm.models.gpt import GPT
from charlm.lm.models.mixture import Mixture
from charlm.lm.models.mlp import MLP
from charlm.lm.models.ngram import NGram
from charlm.lm.models.wavenet import WaveNet

MODELS: dict[str, type[LanguageModel]] = {"mlp": MLP, "wavenet": WaveNet, "gpt": GPT, "ngram": NGram, **COUNT_MODELS}


def build_model(type: str, *, mix_ngram: int = 0, **config: Any) -> LanguageModel:
    """The model `type` (a key of MODELS), freshly initialised; `config` is what its constructor takes.

    mix_ngram: order of an n-gram that it is mixed with, see `Mixture`; 0 for none.
    """
    model = MODELS[type](**config)
    return Mixture(model, mix_ngram) if mix_ngram else model


__all__ = [
    "COUNT_MODELS",
    "GPT",
    "MLP",
    "MODELS",
    "Bigram",
    "CountModel",
    "LanguageModel",
    "Mixture",
    "NGram",
    "Uniform",
    "Unigram",
    "WaveNet",
    "build_model",
]
