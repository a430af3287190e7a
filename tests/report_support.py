"""The runs whose reports are tested, and what a report's page holds."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lm_support import succeeds

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<b>not</b>",
    "&amp;",
    "\u202etis",
    "\x1b[31mmind",
    "$x$",
    "%{y}",
    "é日本",
]
NAMES = "".join(f"{a}{b}{c}\n" for a in "mnlstv" for b in ("a", "e", "io", "u") for c in ("", "ra", "nna", "l", "ste"))
SMALL = (
    "--mix-ngram",
    0,
    "--n-embd",
    4,
    "--batch-size",
    16,
    "--max-steps",
    40,
    "--log-interval",
    5,
    "--warmup-steps",
    4,
)


def train(folder: Path, *flags: Any, text: str = NAMES, small: Iterable[Any] = SMALL) -> Path:
    """A run in a folder beside its data."""
    data = folder.with_suffix(".txt")
    data.write_text(text, encoding="utf-8")
    succeeds("train", "-i", data, "-o", folder, *small, *flags)
    return folder


def page_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def figures_of(page: str) -> dict[str, Any]:
    """What Plotly draws, by id."""
    (text,) = re.findall(r'<script type="application/json" id="figures">(.*?)</script>', page, re.DOTALL)
    return json.loads(text)


def body_of(page: str) -> str:
    """The page up to its scripts, as text."""
    shown = page[page.index("<body>") : page.index('<script type="application/json"')]
    return html.unescape(re.sub(r"<[^>]*>", " ", shown))
