"""The character language model: data, models, training, evaluation, sampling, checkpoints.

`import charlm` does not import this package, and this package imports what its names need when they are used. Losses
are in nats per character unless a name says otherwise.

    build_corpus, read_corpus     a text or a file: its vocabulary, and its splits train, dev and test
    build_model, MODELS           the networks and the count models, such as MLP
    Config, Trainer, Run          the options of a run, its loop, and what `charlm.train` returns
    build_optimizer, learning_rate_at
    predictions, evaluate_on      the predictions of a split; a model's loss on them
    SamplingOptions               how `charlm.lm.sample.sample` draws texts
    CharacterModel                what `charlm.load` returns

A module may have the name of its function: `charlm.lm.evaluate.evaluate`, `charlm.lm.sample.sample`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from charlm._extras import require_lm

require_lm()

if TYPE_CHECKING:
    from charlm.lm import checkpoint, data, evaluate, models, sample, train
    from charlm.lm.character_model import CharacterModel
    from charlm.lm.checkpoint import Checkpoint
    from charlm.lm.config import Config
    from charlm.lm.corpus import Corpus
    from charlm.lm.data import build_corpus, read_corpus
    from charlm.lm.evaluate import Evaluation, baselines, evaluate_on, predictions, surprisals
    from charlm.lm.examples import Examples, Sequences
    from charlm.lm.models import GPT, MLP, MODELS, LanguageModel, NGram, WaveNet, build_model
    from charlm.lm.optimizer import build_optimizer, learning_rate_at
    from charlm.lm.run import History, Run
    from charlm.lm.sample import SamplingOptions
    from charlm.lm.train import Trainer
    from charlm.lm.vocabulary import Vocabulary

_NAMES = {
    "character_model": ("CharacterModel",),
    "checkpoint": ("Checkpoint",),
    "config": ("Config",),
    "corpus": ("Corpus",),
    "data": ("build_corpus", "read_corpus"),
    "evaluate": ("Evaluation", "baselines", "evaluate_on", "predictions", "surprisals"),
    "examples": ("Examples", "Sequences"),
    "models": ("GPT", "MLP", "MODELS", "LanguageModel", "NGram", "WaveNet", "build_model"),
    "optimizer": ("build_optimizer", "learning_rate_at"),
    "run": ("History", "Run"),
    "sample": ("SamplingOptions",),
    "train": ("Trainer",),
    "vocabulary": ("Vocabulary",),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}
_MODULES = ("checkpoint", "data", "evaluate", "models", "sample", "train")

__all__ = [  # noqa: RUF022  (pyright reads literal names only)
    "CharacterModel", "Checkpoint", "Config", "Corpus", "Evaluation", "Examples", "GPT", "History", "LanguageModel",
    "MLP", "MODELS", "NGram", "Run", "SamplingOptions", "Sequences", "Trainer", "Vocabulary", "WaveNet", "baselines",
    "build_corpus", "build_model", "build_optimizer", "checkpoint", "data", "evaluate", "evaluate_on",
    "learning_rate_at", "models", "predictions", "read_corpus", "sample", "surprisals", "train",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_module(f"charlm.lm.{name}")
    if name in _MODULE_OF:
        return getattr(import_module(f"charlm.lm.{_MODULE_OF[name]}"), name)
    raise AttributeError(f"module 'charlm.lm' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *globals()})
