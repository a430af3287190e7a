"""The figures of a report, as Plotly's traces and layouts: plain dictionaries, made from the numbers of `data`.

Colours are names of the page's CSS variables, such as "var(--c0)", which the page's script replaces by the colour of
the reader's theme; so are the colour scales "sequential" and "diverging". Plotly reads a text as HTML: what comes from
a corpus or a folder's name goes through `plain`.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from charlm.lm.diagnostics import SATURATED
from charlm.lm.display import ITEM_END, glyph
from charlm.lm.terminal import visible
from charlm.lm.vocabulary import Vocabulary
from charlm.report.data import Report, Run

COLOURS = 6  # of runs
MOST_ROWS = 40  # of a table of numbers
MOST_LINES = 12  # parameters whose gradients are drawn; of a larger network the weight matrices
TARGET = -3  # log10 of the ratio of update to weight that makemore's lecture aims at
Numbers = Sequence[float | None]


@dataclass(frozen=True)
class Figure:
    """A figure: its caption, a sentence that replaces it, what Plotly draws, and a table of its numbers."""

    id: str
    caption: str
    alt: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any]
    columns: dict[str, Sequence[Any]]
    kind: ClassVar[str] = "figure"

    @property
    def rows(self) -> list[list[str]]:
        """The rows of the table of numbers, at most MOST_ROWS at equal distances."""
        rows = list(zip(*self.columns.values(), strict=True))
        return [[number(cell) for cell in row] for row in rows[:: -(-len(rows) // MOST_ROWS) or 1]]


def plain(text: str) -> str:
    """`text` as Plotly shows it literally, with control characters escaped."""
    return html.escape(visible(text), quote=False)


def number(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def token_name(vocabulary: Vocabulary, token: int) -> str:
    """A visible name of a token."""
    return ITEM_END if token == vocabulary.stop_token else glyph(vocabulary.itos[token])


def line(x: Sequence[float], y: Numbers, name: str, colour: str, **options: Any) -> dict[str, Any]:
    style = {"color": colour, "dash": options.pop("dash", "solid"), "width": options.pop("width", 2)}
    return {"type": "scatter", "mode": "lines", "x": x, "y": y, "name": plain(name), "line": style, **options}


def axis(title: str, **options: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **options}


def colour(index: int) -> str:
    return f"var(--c{index % COLOURS})"


def depth_colour(index: int, count: int) -> str:
    """The colour of layer `index` of `count`, from blue to red through violet."""
    return f"hsl({205 + round(145 * index / max(1, count - 1))}, 65%, var(--depth))"


def named(report: Report, run: Run, text: str) -> str:
    """`text`, with the run in front if there are several."""
    return f"{run.name}: {text}" if len(report.runs) > 1 else text


# ---- of all runs


def losses(report: Report) -> Figure | None:
    """The loss on train and dev and the learning rate by step."""
    traces, said, columns = [], [], {"run": [], "split": [], "step": [], "nats": [], "learning rate": []}
    for index, run in enumerate(report.runs):
        rates = dict(run.rates)
        for split, dash, width in (("train", "solid", 1), ("dev", "solid", 3)):
            steps, nats = [step for step, _ in run.losses[split]], [loss for _, loss in run.losses[split]]
            if not steps:
                continue
            shape = {"mode": "lines+markers", "marker": {"size": 7}} if split == "dev" else {"opacity": 0.75}
            hover = f"{split} %{{y:.4f}} nats, step %{{x}}"
            traces.append(
                line(steps, nats, named(report, run, split), colour(index), dash=dash, width=width, **shape)
                | {"hovertemplate": hover}
            )
            said.append(named(report, run, f"{split} from {nats[0]:.4f} to {nats[-1]:.4f} nats at step {steps[-1]}"))
            near = [
                rates[max((at for at in rates if at < step), default=min(rates))] if rates else None for step in steps
            ]
            for name, cells in zip(
                columns, ([run.name] * len(steps), [split] * len(steps), steps, nats, near), strict=True
            ):
                columns[name] += cells
        if rates and any(run.losses.values()):
            options = {"dash": "dot", "width": 1.5, "yaxis": "y2", "hovertemplate": "learning rate %{y:.4g}, step %{x}"}
            traces.append(
                line(list(rates), list(rates.values()), named(report, run, "learning rate"), colour(index), **options)
            )
    if not said:
        return None
    layout = {
        "xaxis": axis("step"),
        "yaxis": axis("nats per character"),
        "yaxis2": axis(
            "learning rate", overlaying="y", side="right", rangemode="tozero", showgrid=False, tickmode="auto"
        ),
    }
    caption = "Loss by step: thin on train (mean of the batches, with dropout), thick on dev; dotted the learning rate."
    return Figure("losses", caption, "; ".join(said) + ".", traces, layout, columns)


def reliability(report: Report) -> Figure:
    """The reliability diagram of every run."""
    diagonal = line([0, 1], [0, 1], "perfect", "var(--faint)", dash="dash", hoverinfo="skip")
    traces, said = [diagonal], []
    columns: dict[str, list[Any]] = {"run": [], "of": [], "events": [], "predicted": [], "happened": []}
    for index, run in enumerate(report.runs):
        for kind, what, dash in (("every", "every token", "solid"), ("top", "most probable", "dot")):
            found = run.calibration[kind]
            events, predicted, happened = (list(cells) for cells in zip(*found["bins"], strict=True))
            shape = {"mode": "lines+markers", "dash": dash, "customdata": events}
            hover = f"{what}: predicted %{{x:.3f}}, happened %{{y:.3f}}, %{{customdata}} events"
            traces.append(
                line(predicted, happened, named(report, run, what), colour(index), **shape) | {"hovertemplate": hover}
            )
            said.append(named(report, run, f"{what} {found['ece']:.4f}"))
            cells = ([run.name] * len(events), [what] * len(events), events, predicted, happened)
            for name, column in zip(columns, cells, strict=True):
                columns[name] += column
    caption = (
        "Reliability: how often what is predicted with a probability happens, in 15 bins of equal width; for the "
        "probabilities of every token at each prediction, and for the most probable token alone (Guo et al. 2017). "
        f"Expected calibration error: {'; '.join(said)}."
    )
    layout = {"xaxis": axis("predicted", range=[0, 1]), "yaxis": axis("happened", range=[0, 1]), "square": True}
    return Figure("reliability", caption, caption, traces, layout, columns)


def entropies(report: Report) -> Figure:
    """The entropies of train and the losses of n-grams on dev by the length of the context."""
    orders = list(range(len(report.held_out)))
    in_sample: list[float | None] = [*report.in_sample, *[None] * (len(orders) - len(report.in_sample))]
    hover = {"hovertemplate": "%{y:.4f} bits, context of %{x}", "mode": "lines+markers"}
    traces = [
        line(orders, in_sample, "in-sample, train", "var(--faint)", dash="dash", **hover),
        line(orders, report.held_out, "Kneser–Ney on dev", "var(--ink)", **hover),
    ]
    said = [f"The best n-gram on dev takes {min(report.held_out):.4f} bits per character"]
    columns: dict[str, Sequence[Any]] = {"context": orders, "in-sample": in_sample, "Kneser–Ney": report.held_out}
    for index, run in enumerate(report.runs):
        bits = run.row.evaluation.bits_per_char
        name = named(report, run, run.row.type)
        options = {"width": 3, "hovertemplate": "%{y:.4f} bits"}
        traces.append(line([0, orders[-1]], [bits, bits], name, colour(index), **options))
        said.append(f"{name} takes {bits:.4f}")
        columns[name] = [bits] * len(orders)
    caption = (
        "Predictability: the conditional entropy of train from its own counts, which falls to 0 as contexts become "
        "unique; the loss on dev of n-grams that were counted on train; and the loss on dev of the model."
    )
    layout = {
        "xaxis": axis("context, characters", dtick=1),
        "yaxis": axis("bits per character", rangemode="tozero"),
    }
    return Figure("entropies", caption, "; ".join(said) + ".", traces, layout, columns)


# ---- of one run


def embedding(report: Report, run: Run, id: str) -> Figure | None:
    """The embedding of the characters in two dimensions."""
    if run.embedding is None:
        return None
    groups: dict[str, list[tuple[str, float, float, float]]] = {}
    for token, x, y, share in run.embedding.points:
        name = token_name(report.vocabulary, token)
        groups.setdefault(_kind(name), []).append((name, x, y, share))
    traces = []
    for index, (kind, points) in enumerate(sorted(groups.items())):
        names, xs, ys, shares = (list(cells) for cells in zip(*points, strict=True))
        shape = {"marker": {"size": 19, "color": colour(index), "opacity": 0.3}, "textfont": {"size": 13}}
        hover = "%{text}: (%{x:.3f}, %{y:.3f}), %{customdata:.2%} of train"
        traces.append(
            {"type": "scatter", "mode": "markers+text", "x": xs, "y": ys, "text": [plain(name) for name in names]}
            | {"name": kind, "customdata": shares, "hovertemplate": hover, "cliponaxis": False, **shape}
        )
    found = run.embedding
    how = "Its two dimensions" if found.explained is None else f"The first two principal components of {found.width}"
    explained = (
        "" if found.explained is None else f", which explain {found.explained[0]:.1%} and {found.explained[1]:.1%}"
    )
    caption = f"The embedding C of the characters. {how}{explained}."
    points = [point for group in groups.values() for point in group]
    columns = dict(zip(("character", "x", "y", "share of train"), map(list, zip(*points, strict=True)), strict=True))
    layout = {"xaxis": axis("", zeroline=True), "yaxis": axis("", zeroline=True, scaleanchor="x"), "square": True}
    return Figure(id, caption, f"{caption} {len(points)} characters.", traces, layout, columns)


def _kind(name: str) -> str:
    if name == ITEM_END or not name.isalnum():
        return "other"
    return "digit" if name.isdigit() else "vowel" if name.lower() in "aeiouy" else "letter"


def heat_map(report: Report, id: str, name: str, matrix: list[list[float]], most: float, scale: str) -> Figure:
    """The heat map of a matrix over pairs of the frequent characters; its colours end at `most`."""
    names = [token_name(report.vocabulary, token) for token in report.frequent]
    ticks = {"tickvals": list(range(len(names))), "ticktext": [plain(each) for each in names]}
    trace = {
        "type": "heatmap",
        "z": [[round(z, 5) for z in row] for row in matrix],
        "colorscale": scale,
        "zmin": -most if scale == "diverging" else 0,
        "zmax": most,
        "hovertemplate": "%{text}: %{z:.4f}<extra></extra>",
    }
    cells = (
        (row, column, z) for row, line in zip(names, matrix, strict=True) for column, z in zip(names, line, strict=True)
    )
    top = sorted(cells, key=lambda cell: -abs(cell[2]))[:MOST_ROWS]
    columns = dict(zip(("after", "next", "value"), map(list, zip(*top, strict=True)), strict=True))
    said = ", ".join(f"{column} after {row} {z:.3f}" for row, column, z in top[:3])
    layout = {"xaxis": axis("next", **ticks), "yaxis": axis("after", autorange="reversed", **ticks), "square": True}
    return Figure(id, name, f"{name} The largest: {said}.", [trace], layout, columns)


def bigrams(report: Report, run: Run, id: str) -> list[Figure]:
    """The heat maps of the data, of the model and of their difference."""
    difference = [
        [ours - theirs for ours, theirs in zip(*rows, strict=True)]
        for rows in zip(run.bigrams, report.bigrams, strict=True)
    ]
    most = max(max(row) for matrix in (run.bigrams, report.bigrams) for row in matrix)
    widest = max(abs(z) for row in difference for z in row) or 1.0
    return [
        heat_map(report, f"{id}-data", "Dev: how often each follows.", report.bigrams, most, "sequential"),
        heat_map(report, f"{id}-model", "Model: mean probability.", run.bigrams, most, "sequential"),
        heat_map(report, f"{id}-difference", "Model minus dev.", difference, widest, "diverging"),
    ]


def diagnostics(run: Run, id: str) -> list[Figure]:
    """The activations, gradients and updates of a run; empty without records."""
    if not run.records:
        return []
    last = run.records[-1]
    gradients = last["gradients"]
    drawn = [name for name in gradients if len(gradients) <= MOST_LINES or name in last["updates"]]
    at = f"at step {last['step']}"
    tanh = {name: found for name, found in last["activations"].items() if "saturated" in found}
    figures = [
        _histograms(f"{id}-activations", f"Activations {at}.", last["activations"], "activation", scaled=not tanh),
        _histograms(
            f"{id}-gradients",
            f"Gradients {at}, before clipping.",
            {name: gradients[name] for name in drawn},
            "gradient, in its standard deviations",
            scaled=True,
        ),
        _over_time(
            run,
            f"{id}-spread",
            "Standard deviation of the gradients, log10.",
            drawn,
            lambda record, name: _log10(record["gradients"].get(name, {}).get("std")),
        ),
        _over_time(
            run,
            f"{id}-updates",
            f"Ratio of update to weight, log10 of the ratio of their standard deviations; {TARGET} is a usual aim.",
            list(last["updates"]),
            lambda record, name: _log10(record["updates"].get(name)),
            TARGET,
        ),
    ]
    if tanh:
        saturation = _over_time(
            run,
            f"{id}-saturation",
            f"Saturation: the share of tanh activations beyond ±{SATURATED}.",
            list(tanh),
            lambda record, name: record["activations"].get(name, {}).get("saturated"),
        )
        figures.insert(1, saturation)
    return [figure for figure in figures if figure.traces]


def _histograms(id: str, caption: str, found: dict[str, Any], title: str, scaled: bool) -> Figure:
    """Densities of the histograms `found`, by name; `scaled` by the standard deviation of each."""
    traces, said, columns = [], [], {"of": [], "mean": [], "standard deviation": [], "saturated": []}
    for index, (name, one) in enumerate(found.items()):
        counts, unit = one["counts"], (one["std"] or 1.0) if scaled else 1.0
        width = 2 * one["bound"] / len(counts)
        centres = [(width * (n + 0.5) - one["bound"]) / unit for n in range(len(counts))]
        density = [count * unit / (width * sum(counts)) for count in counts]
        hover = f"{plain(name)}: density %{{y:.3g}} at %{{x:.3f}}<extra></extra>"
        traces.append(line(centres, density, name, depth_colour(index, len(found))) | {"hovertemplate": hover})
        saturated = one.get("saturated")
        said.append(f"{name} has mean {number(one['mean'])} and standard deviation {number(one['std'])}")
        for key, cell in zip(columns, (name, one["mean"], one["std"], saturated), strict=True):
            columns[key].append(cell)
    layout = {"xaxis": axis(title), "yaxis": axis("density", rangemode="tozero")}
    return Figure(id, caption, f"{caption} {'; '.join(said[:MOST_LINES])}.", traces, layout, columns)


def _over_time(
    run: Run,
    id: str,
    caption: str,
    names: list[str],
    value: Callable[[dict[str, Any], str], float | None],
    target: float | None = None,
) -> Figure:
    """A line over the steps of the records for each of `names`."""
    steps = [record["step"] for record in run.records]
    values = {name: [value(record, name) for record in run.records] for name in names}
    shape = {"mode": "lines+markers", "marker": {"size": 4}}
    traces = [
        line(steps, values[name], name, depth_colour(index, len(names)), **shape)
        | {"hovertemplate": f"{plain(name)}: %{{y:.4g}}, step %{{x}}<extra></extra>"}
        for index, name in enumerate(names)
    ]
    if target is not None and traces:
        traces.append(line([steps[0], steps[-1]], [target] * 2, f"{target}", "var(--faint)", dash="dash"))
    said = "; ".join(
        f"{name} {number(found[0])} at first, {number(found[-1])} at last" for name, found in values.items()
    )
    columns = {"step": steps, **values}
    return Figure(id, caption, f"{caption} {said}.", traces, {"xaxis": axis("step"), "yaxis": axis("")}, columns)


def _log10(value: float | None) -> float | None:
    return math.log10(value) if value else None


def all_figures(parts: Iterable[Any]) -> dict[str, dict[str, Any]]:
    """What Plotly draws, by the id of the figure."""
    return {part.id: {"data": part.traces, "layout": part.layout} for part in parts if isinstance(part, Figure)}
