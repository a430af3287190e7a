"""`charlm eval`: the exact loss of a trained model on a split or on another text."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from charlm._errors import UserError
from charlm.cli.common import (
    Column,
    Device,
    Directory,
    Unknown,
    check_split,
    new_console,
    protocol_option,
    unknown_characters_named,
)
from charlm.lm.inputs import corpus_of, trained_corpus

if TYPE_CHECKING:
    from charlm.lm.checkpoint import Checkpoint
    from charlm.lm.data import Corpus


def evaluate(
    directory: Directory,
    split: Annotated[
        str | None, typer.Option(help="Split to evaluate on: train, dev or test. Default: dev, or all of another file.")
    ] = None,
    protocol: Annotated[str | None, protocol_option("fixed for a gpt, otherwise sliding")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print only a JSON object.")] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "-i",
            "--input-file",
            help="UTF-8 text file: the training data at a new path, or another text; - reads standard input.",
        ),
    ] = None,
    column: Column = None,
    unknown: Unknown = "error",
    device: Device = "cpu",
) -> None:
    """Evaluate a model on a split or another text, in nats and bits.

    The loss is the exact mean over all tokens; --json prints both units and the perplexity.

    Every token weighs the same. The end of an item is a token too and stands for the newline of the file.
    """
    from charlm.lm import checkpoint
    from charlm.lm.data import WHOLE, data_name
    from charlm.lm.display import print_losses, progress_bar
    from charlm.lm.evaluate import baselines, evaluate_on
    from charlm.lm.examples import PROTOCOLS
    from charlm.lm.sources import check_column
    from charlm.lm.train import usable_device

    if split not in (None, WHOLE):
        check_split(split)
    saved = checkpoint.load(directory)
    if column is not None:
        check_column(["column"], input_file)
        saved = replace(saved, config=replace(saved.config, column=column))
    target = usable_device(device)
    name = data_name(input_file)
    corpus, trained_on = _corpus_of(saved, input_file, split, name)
    split = split or ("dev" if trained_on else WHOLE)
    if split not in corpus.sizes:
        check_split(split)
    model = saved.build_model(target)
    with unknown_characters_named(), progress_bar(split) as report:
        result, escaped = evaluate_on(
            model, corpus, split, protocol, unknown, target, lambda done, total: report("evaluating", done, total)
        )
    if as_json:
        of_text = {} if trained_on else {"input_file": name, "unknown_characters": escaped}
        typer.echo(json.dumps({**result.to_json(), **of_text}, allow_nan=False))
        return
    rows = baselines(corpus, split, saved.config.add_k) if trained_on else {}
    where = split if trained_on else f"{split} of {name}, which the model was not trained on"
    unknowns = f", {escaped:,} of them unknown characters" if escaped else ""
    title = f"loss on {where}, {result.tokens:,} tokens{unknowns}, {PROTOCOLS[result.protocol]}"
    print_losses(new_console(), title, {**rows, f"this model ({saved.config.label})": result})


def _corpus_of(saved: Checkpoint, path: Path | None, split: str | None, name: str) -> tuple[Corpus, bool]:
    """The corpus at `path`, and whether `saved` was trained on it. Another text is split only if `split` is given."""
    from charlm.lm.cache import is_worth_it
    from charlm.lm.data import WHOLE, build_corpus, read_text, whole_corpus
    from charlm.lm.shards import load

    if path is None:
        return trained_corpus(saved, None), True
    if path.is_dir():
        prepared = load(path)
        if prepared.digest != saved.digest:
            raise UserError(f"the model was not trained on the corpus in {path}: give another text as a file")
        return prepared, True
    if is_worth_it(path):
        cached = corpus_of(saved.config, path)
        if cached.digest == saved.digest:
            return cached, True
    text = read_text(path, saved.config.column)
    settings = {"seed": saved.config.split_seed, "dedup": saved.config.dedup, "name": name}
    with suppress(UserError):  # a text that is too short, for example, cannot be the training data
        corpus = build_corpus(text, format=saved.config.format, **settings)
        if corpus.digest == saved.digest:
            return corpus, True
    if split in (None, WHOLE):
        return whole_corpus(text, saved.vocabulary, name), False
    format = "line" if saved.vocabulary.separator else "text"
    return replace(build_corpus(text, format=format, **settings), vocabulary=saved.vocabulary), False
