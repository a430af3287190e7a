"""`--tensorboard`: the curves of a run as event files in DIR/tensorboard, which `tensorboard --logdir DIR` shows.

    loss/train, loss/dev                          as in metrics.jsonl, in nats per character
    tokens_per_second/train, tokens_per_second/dev
    learning_rate, gradient_norm                  of the step before a report of the loss on train; the norm is that
                                                  before clipping, and a sharded model has none
    samples                                       those of `--sample-every`, as text

A resumed run writes another file, which lets TensorBoard discard the points behind the step of the checkpoint; the file
of a new run discards all earlier ones, which are removed with its first checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from charlm._errors import UserError
from charlm._extras import install_command
from charlm.lm.files import naming
from charlm.lm.terminal import visible

FOLDER = "tensorboard"
CODE = "    "  # at the beginning of a line of Markdown: it is shown as it is, and not as HTML


def require_tensorboard() -> None:
    """Raises UserError unless the package tensorboard is installed."""
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise UserError(f"--tensorboard needs the package tensorboard: {install_command('tensorboard')}") from error


class TensorBoard:
    """Writes the events of a run, which starts (step 0) or resumes, if it `is_on`; removes those of an earlier run."""

    def __init__(self, directory: Path, step: int, is_on: bool) -> None:
        self._folder = directory / FOLDER
        self._earlier = [] if step else list(self._folder.glob("events.out.tfevents.*"))
        self._writer: Any = None
        if is_on:
            from torch.utils.tensorboard import SummaryWriter

            with naming(self._folder):
                self._writer = SummaryWriter(str(self._folder), purge_step=step + 1 if step else 0)

    def scalars(self, step: int, values: dict[str, float | None]) -> None:
        """Writes numbers by name to disk; None is left out."""
        if self._writer is not None:
            with naming(self._folder):
                for name, value in values.items():
                    if value is not None:
                        self._writer.add_scalar(name, value, step)
                self._writer.flush()

    def samples(self, step: int, samples: list[str]) -> None:
        """Writes texts, in which nothing is taken for HTML or Markdown."""
        if self._writer is not None:
            lines = visible("\n".join(samples), keep="\n\t").split("\n")
            self._writer.add_text("samples", "\n".join(CODE + line for line in lines), step)

    def checkpointed(self) -> None:
        """Must be called when a checkpoint of this run is on disk."""
        for path in self._earlier:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        if self._writer is not None:
            with naming(self._folder):
                self._writer.close()
