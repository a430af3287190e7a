"""Helpers for the tests of the language model and its commands."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from charlm.cli import app
from charlm.cli.common import prepare_streams
from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import Config
from charlm.lm.data import Corpus
from charlm.lm.models import build_model
from charlm.lm.train import StopRequest, Trainer


def untrained_checkpoint(corpus: Corpus, type: str = "mlp", **config: Any) -> Checkpoint:
    """The checkpoint of a small model of `corpus` at step 0; equal arguments give equal weights."""
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
    """The standard output of a command that succeeds."""
    result = run(*arguments, **options)
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stdout


def fails(*arguments: str | Path, **options: Any) -> str:
    """The error of a command that fails with one sentence on stderr and exit code 2."""
    result = run(*arguments, **options)
    assert result.exit_code == 2, (result.output, result.exception)
    assert result.stderr.startswith("charlm: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def run_on_own_streams(*arguments: str | Path) -> int:
    """The exit code of a command on this process's streams, which the caller may have replaced, as `main` runs it."""
    prepare_streams()
    with pytest.raises(SystemExit) as end:
        app([str(argument) for argument in arguments], prog_name="charlm")
    return end.value.code or 0


class StopAt(StopRequest):
    """A request to stop a trainer after `step`."""

    def __init__(self, trainer: Trainer, step: int) -> None:
        self.trainer, self.step = trainer, step

    @property
    def signal(self) -> int | None:
        return signal.SIGINT if self.trainer.step >= self.step else None
