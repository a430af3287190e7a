"""Chromium for the tests of pages: the one that CHROMIUM names, by default Debian's."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
MILLISECONDS = 120_000  # of patience: a busy machine draws slowly


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


def luminance(colour: str) -> float:
    """WCAG's relative luminance of "rgb(r, g, b)"."""
    parts = [float(part) / 255 for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted(map(luminance, (one, other)))
    return (high + 0.05) / (low + 0.05)


def check_contrast(page: Any, *selectors: str) -> None:
    """Text of the first elements of each selector must have a contrast of 4.5 with what is behind it (WCAG AA)."""
    for selector in selectors:
        for ink, paper in page.eval_on_selector_all(
            selector,
            """found => found.slice(0, 50).map(one => {
                let behind = one;
                while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
                return [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
            })""",
        ):
            assert contrast(ink, paper) >= 4.5, (selector, ink, paper)


def until(holds: Callable[[], bool]) -> None:
    """Waits until `holds()`, at most MILLISECONDS; playwright's own wait evaluates, which the page forbids."""
    end = time.monotonic() + MILLISECONDS / 1e3
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)
