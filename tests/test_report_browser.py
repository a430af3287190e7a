"""The report in Chromium: no error and no request, every figure with its numbers, hover, both themes, print, keyboard.

CHROMIUM is the path of the browser, by default Debian's. REPORT_PICTURES is a folder for pictures of the page.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import browser_support
import pytest
from browser_support import MILLISECONDS, luminance, until
from lm_support import succeeds
from report_support import HOSTILE, NAMES, figures_of, page_of, train

pytestmark = pytest.mark.browser
PICTURES = os.environ.get("REPORT_PICTURES")
browser = browser_support.browser
WIDTHS, THEMES = (1280, 400), ("light", "dark")


@pytest.fixture(scope="module", params=["names", "hostile"])
def report(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "names":
        runs = [train(folder / "mlp", "--n-hidden", 8), train(folder / "gpt", "--type", "gpt", "--n-layer", 2)]
    else:
        verse = "".join(f"{word}{end}" for word in HOSTILE for end in " \n" for _ in range(20))
        name = "<img src=x onerror=alert(2)>"
        runs = [train(folder / name, "--format", "text", "--type", "mlp", "--n-hidden", 8, "--n-embd", 2, text=verse)]
    succeeds("report", *runs, "-o", folder / "report.html")
    return folder / "report.html"


@pytest.fixture
def show(browser, report) -> Iterator[Any]:
    """Opens the report; at the end there must have been no message, error or request of the page."""
    seen, pages = [], []

    def opened(width: int = 1280, theme: str = "light") -> Any:
        page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=theme)
        pages.append(page)
        page.set_default_timeout(MILLISECONDS)
        page.on("console", lambda message: seen.append(message.text))
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("dialog", lambda dialog: (seen.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: seen.append(request.url) if request.url.startswith("http") else None)
        page.goto(report.as_uri())
        page.wait_for_selector("html[data-drawn]")
        return page

    yield opened
    for page in pages:
        page.close()
    assert seen == []


@pytest.mark.parametrize("theme", THEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_figure_is_drawn_with_its_numbers_at_every_width(show, report, width, theme):
    page = show(width, theme)
    drawn = figures_of(page_of(report))
    ids = page.eval_on_selector_all(".plot", "plots => plots.map(plot => plot.id)")
    assert ids == list(drawn)
    assert len(ids) >= 9
    for id, figure in drawn.items():
        traces = page.evaluate("id => document.getElementById(id).data", id)
        for trace, expected in zip(traces, figure["data"], strict=True):
            for key in ("x", "y", "z"):
                assert trace.get(key) == expected.get(key)
        marks = page.locator(f'[id="{id}"] :is(.scatterlayer .trace, .heatmaplayer image)').count()
        assert marks == len(traces)
        box, outside = page.evaluate(
            "id => { const plot = document.getElementById(id), svg = plot.querySelector('svg.main-svg');"
            "return [svg.getBoundingClientRect().width, plot.clientWidth] }",
            id,
        )
        assert 0 < box <= outside
    assert page.evaluate("document.documentElement.scrollWidth") == width
    browser_support.check_contrast(page, "body", "figcaption", "nav a", ".mark", ".cell")
    if PICTURES:
        page.screenshot(path=Path(PICTURES, f"{report.parent.name}-{width}-{theme}.png"), full_page=True)


def lonely(traces: list[dict[str, Any]]) -> tuple[float, float]:
    """The point that is farthest from all others."""
    points = [point for trace in traces for point in zip(trace["x"], trace["y"], strict=True)]
    return max(points, key=lambda point: sorted(math.dist(point, other) for other in points)[1])


def test_hovering_shows_the_numbers(show, report):
    page = show()
    drawn = figures_of(page_of(report))
    for id in ("entropies", "run-0-embedding", "run-0-bigrams-data"):
        plot = page.locator(f'[id="{id}"]')
        plot.scroll_into_view_if_needed()
        trace = drawn[id]["data"][0]
        x, y = (0, 0) if "z" in trace else lonely(drawn[id]["data"])
        left, top = page.evaluate(
            "([id, x, y]) => { const plot = document.getElementById(id), box = plot.getBoundingClientRect();"
            "const {xaxis, yaxis} = plot._fullLayout;"
            "return [box.left + xaxis._offset + xaxis.d2p(x), box.top + yaxis._offset + yaxis.d2p(y)]; }",
            [id, x, y],
        )
        page.mouse.move(left - 3, top)
        page.mouse.move(left, top)
        label = plot.locator(".hoverlayer .hovertext").first.text_content()
        expected = f"{trace['z'][0][0]:.4f}" if "z" in trace else f"{y:.4f}" if id == "entropies" else f"{y:.3f}"
        assert expected.replace("-", "−") in label.replace("-", "−"), (id, label)


def test_the_theme_follows_the_reader_and_paper_is_light(show, tmp_path):
    page = show(theme="dark")
    tick = "getComputedStyle(document.querySelector('#losses .xtick text')).fill"
    dark = page.evaluate(tick)
    page.emulate_media(color_scheme="light")
    until(lambda: page.evaluate(tick) != dark)
    light = page.evaluate(tick)
    assert luminance(light) < luminance(dark)
    page.emulate_media(color_scheme="dark")
    until(lambda: page.evaluate(tick) == dark)
    width = "Math.max(...[...document.querySelectorAll('svg.main-svg')].map(svg => svg.clientWidth))"
    page.evaluate(f"addEventListener('beforeprint', () => {{ window.printed = [{tick}, {width}] }})")
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    printed, widest = page.evaluate("window.printed")
    assert printed == light
    assert widest <= 660
    until(lambda: page.evaluate(tick) == dark)


def test_the_page_can_be_used_by_keyboard_and_heard(show, report):
    page = show()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the content"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "main"
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    opened = page.locator("details[open]")
    assert opened.count() == 1
    assert opened.locator("tbody tr").count() >= 5
    assert page.locator("h1").count() == 1
    for figure in page.locator("figure").all():
        label = figure.locator(".plot").get_attribute("aria-label")
        assert figure.locator(".plot").get_attribute("role") == "img"
        assert len(label) > 20
        assert "undefined" not in label
        assert figure.locator("figcaption").inner_text()
    assert page.locator("section:not([aria-labelledby])").count() == 0
    heard = page.locator(".passage .hidden bdi").all_text_contents()
    assert heard
    if "names" in report.parent.name:
        assert set(heard) <= set(NAMES.split())
    levels = page.eval_on_selector_all("h1, h2, h3", "all => all.map(one => +one.tagName[1])")
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
