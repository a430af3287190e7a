"""Shared by the tests of the language model and of its commands: a checkpoint without training, what a command says."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import torch
from typer.testing import CliRunner

from charlm.cli import app
from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import Config
from charlm.lm.data import Corpus
from charlm.lm.models import build_model
from charlm.lm.train import StopRequest, Trainer


def untrained_checkpoint(corpus: Corpus, type: str = "mlp", **config: Any) -> Checkpoint:
    """What saving at step 0 would write: a small model of `corpus`; the same weights for the same arguments."""
    settings = Config(**{"type": type, "format": corpus.format, "block_size": 4, "n_embd": 3, "n_hidden": 8, **config})
    arguments = settings.model_config(len(corpus.vocabulary), corpus.vocabulary.pad_token)
    torch.manual_seed(3)
    model = build_model(**arguments)
    return Checkpoint(
        step=0,
        config=settings,
        model=arguments,
        vocabulary=corpus.vocabulary,
        digest=corpus.digest,
        best_step=None,
        best_nats=None,
        weights=model.state_dict(),
        training={"random.cpu": torch.get_rng_state()},
    )


def run(*arguments: str | Path, **options: Any):
    return CliRunner().invoke(app, [str(argument) for argument in arguments], **options)


def succeeds(*arguments: str | Path, **options: Any) -> str:
    """Standard output of a command that ends well."""
    result = run(*arguments, **options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fails(*arguments: str | Path, **options: Any) -> str:
    """The one sentence that an error is."""
    result = run(*arguments, **options)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("charlm: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


class StopAt(StopRequest):
    """A request that comes when `step` is reported, or at the first look at the loop if that is None."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    @property
    def signal(self) -> int | None:
        return signal.SIGINT if self.trainer.step >= self.step else None
