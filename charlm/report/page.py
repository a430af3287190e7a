"""The page of a report: one HTML file with everything in it, from the numbers of `data` and the `figures`.

All text goes through Jinja's escapes, and the JSON of the figures has no "<". A content security policy allows the
page's own scripts alone, by their hashes, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from importlib.resources import files
from importlib.util import find_spec
from typing import Any

from charlm._errors import UserError
from charlm._extras import install_command
from charlm.lm.display import ITEM_END, glyph, heat
from charlm.lm.evaluate import Comparison, units_of
from charlm.lm.examples import PROTOCOLS
from charlm.lm.terminal import visible
from charlm.report import figures
from charlm.report.data import Report, Run
from charlm.report.figures import number

PACKAGES = ("plotly", "jinja2")  # the extra `report`
LONGEST = 400  # characters of an item that are shown
LEGEND_STEPS = 5


def require_packages() -> None:
    """Raises UserError unless the packages of the extra `report` are installed."""
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(
            f"a report needs {' and '.join(missing)}, which the extra report installs: {install_command('report')}"
        )


def render(report: Report) -> str:
    """The page as HTML."""
    import jinja2
    from plotly.offline import get_plotlyjs

    sections = build_sections(report)
    parts = [part for section in sections for _, found in section["groups"] for part in found]
    here = files("charlm.report")
    scripts = [get_plotlyjs(), here.joinpath("page.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"visible": visible, "number": number}
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        sections=sections,
        facts=facts(report),
        figures=script_json(figures.all_figures(parts)),
        scripts=scripts,
        hashes=[base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts],
    )


def script_json(value: Any) -> str:
    """`value` as JSON that cannot end the script element that it is in; a number that JSON does not have is null."""
    text = json.dumps(_finite(value), allow_nan=False)  # ASCII
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def facts(report: Report) -> list[str]:
    """What the report is of, in sentences."""
    unit = "items" if report.format == "line" else "characters"
    sizes = ", ".join(f"{name} {size:,}" for name, size in report.sizes.items())
    found = [f"Data: {visible(report.source)}; {sizes} {unit}; {len(report.vocabulary):,} tokens."]
    for name, what in (
        ("train", "The last {} of the {} tokens of train are counted"),
        ("dev", "The first {} of the {} tokens of dev are predicted"),
    ):
        measured, all = report.tokens[name]
        if measured < all:
            found.append(f"{what.format(f'{measured:,}', f'{all:,}')}.")
    for run in report.runs:
        best = (
            ""
            if run.saved.best_nats is None
            else f", best on dev {run.saved.best_nats:.4f} nats at step {run.saved.best_step}"
        )
        found.append(
            f"{visible(run.name)}: {run.row.type}, {run.row.parameters:,} parameters, step {run.saved.step}{best}."
        )
        if run.damaged_lines:
            found.append(
                f"{visible(run.name)}: {run.damaged_lines} lines of its logs are damaged or without a finite "
                "number, and are left out."
            )
    return found


def build_sections(report: Report) -> list[dict[str, Any]]:
    """The sections: id, title and parts, by run where they are of one; a part is a Figure or a dictionary."""
    runs = list(enumerate(report.runs))

    def section(id: str, title: str, *groups: tuple[str | None, list[Any]]) -> dict[str, Any]:
        return {"id": id, "title": title, "groups": groups}

    def of_runs(parts: Any) -> list[tuple[str | None, list[Any]]]:
        return [(run.name if len(runs) > 1 else None, parts(run, index)) for index, run in runs]

    loss = figures.losses(report)
    without = [run.name for run in report.runs if not any(run.losses.values())]
    notes = [
        note(f"{visible(name)} has no metrics: its metrics.jsonl is missing, empty or damaged.") for name in without
    ]
    return [
        section("loss", "Loss", (None, [*([loss] if loss else []), *notes])),
        section("models", "Models on dev", (None, [table(report)])),
        section("predictability", "Predictability", (None, [figures.entropies(report)])),
        section("calibration", "Calibration", (None, [figures.reliability(report)])),
        section(
            "embedding",
            "Embedding",
            *of_runs(
                lambda run, index: [
                    figures.embedding(report, run, f"embedding-{index}")
                    or note(f"A model of type {run.row.type} has no embedding.")
                ]
            ),
        ),
        section("bigrams", "Bigrams", *of_runs(lambda run, index: figures.bigrams(report, run, f"bigrams-{index}"))),
        section(
            "training",
            "Inside the network",
            *of_runs(lambda run, index: figures.diagnostics(run, f"training-{index}") or [no_records(run)]),
        ),
        section("surprisal", "Surprisal", *of_runs(lambda run, index: [surprisals(report, run)])),
        section("samples", "Samples", *of_runs(lambda run, index: [{"kind": "samples", "items": run.samples}])),
    ]


def note(text: str) -> dict[str, Any]:
    return {"kind": "note", "text": text}


def no_records(run: Run) -> dict[str, Any]:
    """Why a run has no diagnostics."""
    if not run.rates:
        return note(f"A model of type {run.row.type} is not trained step by step.")
    return note("The run has no diagnostics: it was trained with --no-diagnostics, in shards, or by an earlier charlm.")


def table(report: Report) -> dict[str, Any]:
    """The table of all models, the best last."""

    def cells(row: Comparison) -> list[str]:
        nats, error = row.evaluation.nats, row.standard_error
        loss = [f"{nats:.4f}", "–" if math.isnan(error) else f"{error:.4f}", f"{row.evaluation.bits_per_char:.4f}"]
        name = row.name if row.name == row.type else f"{row.name} ({row.type})"
        return [
            name,
            *loss,
            f"{row.evaluation.perplexity:.3f}",
            f"{row.parameters:,}",
            PROTOCOLS[row.evaluation.protocol],
        ]

    rows = sorted([*report.baselines, *(run.row for run in report.runs)], key=lambda row: -row.evaluation.nats)
    caption = (
        f"Loss on {report.tokens['dev'][0]:,} tokens of dev, in nats and bits per character; ± is one standard error "
        f"of the nats, over {units_of(report.format)}. The baselines are counted on {report.tokens['train'][0]:,} "
        "tokens of train."
    )
    header = ("model", "nats", "±", "bits", "perplexity", "parameters", "context")
    return {"kind": "table", "caption": caption, "header": header, "rows": [cells(row) for row in rows]}


def surprisals(report: Report, run: Run) -> dict[str, Any]:
    """The passages of dev with the colour of each character."""
    most = max(1.0, math.log2(len(report.vocabulary)))
    end = [ITEM_END] if report.format == "line" else []
    found = []
    for passage in run.passages:
        bits = passage.bits[:LONGEST]
        names = [glyph(character) for character in [*passage.text, *end][:LONGEST]]
        worst = max(range(len(bits)), key=bits.__getitem__)
        found.append(
            {
                "text": visible(passage.text[:LONGEST], keep="\n"),
                "mean": sum(passage.bits) / len(passage.bits),
                "worst": f"{names[worst]} with {bits[worst]:.1f} bits",
                "cells": [(name, f"{b:.1f}", tint(b / most)) for name, b in zip(names, bits, strict=True)],
            }
        )
    steps = [most * step / (LEGEND_STEPS - 1) for step in range(LEGEND_STEPS)]
    legend = [(f"{bits:.1f}", tint(bits / most)) for bits in steps]
    return {"kind": "surprisals", "passages": found, "legend": legend, "size": len(report.vocabulary)}


def tint(share: float) -> str:
    """The colour of `charlm score` as "#rrggbb"."""
    background = heat(share).bgcolor
    assert background is not None
    return background.get_truecolor().hex
