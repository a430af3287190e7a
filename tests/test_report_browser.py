"""The report in Chromium: no error and no request, every figure with its numbers, hover, both themes, print, keyboard.

CHROMIUM is the path of the browser, by default Debian's. REPORT_PICTURES is a folder for pictures of the page.
"""

from __future__ import annotations

import itertools
import math
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from lm_support import succeeds
from report_support import HOSTILE, NAMES, figures_of, page_of, train

pytestmark = pytest.mark.browser
CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
PICTURES = os.environ.get("REPORT_PICTURES")
MILLISECONDS = 120_000  # of patience: a busy machine draws slowly
WIDTHS, THEMES = (1280, 400), ("light", "dark")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.fail(f"{CHROMIUM} does not exist: apt-get install -y chromium, or set CHROMIUM to the path of another")
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        pytest.fail("playwright is not installed: pip install -r requirements-browser.txt")
    with sync_playwright() as playwright:
        flags = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium does not run with its sandbox as root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


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


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


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
    for selector in ("body", "figcaption", "nav a", ".mark", ".cell"):
        for ink, paper in page.eval_on_selector_all(
            selector,
            """found => found.slice(0, 50).map(one => {
                let behind = one;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
            })""",
        ):
            assert contrast(ink, paper) >= 4.5, (selector, ink, paper)
    if PICTURES:
        page.screenshot(path=Path(PICTURES, f"{report.parent.name}-{width}-{theme}.png"), full_page=True)


def lonely(traces: list[dict[str, Any]]) -> tuple[float, float]:
    """The point that is farthest from all others."""
    points = [point for trace in traces for point in zip(trace["x"], trace["y"], strict=True)]
    return max(points, key=lambda point: sorted(math.dist(point, other) for other in points)[1])


def until(holds: Callable[[], bool]) -> None:
    """Waits until `holds()`, at most MILLISECONDS; playwright's own wait evaluates, which the page forbids."""
    end = time.monotonic() + MILLISECONDS / 1e3
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


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
