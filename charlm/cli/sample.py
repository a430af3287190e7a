"""`charlm sample`: texts sampled from a trained model."""

from __future__ import annotations

from typing import Annotated

import typer

from charlm._errors import UserError
from charlm.cli.common import Device, Directory, InputFile, new_console, print_samples, trained_corpus


def sample(
    directory: Directory,
    num_samples: Annotated[int, typer.Option("-n", "--num-samples", help="Number of samples.")] = 20,
    prompt: Annotated[str, typer.Option(help="Text that each sample begins with.")] = "",
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="Most characters after the prompt. Default: 100 for an item, 500 for running text."),
    ] = None,
    temperature: Annotated[float, typer.Option(help="Divisor of the logits; 0 takes the most probable.")] = 1.0,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k most probable characters.")] = None,
    top_p: Annotated[
        float | None,
        typer.Option(help="Sample among the most probable characters that together reach this probability."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Random seed; equal seeds give equal samples.")] = 1337,
    input_file: InputFile = None,
    device: Device = "cpu",
) -> None:
    """Sample from a trained model, character by character.

    Items are marked with the splits that contain them, or as new.
    """
    from charlm.lm import checkpoint
    from charlm.lm.sample import SamplingOptions
    from charlm.lm.sample import sample as draw
    from charlm.lm.train import usable_device

    options = SamplingOptions(num_samples, prompt, max_new_tokens, temperature, top_k, top_p, seed)
    saved = checkpoint.load(directory)
    target = usable_device(device)
    samples = draw(saved.build_model(target), saved.vocabulary, options, target)
    corpus = None
    if saved.vocabulary.separator:
        try:
            corpus = trained_corpus(saved, input_file)
        except UserError as error:
            if input_file is not None:
                raise
            typer.echo(f"charlm: samples are not marked as new or known: {error}", err=True)
    print_samples(new_console(), samples, "line" if saved.vocabulary.separator else "text", corpus)
