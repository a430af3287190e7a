"""`charlm eval`: the exact loss of a trained model on a split, or on another text."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from charlm.cli.common import (
    Device,
    Directory,
    Unknown,
    check_split,
    new_console,
    trained_corpus,
    unknown_characters_named,
)
from charlm.lm.errors import UserError

if TYPE_CHECKING:
    from charlm.lm.checkpoint import Checkpoint
    from charlm.lm.data import Corpus


def evaluate(
    directory: Directory,
    split: Annotated[
        str | None,
        typer.Option(help="train, dev or test; absent: dev, and all of another file.", show_default=False),
    ] = None,
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Of running text: sliding (each character from the full context before it) or fixed (windows of "
            "it side by side, as nanoGPT); absent: fixed for a gpt, sliding for the others.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    input_file: Annotated[
        Path | None,
        typer.Option(
            "-i",
            "--input-file",
            help="UTF-8 text, - for standard input: the data of the training where it is now, or another text.",
            show_default=False,
        ),
    ] = None,
    unknown: Unknown = "error",
    device: Device = "cpu",
) -> None:
    """The exact loss on a split, or on another text, in nats and bits.

    The mean over all tokens; --json has both units, and the perplexity.

    Every token weighs the same. An item's end is a token too: it stands for the newline of the file.
    """
    from charlm.lm import checkpoint
    from charlm.lm.data import WHOLE, data_name, read_text
    from charlm.lm.display import print_losses
    from charlm.lm.evaluate import baselines, evaluate_on
    from charlm.lm.examples import PROTOCOLS
    from charlm.lm.train import usable_device

    if split not in (None, WHOLE):
        check_split(split)
    saved = checkpoint.load(directory)
    target = usable_device(device)
    name = None if input_file is None else data_name(input_file)
    if name is None:
        corpus, trained_on = trained_corpus(saved, None), True
    else:
        corpus, trained_on = _corpus_of(saved, read_text(input_file), split, name)
    split = split or ("dev" if trained_on else WHOLE)
    if split not in corpus.parts:
        check_split(split)
    model = saved.build_model(target)
    with unknown_characters_named():
        result, escaped = evaluate_on(model, corpus, split, protocol, unknown, target)
    if as_json:
        of_text = {} if trained_on else {"input_file": name, "unknown_characters": escaped}
        typer.echo(json.dumps({**result.to_json(), **of_text}, allow_nan=False))
        return
    protocol = PROTOCOLS[result.protocol]
    rows = baselines(corpus, split, saved.config.add_k) if trained_on else {}
    where = split if trained_on else f"{split} of {name}, which the model was not trained on"
    unknowns = f", {escaped:,} of them unknown characters" if escaped else ""
    title = f"loss on {where}, {result.tokens:,} tokens{unknowns}, {protocol}"
    print_losses(new_console(), title, {**rows, f"this model ({saved.config.label})": result})


def _corpus_of(saved: Checkpoint, text: str, split: str | None, name: str) -> tuple[Corpus, bool]:
    """The corpus of `text`, and whether `saved` was trained on it; another text is not split unless for a `split`."""
    from charlm.lm.data import WHOLE, build_corpus, whole_corpus

    settings = {"seed": saved.config.split_seed, "dedup": saved.config.dedup, "name": name}
    with suppress(UserError):  # too short a text, say, is none that a model was trained on
        corpus = build_corpus(text, format=saved.config.format, **settings)
        if corpus.digest == saved.digest:
            return corpus, True
    if split in (None, WHOLE):
        return whole_corpus(text, saved.vocabulary, name), False
    format = "line" if saved.vocabulary.separator else "text"
    return replace(build_corpus(text, format=format, **settings), vocabulary=saved.vocabulary), False
