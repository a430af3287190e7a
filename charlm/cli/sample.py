"""`charlm sample`: texts sampled from a trained model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from charlm._errors import UserError
from charlm.cli.common import Device, Directory, TrainingData, new_console, print_samples
from charlm.lm.inputs import trained_corpus

IN_FILE = "FILE:"  # as in nanoGPT's --start
MOST_BYTES = 1 << 17  # of a prompt in a file: as many as Linux takes for an argument


def sample(
    directory: Directory,
    num_samples: Annotated[int, typer.Option("-n", "--num-samples", help="Number of samples.")] = 20,
    prompt: Annotated[
        str,
        typer.Option(
            help="Text that each sample begins with; FILE:PATH reads it from a UTF-8 file, FILE:- from standard input."
        ),
    ] = "",
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
    input_file: TrainingData = None,
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
    options = replace(options, prompt=_prompt_text(prompt, saved.vocabulary.separator))
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


def _prompt_text(prompt: str, is_item: bool) -> str:
    """The prompt, or the text of the file that it names; that of an item without a newline at its end.

    A prompt that begins with "FILE:" itself is given through standard input.

    Raises:
        UserError: The file cannot be read, is not UTF-8, or has more than MOST_BYTES.
    """
    from charlm.lm.data import data_name, decode_text, opened

    if not prompt.startswith(IN_FILE):
        return prompt
    path = Path(prompt.removeprefix(IN_FILE))
    with opened(path) as file:
        raw = file.read(MOST_BYTES + 1)
    if len(raw) > MOST_BYTES:
        raise UserError(f"{data_name(path)} is too long for a prompt: it has more than {MOST_BYTES:,} bytes")
    text = decode_text(raw, data_name(path))
    return text.removesuffix("\n") if is_item else text
