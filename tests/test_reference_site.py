"""The drawings of the pages, and the reference site that `make docs` builds."""

from __future__ import annotations

import importlib
import re
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DRAWINGS = ("one_hot", "shapes")


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    return importlib.import_module("mkdocs_pages")


@pytest.mark.parametrize("name", DRAWINGS)
def test_a_drawing_is_well_formed_described_for_both_themes_and_shown(name: str) -> None:
    text = (ROOT / "docs" / f"{name}.svg").read_text(encoding="utf-8")
    root = ElementTree.fromstring(text)
    svg = "{http://www.w3.org/2000/svg}"
    assert root.tag == f"{svg}svg"
    assert root.get("role") == "img"
    assert root.findtext(f"{svg}title")
    assert root.findtext(f"{svg}desc")
    light, dark = root.findtext(f"{svg}style").split("@media(prefers-color-scheme:dark)")
    classes = {name for element in root.iter() for name in element.get("class", "").split()}
    coloured = {name for name in classes if re.search(rf"\.{name}{{[^}}]*(fill|stroke):#", light)}
    assert coloured
    assert all(re.search(rf"\.{name}{{[^}}]*(fill|stroke):#", dark) for name in coloured)
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")  # nothing from another host
    assert f"]({name}.svg)" in (ROOT / "docs" / "skip_the_matmul.md").read_text(encoding="utf-8")


def public_names(package: str) -> set[str]:
    module = importlib.import_module(package)
    names = getattr(module, "_OURS", None) or module.__all__
    return {name for name in names if not name.startswith("__")}


def test_the_site_has_every_public_name(pages: ModuleType) -> None:
    for package in pages.API:
        names = public_names(package) if package != "charlm.reference" else set()
        modules = {name for name in names if isinstance(getattr(importlib.import_module(package), name), ModuleType)}
        modules |= {"MODELS"}  # a dictionary without a docstring
        assert {name.rpartition(".")[2] for name in pages.names(package)} == names - modules, package


def test_the_names_of_the_site_are_defined_where_it_looks(pages: ModuleType) -> None:
    for package in pages.API:
        for name in pages.names(package):
            module, _, attribute = name.rpartition(".")
            assert hasattr(importlib.import_module(module), attribute), name


class Page:
    def __init__(self, uri: str) -> None:
        self.file = type("File", (), {"src_uri": uri})


class Files:
    src_uris = ("index.md", "contributing.md", "changelog.md", "surprise.md", "speed.svg", "gpu/MEASURED.md")


@pytest.mark.parametrize(
    ("page", "markdown", "expected"),
    [
        ("index.md", "![a chart](docs/speed.svg)", "![a chart](speed.svg)"),
        ("index.md", "[c](CONTRIBUTING.md#measure)", "[c](contributing.md#measure)"),
        ("surprise.md", "[notes](../bench/NOTES.md) and [records](../bench/results)", "notes and records"),
        (
            "surprise.md",
            "[more](gpu/MEASURED.md), [c](../CONTRIBUTING.md)",
            "[more](gpu/MEASURED.md), [c](contributing.md)",
        ),
        (
            "surprise.md",
            "[a](#5-reading-a-loss) [b](https://example.org/x)",
            "[a](#5-reading-a-loss) [b](https://example.org/x)",
        ),
        ("surprise.md", "calls[name](x)", "calls[name](x)"),
        ("surprise.md", "```python matplotlib\nx\n```", "```python\nx\n```"),
    ],
)
def test_links_lead_to_pages_of_the_site_or_become_text(
    pages: ModuleType, page: str, markdown: str, expected: str
) -> None:
    assert pages.on_page_markdown(markdown, Page(page), None, Files) == expected


@pytest.mark.on_demand
def test_make_docs_builds_a_site_without_warnings_that_loads_nothing_from_other_hosts(pages: ModuleType) -> None:
    subprocess.run(["make", "docs"], cwd=ROOT, check=True)
    site = ROOT / "build" / "site"
    assert (site / "surprise.html").exists()
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?([^\"'\s>]+)", text)
        loaded += re.findall(r"<link[^>]*\shref=[\"']?([^\"'\s>]+)", text)
        assert loaded
        assert not [url for url in loaded if url.startswith(("http:", "https:", "//"))], page
    for package in pages.API:
        text = (site / "reference" / f"{package}.html").read_text(encoding="utf-8")
        assert all(f'id="{name}"' in text or f"id={name}" in text for name in pages.names(package))
