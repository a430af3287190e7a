"""The models, by their name in `--type`.

Each is a `LanguageModel`: `logits, loss = model(idx, targets)` and `model.generate(idx, ...)`.
"""

from __future__ import annotations

from typing import Any

from charlm.lm.models.base import LanguageModel
from charlm.lm.models.bow import BoW
from charlm.lm.models.counts import COUNT_MODELS, Bigram, CountModel, Uniform, Unigram
from charlm.lm.models.gpt import GPT
from charlm.lm.models.mixture import Mixture
from charlm.lm.models.mlp import MLP
from charlm.lm.models.ngram import NGram
from charlm.lm.models.recurrent import GRU, LSTM, RNN
from charlm.lm.models.wavenet import WaveNet

MODELS: dict[str, type[LanguageModel]] = {
    "mlp": MLP,
    "wavenet": WaveNet,
    "bow": BoW,
    "rnn": RNN,
    "gru": GRU,
    "lstm": LSTM,
    "gpt": GPT,
    "ngram": NGram,
    **COUNT_MODELS,
}


def build_model(type: str, *, mix_ngram: int = 0, **config: Any) -> LanguageModel:
    """Builds a freshly initialized model.

    Args:
        type: A key of MODELS.
        mix_ngram: Order of the n-gram to mix the model with, see `Mixture`; 0 for none.
        config: The constructor arguments of the model.
    """
    model = MODELS[type](**config)
    return Mixture(model, mix_ngram) if mix_ngram else model


__all__ = [
    "COUNT_MODELS",
    "GPT",
    "GRU",
    "LSTM",
    "MLP",
    "MODELS",
    "RNN",
    "Bigram",
    "BoW",
    "CountModel",
    "LanguageModel",
    "Mixture",
    "NGram",
    "Uniform",
    "Unigram",
    "WaveNet",
    "build_model",
]
