"""The notebooks of docs/notebooks: they are committed without outputs, and they run, without a front end too."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LECTURES = ["1_bigram", "2_mlp", "3_activations", "4_backprop", "5_wavenet"]
WIDGETS = {"surprise": 3, "skip_the_matmul": 3}  # pictures that follow sliders
STATE = "application/vnd.jupyter.widget-state+json"


def left_behind(notebook: nbformat.NotebookNode) -> list[str]:
    """The ids of the cells with outputs, or with the number or the time of an execution; "metadata" for widgets."""
    cells = [
        cell.id
        for cell in notebook.cells
        if cell.get("outputs") or cell.get("execution_count") is not None or cell.metadata
    ]
    return cells + ["metadata"] * (set(notebook.metadata) != {"kernelspec", "language_info"})


def executed(notebook: nbformat.NotebookNode, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    """The notebook with its outputs, after a run in a kernel of this Python that imports this checkout."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    return NotebookClient(notebook, timeout=120, kernel_name="python3").execute()


def test_there_is_a_notebook_for_each_lecture_and_each_page_with_widgets() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted([*LECTURES, *WIDGETS])
    listed = (FOLDER / "README.md").read_text(encoding="utf-8")
    for path in NOTEBOOKS:
        assert f"]({path.name})" in listed
    for page in WIDGETS:
        assert f"](notebooks/{page}.ipynb)" in (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_valid_and_committed_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert left_behind(notebook) == []
    assert len({cell.id for cell in notebook.cells}) == len(notebook.cells)


def test_an_output_a_number_or_the_state_of_a_widget_that_is_committed_is_found() -> None:
    cell = nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream", text="1")])
    numbered = nbformat.v4.new_code_cell("1", execution_count=3)
    clean = nbformat.v4.new_code_cell("1")
    metadata = {**nbformat.read(NOTEBOOKS[0], as_version=4).metadata, "widgets": {}}
    notebook = nbformat.v4.new_notebook(cells=[cell, numbered, clean], metadata=metadata)
    assert left_behind(notebook) == [cell.id, numbered.id, "metadata"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_few_short_cells_and_says_what_to_try_next(path: Path) -> None:
    cells = nbformat.read(path, as_version=4).cells
    assert len(cells) <= 32
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "## What to try next" in cells[-1].source
    for cell in cells:
        assert len(cell.source.splitlines()) <= 24, cell.id
    assert path.stem in WIDGETS or "Karpathy" in cells[0].source  # whose idea it is


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_links_of_a_notebook_lead_to_files(path: Path) -> None:
    for cell in nbformat.read(path, as_version=4).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)", cell.source):
                assert "://" in target or (FOLDER / target).exists(), target


@pytest.mark.exhaustive
def test_a_claim_of_a_notebook_that_is_wrong_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("import charlm; assert 1 == 2")])
    with pytest.raises(CellExecutionError, match="AssertionError"):
        executed(notebook, monkeypatch)


@pytest.mark.exhaustive
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_what_it_claims_holds(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = executed(nbformat.read(path, as_version=4), monkeypatch)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("image/png" in output.get("data", {}) for output in outputs)
    # What a slider's function draws or raises goes to its widget, where nbclient sees no error.
    models = notebook.metadata.get("widgets", {}).get(STATE, {}).get("state", {}).values()
    drawn = [model["state"]["outputs"] for model in models if model["model_name"] == "OutputModel"]
    assert len(drawn) == WIDGETS.get(path.stem, 0)
    for pictures in drawn:
        assert any("image/png" in output.get("data", {}) for output in pictures)
