"""The figures of a report, as Plotly's traces and layouts: plain dictionaries, made from the numbers of `data`.

A colour is the name of a CSS variable of the page, such as "var(--c0)", which the page's script replaces by that of the
reader's theme; so are the colour scales "sequential" and "diverging".
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import Any, ClassVar

from charlm.lm.diagnostics import SATURATED
from charlm.lm.display import ITEM_END, glyph
from charlm.lm.terminal import visible
from charlm.lm.vocabulary import Vocabulary
from charlm.report.data import BINS, Report, Run

COLOURS = 6  # of runs
MOST_ROWS = 40  # of the table of a figure
MOST_LINES = 12  # parameters whose gradients are drawn; of a larger network the weight matrices
TARGET = -3  # log10 of the ratio of update to weight that makemore's lecture aims at
TEXTS = ("name", "text", "ticktext")  # options of Plotly that it reads as HTML, and that hold text from a corpus
Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A figure: its caption, the text that stands for it, and what Plotly draws."""

    id: str
    caption: str
    alt: str
    traces: list[Trace]
    layout: dict[str, Any]
    kind: ClassVar[str] = "figure"

    @property
    def table(self) -> list[list[str]]:
        """Its numbers, below a row of titles: at most MOST_ROWS points at equal distances, or the largest of a map."""
        x, y = (self.layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis"))
        if self.traces[0]["type"] == "heatmap":
            header, values = [y, x, "value"], chain.from_iterable(self.traces[0]["z"])
            pairs = product(self.layout["yaxis"]["ticktext"], self.layout["xaxis"]["ticktext"])
            cells = [(*pair, value) for pair, value in zip(pairs, values, strict=True)]
            rows = sorted(cells, key=lambda cell: -abs(cell[2]))[:MOST_ROWS]
        else:
            header, points = ["", x, y], []
            for trace in self.traces:
                names = trace.get("text") or [trace["name"]] * len(trace["x"])
                points += zip(names, trace["x"], trace["y"], strict=True)
            rows = points[:: -(-len(points) // MOST_ROWS) or 1]
        return [header, *([number(cell) for cell in row] for row in rows)]


def drawn(figures: Iterable[Figure]) -> dict[str, Any]:
    """What Plotly draws, by the id of the figure."""
    return {figure.id: {"data": escaped(figure.traces), "layout": escaped(figure.layout)} for figure in figures}


def escaped(value: Any, key: str = "") -> Any:
    """`value`, the option `key` of Plotly, with the texts of TEXTS such that Plotly shows them literally."""
    if isinstance(value, dict):
        return {name: escaped(each, name) for name, each in value.items()}
    if isinstance(value, list):
        return [escaped(each, key) for each in value]
    return html.escape(visible(value), quote=False) if isinstance(value, str) and key in TEXTS else value


def number(value: Any) -> str:
    """A cell of a table."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value)


def token_name(vocabulary: Vocabulary, token: int) -> str:
    """A visible name of a token."""
    return ITEM_END if token == vocabulary.stop_token else glyph(vocabulary.itos[token])


def curve(name: str, x: Sequence[float], y: Sequence[float | None], colour: str, unit: str = "", **style: Any) -> Trace:
    """A line; `style` has the "dash" and the "width" of the line and other options of the trace."""
    line = {"color": colour, "dash": style.pop("dash", "solid"), "width": style.pop("width", 2)}
    hover = {"hovertemplate": f"%{{y:.4f}}{unit} at %{{x:.4~g}}"}
    return {"type": "scatter", "mode": "lines", "name": name, "x": x, "y": y, "line": line, **hover, **style}


def axis(title: str, **options: Any) -> dict[str, Any]:
    return {"title": {"text": title}, **options}


def colour(index: int) -> str:
    return f"var(--c{index % COLOURS})"


def named(report: Report, run: Run, text: str) -> str:
    """`text`, with the run in front if there are several."""
    return f"{run.name}: {text}" if len(report.runs) > 1 else text


# ---- of all runs


def losses(report: Report) -> Figure | None:
    """The loss on train and dev and the learning rate by step; None if no run has losses."""
    traces, said = [], []
    dots = {"mode": "lines+markers", "marker": {"size": 7}}
    for index, run in enumerate(report.runs):
        for split, style in (("train", {"width": 1}), ("dev", {"width": 3, **dots})):
            if points := run.losses[split]:
                steps, nats = ([point[part] for point in points] for part in (0, 1))
                name = named(report, run, split)
                traces.append(curve(name, steps, nats, colour(index), " nats", **style))
                said.append(f"{name} from {nats[0]:.4f} to {nats[-1]:.4f} nats at step {steps[-1]}")
        if run.rates and said:
            steps, rates = ([point[part] for point in run.rates] for part in (0, 1))
            style = {"dash": "dot", "width": 1.5, "yaxis": "y2"}
            traces.append(curve(named(report, run, "learning rate"), steps, rates, colour(index), **style))
    if not said:
        return None
    rate = axis("learning rate", overlaying="y", side="right", rangemode="tozero", showgrid=False, tickmode="auto")
    layout = {"xaxis": axis("step"), "yaxis": axis("nats per character"), "yaxis2": rate}
    caption = "Loss by step: thin on train (mean of the batches, with dropout), thick on dev; dotted the learning rate."
    return Figure("losses", caption, "; ".join(said) + ".", traces, layout)


def entropies(report: Report) -> Figure:
    """The entropies of train and the losses of n-grams on dev by the length of the context."""
    orders, bits = list(range(len(report.held_out))), " bits"
    dots, known = {"mode": "lines+markers"}, report.in_sample  # a tiny train has fewer orders
    traces = [
        curve("in-sample, train", orders[: len(known)], known, "var(--faint)", bits, dash="dash", **dots),
        curve("Kneser–Ney on dev", orders, report.held_out, "var(--ink)", bits, **dots),
    ]
    said = [f"The best n-gram on dev takes {min(report.held_out):.4f} bits per character"]
    for index, run in enumerate(report.runs):
        loss, name = run.row.evaluation.bits_per_char, named(report, run, run.row.type)
        traces.append(curve(name, [0, orders[-1]], [loss, loss], colour(index), bits, width=3))
        said.append(f"{name} takes {loss:.4f}")
    caption = (
        "The conditional entropy of train from its own counts, which falls to 0 as contexts become unique; the loss on "
        "dev of n-grams that were counted on train; and the loss on dev of the model."
    )
    layout = {"xaxis": axis("context, characters", dtick=1), "yaxis": axis("bits per character", rangemode="tozero")}
    return Figure("entropies", caption, "; ".join(said) + ".", traces, layout)


def reliability(report: Report) -> Figure:
    """The reliability diagram of every run."""
    traces, said = [curve("perfect", [0, 1], [0, 1], "var(--faint)", dash="dash", hoverinfo="skip")], []
    hover = "predicted %{x:.3f}, happened %{y:.3f}, %{customdata} events"
    for index, run in enumerate(report.runs):
        for kind, dash in (("every token", "solid"), ("most probable token", "dot")):
            error, bins = run.calibration[kind]
            events, predicted, happened = ([each[part] for each in bins] for part in (0, 1, 2))
            style = {"dash": dash, "mode": "lines+markers", "customdata": events, "hovertemplate": hover}
            name = named(report, run, kind)
            traces.append(curve(name, predicted, happened, colour(index), **style))
            said.append(f"{name} {error:.4f}")
    caption = (
        f"How often what is predicted with a probability happens, in {BINS} bins of equal width: for the probabilities "
        "of every token at each prediction, and for the most probable token alone (Guo et al. 2017). Expected "
        f"calibration error: {'; '.join(said)}."
    )
    layout = {"xaxis": axis("predicted", range=[0, 1]), "yaxis": axis("happened", range=[0, 1]), "square": True}
    return Figure("reliability", caption, caption, traces, layout)


# ---- of one run


def embedding(report: Report, run: Run, id: str) -> Figure | str:
    """The embedding of the characters in two dimensions, or why there is none."""
    if run.embedding is None:
        return f"A model of type {run.row.type} has no embedding."
    points, width, explained = run.embedding
    groups: dict[str, list[Any]] = {}
    for token, *point in points:
        name = token_name(report.vocabulary, token)
        groups.setdefault(_kind(name), []).append((name, *point))
    traces = []
    hover = "%{text} (%{x:.3f}, %{y:.3f}), %{customdata:.2%} of train"
    for index, kind in enumerate(sorted(groups)):
        text, x, y, share = map(list, zip(*groups[kind], strict=True))
        marker = {"size": 19, "color": colour(index), "opacity": 0.3}
        style = {"mode": "markers+text", "marker": marker, "cliponaxis": False, "hovertemplate": hover}
        traces.append(curve(kind, x, y, colour(index), text=text, customdata=share, **style))
    how = "Its two dimensions."
    if explained is not None:
        how = f"The first two of {width} principal components explain {explained[0]:.1%} and {explained[1]:.1%}."
    caption = f"The embedding C of {len(points)} characters. {how}"
    layout = {"xaxis": axis("", zeroline=True), "yaxis": axis("", zeroline=True, scaleanchor="x"), "square": True}
    return Figure(id, caption, caption, traces, layout)


def _kind(name: str) -> str:
    if name.isdigit():
        return "digit"
    if name == ITEM_END or not name.isalpha():
        return "other"
    return "vowel" if name.lower() in "aeiouy" else "letter"


def bigrams(report: Report, run: Run, id: str) -> list[Figure]:
    """The heat maps of the data, of the model and of their difference."""
    names = [token_name(report.vocabulary, token) for token in report.frequent]
    difference = [
        [ours - theirs for ours, theirs in zip(*rows, strict=True)]
        for rows in zip(run.bigrams, report.bigrams, strict=True)
    ]
    most = max(max(row) for row in (*run.bigrams, *report.bigrams))
    widest = max(abs(z) for row in difference for z in row) or 1.0
    ticks = {"tickvals": list(range(len(names))), "ticktext": names}
    layout = {"xaxis": axis("next", **ticks), "yaxis": axis("after", autorange="reversed", **ticks), "square": True}
    found = []
    for name, caption, matrix, low, high, scale in (
        ("data", "Dev: how often each character follows.", report.bigrams, 0, most, "sequential"),
        ("model", "Model: its mean probability in the same contexts.", run.bigrams, 0, most, "sequential"),
        ("difference", "Model minus dev.", difference, -widest, widest, "diverging"),
    ):
        hover = {"colorscale": scale, "hovertemplate": "%{text}: %{z:.4f}<extra></extra>"}
        trace = {"type": "heatmap", "z": matrix, "zmin": low, "zmax": high, **hover}
        figure = Figure(f"{id}-{name}", caption, caption, [trace], layout)
        said = ", ".join(f"{next} after {after} {z}" for after, next, z in figure.table[1:4])
        found.append(replace(figure, alt=f"{caption} The largest: {said}."))
    return found


def diagnostics(run: Run, id: str) -> list[Figure]:
    """The activations, gradients and updates of a run; empty without records."""
    if not run.records:
        return []
    last = run.records[-1]
    layers, gradients, weights = last["activations"], last["gradients"], list(last["updates"])
    tanh = [name for name in layers if "saturated" in layers[name]]
    shown = [name for name in gradients if len(gradients) <= MOST_LINES or name in weights]
    histograms = {name: gradients[name] for name in shown}
    at, deviations = f"at step {last['step']}", ", in standard deviations"
    scaled = "" if tanh else deviations
    spread = "Standard deviation of the gradients, log10."
    ratio = f"Update to weight: log10 of the ratio of their standard deviations; {TARGET} is a usual aim."
    saturation = f"Saturation: the share of activations beyond ±{SATURATED}, where tanh is flat."
    found = [
        _densities(f"{id}-activations", f"Activations {at}{scaled}.", layers, not tanh),
        _over_time(run, f"{id}-saturation", saturation, tanh, lambda one, name: one["activations"][name]["saturated"]),
        _densities(f"{id}-gradients", f"Gradients {at}, before clipping{deviations}.", histograms, True),
        _over_time(run, f"{id}-spread", spread, shown, lambda one, name: math.log10(one["gradients"][name]["std"])),
        _over_time(run, f"{id}-updates", ratio, weights, lambda one, name: math.log10(one["updates"][name]), TARGET),
    ]
    return [figure for figure in found if figure.traces]


def _depth(index: int, count: int) -> str:
    """The colour of layer `index` of `count`, from blue to red through violet."""
    return f"hsl({205 + round(145 * index / max(1, count - 1))}, 65%, var(--depth))"


def _densities(id: str, caption: str, found: dict[str, Any], scaled: bool) -> Figure:
    """Densities of the histograms `found` by name; `scaled` by the standard deviation of each."""
    traces, said = [], []
    for index, (name, one) in enumerate(found.items()):
        counts, unit = one["counts"], (one["std"] or 1.0) if scaled else 1.0
        width = 2 * one["bound"] / len(counts) / unit
        x = [width * (n + 0.5 - len(counts) / 2) for n in range(len(counts))]
        traces.append(curve(name, x, [n / width / sum(counts) for n in counts], _depth(index, len(found))))
        said.append(f"{name} has mean {number(one['mean'])} and standard deviation {number(one['std'])}")
    layout = {"xaxis": axis("value"), "yaxis": axis("density", rangemode="tozero")}
    return Figure(id, caption, f"{caption} {'; '.join(said)}.", traces, layout)


def _over_time(
    run: Run,
    id: str,
    caption: str,
    names: list[str],
    value: Callable[[dict[str, Any], str], float],
    target: float | None = None,
) -> Figure:
    """A line over the steps of the records for each of `names`; a value that cannot be computed is left out."""

    def found(record: dict[str, Any], name: str) -> float | None:
        try:
            return value(record, name)
        except (KeyError, TypeError, ValueError):  # no such layer, None, log10 of 0
            return None

    steps = [record["step"] for record in run.records]
    values = {name: [found(record, name) for record in run.records] for name in names}
    dots = {"mode": "lines+markers", "marker": {"size": 4}}
    traces = [curve(name, steps, values[name], _depth(n, len(names)), **dots) for n, name in enumerate(names)]
    if target is not None and traces:
        traces.append(curve(f"{target}", [steps[0], steps[-1]], [target] * 2, "var(--faint)", dash="dash"))
    said = "; ".join(f"{name} {number(of[0])} at first, {number(of[-1])} at last" for name, of in values.items())
    return Figure(id, caption, f"{caption} {said}.", traces, {"xaxis": axis("step"), "yaxis": axis("")})
