"""The page of a report: one HTML file with everything in it, from the numbers of `data` and the `figures`.

All text goes through Jinja's escapes, and the JSON of the figures has no "<". A content security policy allows the
page's own scripts alone, by their hashes, and no network.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Callable
from importlib.resources import files
from typing import Any

from charlm.lm.display import ITEM_END, LEGEND_STEPS, glyph, heat
from charlm.lm.evaluate import Comparison, units_of
from charlm.lm.examples import PROTOCOLS
from charlm.lm.terminal import visible
from charlm.report import figures
from charlm.report.data import Report, Run

PACKAGES = ("plotly", "jinja2")  # the extra `report`
LONGEST = 400  # characters of an item that are shown


def render(report: Report) -> str:
    """The page as HTML."""
    import jinja2
    from plotly.offline import get_plotlyjs

    sections = build_sections(report)
    drawn = figures.drawn(
        part for _, _, groups in sections for _, parts in groups for part in parts if isinstance(part, figures.Figure)
    )
    here = files("charlm.report")
    scripts = [get_plotlyjs(), here.joinpath("page.js").read_text(encoding="utf-8")]
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["visible"] = visible
    template = environment.from_string(here.joinpath("page.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        sections=sections,
        figures=script_json(drawn),
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
    if isinstance(value, list):
        return [_finite(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value


def build_sections(report: Report) -> list[tuple[str, str, list[tuple[str | None, list[Any]]]]]:
    """(id, title, groups) of each section; a group has the name of a run or None, and its parts.

    A part is a Figure, a sentence, or a dictionary whose "kind" says what the template makes of it.
    """

    def of_runs(parts: Callable[[Run, str], list[Any]]) -> list[tuple[str | None, list[Any]]]:
        runs = enumerate(report.runs)
        return [(run.name if len(report.runs) > 1 else None, parts(run, f"run-{index}")) for index, run in runs]

    losses: list[Any] = [figure for figure in [figures.losses(report)] if figure]
    without = [run.name for run in report.runs if not any(run.losses.values())]
    losses += [f"{name} has no metrics: its metrics.jsonl is missing, empty or damaged." for name in without]
    return [
        ("loss", "Loss", [(None, losses)]),
        ("models", "Models on dev", [(None, [table(report)])]),
        ("predictability", "Predictability", [(None, [figures.entropies(report)])]),
        ("calibration", "Calibration", [(None, [figures.reliability(report)])]),
        ("embedding", "Embedding", of_runs(lambda run, id: [figures.embedding(report, run, f"{id}-embedding")])),
        ("bigrams", "Bigrams", of_runs(lambda run, id: figures.bigrams(report, run, f"{id}-bigrams"))),
        ("training", "Inside the network", of_runs(lambda run, id: figures.diagnostics(run, id) or [no_records(run)])),
        ("surprisal", "Surprisal", of_runs(lambda run, id: [surprisals(report, run)])),
        ("samples", "Samples", of_runs(lambda run, id: [{"kind": "samples", "texts": run.samples}])),
    ]


def no_records(run: Run) -> str:
    """Why a run has no diagnostics."""
    if not run.rates:
        return f"A model of type {run.row.type} is not trained step by step."
    return "The run has no diagnostics: it was trained with --no-diagnostics, in shards, or by an earlier charlm."


def table(report: Report) -> dict[str, Any]:
    """The table of all models, the best last."""

    def cells(row: Comparison) -> list[str]:
        of, error = row.evaluation, "–" if math.isnan(row.standard_error) else f"{row.standard_error:.4f}"
        loss = [f"{of.nats:.4f}", error, f"{of.bits_per_char:.4f}", f"{of.perplexity:.3f}"]
        name = row.name if row.name == row.type else f"{row.name} ({row.type})"
        return [name, *loss, f"{row.parameters:,}", PROTOCOLS[of.protocol]]

    rows = sorted([*report.baselines, *(run.row for run in report.runs)], key=lambda row: -row.evaluation.nats)
    caption = (
        f"Loss on {report.tokens['dev'][0]:,} tokens of dev, in nats and bits per character; ± is one standard error "
        f"of the nats, over {units_of(report.format)}. The baselines are counted on {report.tokens['train'][0]:,} "
        "tokens of train."
    )
    header = ["model", "nats", "±", "bits", "perplexity", "parameters", "context"]
    return {"kind": "table", "caption": caption, "table": [header, *map(cells, rows)]}


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
