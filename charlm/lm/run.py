"""A training run, as `charlm.train` returns it: the model, the history of its losses, and the folder of both."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.character_model import CharacterModel
from charlm.lm.config import Config
from charlm.lm.corpus import Corpus
from charlm.lm.diagnostics import DIAGNOSTICS
from charlm.lm.evaluate import Evaluation
from charlm.lm.files import write_atomically
from charlm.lm.metrics import CSV, METRICS, read_metrics
from charlm.lm.start import claimed

if TYPE_CHECKING:
    from pandas import DataFrame


class History(list[dict[str, Any]]):
    """The losses of a run in the order of the steps, a dict for each report.

    The keys are "step"; "split", "train" or "dev"; "nats" and "bits", the loss per character; "tokens_per_second", the
    speed of training or of the evaluation. The loss on train is the mean over the batches since the last report, with
    dropout.
    """

    def to_pandas(self) -> DataFrame:
        """The records as a pandas.DataFrame of a row each.

        Raises:
            UserError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise UserError("to_pandas() needs pandas: pip install pandas") from error
        return pandas.DataFrame(list(self))


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """A training run.

    Attributes:
        directory: The folder of its checkpoint and metrics. Without a `directory` given to `charlm.train` it is
            temporary, and removed with the last reference to the run; `save` keeps it.
        model: The best model on dev, as `charlm.load(directory)` returns it.
        history: The losses.
        corpus: The data with its splits.
        step: The number of steps done.
        finished: Whether training came to its end; False after an interrupt.
        evaluation: The loss of `model` on all of dev, without dropout; None if training, or the evaluation itself, was
            interrupted.
    """

    directory: Path
    model: CharacterModel
    history: History
    corpus: Corpus
    step: int
    finished: bool
    evaluation: Evaluation | None

    @classmethod
    def read(cls, directory: Path, device: str, corpus: Corpus, finished: bool, evaluation: Evaluation | None) -> Run:
        """The run whose checkpoint is in `directory`, with its model on `device`."""
        saved = checkpoint.load(directory)
        history = History(read_metrics(directory))
        return cls(directory, CharacterModel(saved, device), history, corpus, saved.step, finished, evaluation)

    @property
    def config(self) -> Config:
        """The options of the run."""
        return self.model.config

    def save(self, directory: str | PathLike[str], *, overwrite: bool = False) -> None:
        """Copies the run to another folder, which `charlm.load`, `charlm.train(resume=True)` and the commands read.

        Args:
            directory: The folder to create.
            overwrite: Whether a run in it is replaced.

        Raises:
            UserError: The folder contains something else, or a run and `overwrite` is False.
        """
        target = Path(directory).resolve()
        with claimed(target, resume=False, overwrite=overwrite):
            saved = checkpoint.load(self.directory)
            data = None if saved.config.input_file is None else Path(saved.config.input_file)
            if data is not None and data.is_relative_to(self.directory):
                write_atomically(target / data.name, data.read_bytes())
                saved = replace(saved, config=replace(saved.config, input_file=str(target / data.name)))
            elif data == corpus_folder(self.directory):
                if corpus_folder(target).exists():
                    raise UserError(f"{corpus_folder(target)} exists: choose another folder")
                shutil.copytree(data, corpus_folder(target))
                saved = replace(saved, config=replace(saved.config, input_file=str(corpus_folder(target))))
            checkpoint.save(target, saved)
            remove_other_documents(target, saved.config)
            for name in (METRICS, CSV, DIAGNOSTICS):
                if (self.directory / name).exists():
                    write_atomically(target / name, (self.directory / name).read_bytes())
                else:  # that of a run that was replaced
                    (target / name).unlink(missing_ok=True)

    def report(self, path: str | PathLike[str] = "report.html") -> Path:
        """Writes a report of the run, with curves, samples and figures, as one HTML file.

        Args:
            path: The file; not in `directory` where that is temporary.

        Returns:
            The path of the file.

        Raises:
            UserError: A package that draws the report is not installed; the message says how to install it.
        """
        from charlm import report

        return report.write([self.directory], path)

    def __repr__(self) -> str:
        loss = self.model.best_nats if self.evaluation is None else self.evaluation.nats
        state = "finished" if self.finished else "not finished"
        on_dev = "not evaluated" if loss is None else f"{loss:.4f} nats per character on dev"
        return f"<charlm run: {self.config.label}, {self.step:,} steps, {state}, {on_dev}; in {self.directory}>"


def corpus_folder(directory: Path) -> Path:
    """The folder of the prepared documents of the run in `directory`."""
    return directory.with_name(f"{directory.name}-corpus")


def remove_other_documents(directory: Path, config: Config) -> None:
    """Removes the documents in `directory` that are not the data of its run."""
    for path in directory.glob("documents-*.txt"):
        if str(path) != config.input_file:
            path.unlink()
