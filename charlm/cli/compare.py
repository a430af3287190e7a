"""`charlm compare`: a table of trained models and baselines on one split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from charlm._errors import UserError
from charlm.cli.common import Device, TrainingData, check_split, new_console
from charlm.lm.inputs import trained_corpus

if TYPE_CHECKING:
    from charlm.lm.checkpoint import Checkpoint


def compare(
    directories: Annotated[list[Path], typer.Argument(help="Folders of trained models, written by `charlm train -o`.")],
    baselines: Annotated[bool, typer.Option("--baselines", help="Include the uniform to bigram baselines.")] = False,
    split: Annotated[str, typer.Option(help="Split to evaluate on: train, dev or test.")] = "dev",
    as_json: Annotated[bool, typer.Option("--json", help="Print only a JSON object, with losses in nats.")] = False,
    input_file: TrainingData = None,
    device: Device = "cpu",
) -> None:
    """Compare trained models on one split, in nats and bits.

    ± is one standard error of the mean in nats, over items or over blocks of 256 characters of running text.

    The seconds are the time of this evaluation, not of training.
    """
    from charlm.lm import checkpoint
    from charlm.lm.display import print_comparison
    from charlm.lm.evaluate import measure, measure_baselines, units_of
    from charlm.lm.train import usable_device

    check_split(split)
    target = usable_device(device)
    saved = {str(directory): checkpoint.load(directory) for directory in directories}
    _check_same_data(saved)
    first = next(iter(saved.values()))
    corpus = trained_corpus(first, input_file)
    rows = measure_baselines(corpus, split, first.config.add_k) if baselines else []
    for name, run in saved.items():
        rows.append(measure(name, run.config.label, run.build_model(target), corpus, split, target))
    units = units_of(corpus.format)
    if as_json:
        models = [row.to_json() for row in rows]
        head = {"split": split, "tokens": rows[0].evaluation.tokens, "standard_error_over": units}
        typer.echo(json.dumps({**head, "models": models}, allow_nan=False))
    else:
        print_comparison(new_console(), rows, units)


def _check_same_data(saved: dict[str, Checkpoint]) -> None:
    (first, expected), *others = saved.items()
    for name, run in others:
        if run.digest != expected.digest:
            raise UserError(f"{name} was trained on other data, or another split of it, than {first}")
