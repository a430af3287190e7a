"""`charlm eval`: the exact loss of a trained model on a split."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from charlm.cli.common import Device, Directory, InputFile, check_split, new_console, trained_corpus


def evaluate(
    directory: Directory,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "dev",
    protocol: Annotated[
        str | None,
        typer.Option(
            help="Of running text: sliding (each character from the full context before it) or fixed (windows of "
            "it side by side, as nanoGPT); absent: fixed for a gpt, sliding for the others.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")] = False,
    input_file: InputFile = None,
    device: Device = "cpu",
) -> None:
    """The exact loss on a split, in nats and bits.

    The mean over all tokens; --json has both units, and the perplexity.

    Every token weighs the same. An item's end is a token too: it stands for the newline of the file.
    """
    from charlm.lm import checkpoint
    from charlm.lm.display import print_losses
    from charlm.lm.evaluate import baselines, predictions
    from charlm.lm.evaluate import evaluate as measure
    from charlm.lm.examples import PROTOCOLS
    from charlm.lm.train import usable_device

    check_split(split)
    saved = checkpoint.load(directory)
    target = usable_device(device)
    corpus = trained_corpus(saved, input_file)
    model = saved.build_model(target)
    result = measure(model, predictions(model, corpus, split, protocol).to(target), split)
    if as_json:
        typer.echo(json.dumps(result.to_json(), allow_nan=False))
        return
    rows = {**baselines(corpus, split, saved.config.add_k), f"this model ({saved.config.label})": result}
    print_losses(new_console(), f"loss on {split}, {result.tokens:,} tokens, {PROTOCOLS[result.protocol]}", rows)
