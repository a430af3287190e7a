"""`charlm compare`: trained models, and the baselines, in one table on one split."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from charlm.cli.common import Device, InputFile, check_split, new_console, trained_corpus
from charlm.lm.errors import UserError

if TYPE_CHECKING:
    from charlm.lm.checkpoint import Checkpoint


def compare(
    directories: Annotated[list[Path], typer.Argument(help="Folders that `charlm train -o` wrote.")],
    baselines: Annotated[bool, typer.Option("--baselines", help="The models that count as well.")] = False,
    split: Annotated[str, typer.Option(help="train, dev or test.")] = "dev",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else; nats.")] = False,
    input_file: InputFile = None,
    device: Device = "cpu",
) -> None:
    """Trained models on one split, in nats and bits.

    ± is one standard error of the mean, in nats: over items, or over blocks of
    256 characters of running text.

    The seconds are of this evaluation, not of the training.
    """
    from charlm.lm import checkpoint
    from charlm.lm.compare import measure, measure_baselines, units_of
    from charlm.lm.display import print_comparison
    from charlm.lm.train import usable_device

    check_split(split)
    target = usable_device(device)
    saved = {str(directory): checkpoint.load(directory) for directory in directories}
    _check_same_data(saved)
    first = next(iter(saved.values()))
    corpus = trained_corpus(first, input_file)
    rows = measure_baselines(corpus, split, first.config.add_k) if baselines else []
    for name, one in saved.items():
        rows.append(measure(name, one.config.label, one.build_model(target), corpus, split, target))
    units = units_of(corpus.format)
    if as_json:
        models = [row.to_json() for row in rows]
        head = {"split": split, "tokens": rows[0].evaluation.tokens, "standard_error_over": units}
        typer.echo(json.dumps({**head, "models": models}, allow_nan=False))
    else:
        print_comparison(new_console(), rows, units)


def _check_same_data(saved: dict[str, Checkpoint]) -> None:
    (first, expected), *others = saved.items()
    for name, one in others:
        if one.digest != expected.digest:
            raise UserError(f"{name} was trained on other data, or another split of it, than {first}")
