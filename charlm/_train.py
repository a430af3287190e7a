"""`charlm.train`, which imports the language model only when it is called."""

from __future__ import annotations

from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from charlm.lm.character_model import CharacterModel


def train(
    documents: Iterable[str],
    directory: str | PathLike[str],
    *,
    type: str = "mlp",
    separator: str = "\n",
    overwrite: bool = False,
    **options: Any,
) -> CharacterModel:
    """Trains a language model on documents from any source, of any total size, in this process.

    The documents are read once. Their tokens are written to the folder `directory` + "-corpus", as `charlm prepare`
    does, so that `charlm train -o DIRECTORY --resume` and the other commands find them.

    Args:
        documents: the documents, such as a column of a Hugging Face dataset; short lines without spaces are items.
        directory: the folder for the checkpoint and the metrics.
        type: the model type, as in `charlm train --type`.
        separator: the text between two documents, where the first does not end with it.
        overwrite: whether a run in the folder, and its corpus, are replaced.
        options: fields of `charlm.lm.config.Config`, which are the options of `charlm train`: max_steps=100.

    Returns:
        The best model on dev.

    Raises:
        charlm.UserError: the documents are too few, an option is out of its range, or the folder is in use.
        ImportError: the extra `lm` is not installed.

    Example:
        >>> import charlm
        >>> model = charlm.train(["emma", "olivia", "ava", "mia", "luca"], "names", max_steps=10)
    """
    from dataclasses import replace

    from charlm._errors import UserError
    from charlm._load import load
    from charlm.lm import checkpoint, shards
    from charlm.lm.config import Config, check_options
    from charlm.lm.files import locked
    from charlm.lm.prepare import Options, prepare_documents
    from charlm.lm.processes import Launch
    from charlm.lm.train import Trainer

    unknown = sorted(set(options) - set(Config.names()) | {"input_file"} & set(options))
    if unknown:
        raise UserError(f"unknown options: {', '.join(unknown)}")
    if isinstance(documents, str):
        raise TypeError("train() takes an iterable of documents, not str")
    if Launch.from_environment().size > 1:
        raise UserError(
            "train() trains in one process: write the documents with `charlm prepare`, and train on them with "
            "torchrun -m charlm train -i DIR"
        )
    config = Config.of_type(type, **options)
    check_options(type, options)
    run = Path(directory).resolve()
    corpus_folder = run.with_name(f"{run.name}-corpus")
    with locked(run):
        if foreign := checkpoint.foreign_files(run):
            raise UserError(
                f"{run} contains files that charlm did not write, such as {foreign[0]}: choose another folder"
            )
        for folder, found in ((run, checkpoint.exists(run)), (corpus_folder, corpus_folder.exists())):
            if found and not overwrite:
                raise UserError(f"{folder} is that of an earlier run: overwrite=True replaces it")
        split = Options(config.format, config.split_seed, config.dedup)
        prepare_documents(documents, corpus_folder, split, separator=separator, overwrite=overwrite)
        corpus = shards.load(corpus_folder)
        config = replace(config, input_file=str(corpus_folder), format=corpus.format)
        Trainer(config, corpus, run).run()
    return load(run, config.device)
