"""`charlm.train`, which imports the language model only when it is called."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlm.lm.run import Run


def train(
    data: str | PathLike[str] | Iterable[str] | None = None,
    directory: str | PathLike[str] | None = None,
    *,
    type: str | None = None,
    separator: str = "\n",
    resume: bool = False,
    overwrite: bool = False,
    force: bool = False,
    no_cache: bool = False,
    no_diagnostics: bool = False,
    tensorboard: bool = False,
    threads: int | None = None,
    memory: int | str | None = None,
    sample_every: int = 0,
    progress: bool = True,
    **options: Any,
) -> Run:
    """Trains a language model in this process; the options are those of `charlm train`.

    An interrupt (Ctrl-C, or the stop button of a notebook) ends training after the current step, saves its state and
    returns the run, with `finished` False; a second one raises KeyboardInterrupt at once. After SIGTERM or SIGHUP the
    state is saved, and the program then gets the signal.

    Args:
        data: A path (str or PathLike) of what `charlm train -i` takes: a UTF-8 text file or a folder of `charlm
            prepare`. Or an iterable of str: items such as names, or documents, which are joined; it is read once and
            may be larger than memory. A single text is [text]. None is the shipped names, or the data of the resumed
            run.
        directory: The folder for the checkpoint, the metrics and the documents; a large iterable is prepared in the
            folder `directory` + "-corpus". None is a temporary folder, which lasts as long as the run that is returned;
            `Run.save` keeps it.
        type: The model type, such as "gpt". None chooses it for the data, or is that of the resumed run.
        separator: The text between two documents, where the first does not end with it.
        resume: Whether to continue the run in `directory`; `max_steps` may be larger than before.
        overwrite: Whether a run in `directory`, and its prepared documents, are replaced.
        force: Whether to train even if the memory may not suffice.
        no_cache: Whether a large file is read into memory instead of preparing it once in the cache.
        no_diagnostics: Whether not to record activations, gradients and updates for the report.
        tensorboard: Whether the losses and samples are also written for TensorBoard, into `directory`/tensorboard.
        threads: Number of CPU threads of this run; None is torch's current number.
        memory: Most memory for counting the n-grams of type "ngram", in bytes or as "2GB".
        sample_every: Number of steps between samples that are printed; 0 for none.
        progress: Whether the data, the model and a progress bar are shown.
        options: Other options of `charlm train`, with underscores: max_steps=100, n_embd=64, device="cuda". They are
            the fields of `charlm.lm.config.Config`.

    Returns:
        A `charlm.lm.run.Run`: `run.model` is the best model on dev, `run.history` the losses.

    Raises:
        charlm.UserError: The data are too few or cannot be read, an option does not exist or is out of its range, or
            the folder is in use.
        TypeError: A document is not a str, or `data` is neither a path nor an iterable.
        ImportError: The extra `lm` is not installed.

    Example:
        >>> import charlm
        >>> run = charlm.train(["emma", "olivia", "ava", "mia", "luca"], max_steps=10, progress=False)
        >>> run.model.generate("e", num_samples=2)
        >>> run.history[-1]["nats"]
    """
    from charlm.lm.config import RunOptions
    from charlm.lm.train_run import train_run

    given = {**options, **({} if type is None else {"type": type})}
    others = RunOptions(
        resume=resume,
        overwrite=overwrite,
        force=force,
        no_cache=no_cache,
        no_diagnostics=no_diagnostics,
        tensorboard=tensorboard,
        sample_every=sample_every,
        threads=threads,
        memory=None if memory is None else str(memory),
    )
    return train_run(data, directory, separator, progress, given, others)
