"""What the documentation shows is run: the Python of README.md and docs/, and the examples in the docstrings."""

import contextlib
import doctest
import importlib
import inspect
import io
import pkgutil
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import charlm
from charlm import functional, nn, patching, reference

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_readmes_python_runs_in_its_order() -> None:
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert torch.nn.functional.cross_entropy is not functional.cross_entropy  # the patch of the last block has ended


DOCUMENTS = sorted((ROOT / "docs").glob("*.md"))
DRAWING = " matplotlib"  # behind "python": the block only draws, with a library that the tests do without


def run_document(path: Path, drawing: bool = False) -> None:
    """Runs the Python of a document in its order, and compares what a block prints with the text up to the next block.

    A `text` block right below holds all that is printed, and nothing else.
    """
    namespace: dict[str, object] = {}
    text = path.read_text(encoding="utf-8")
    blocks = list(re.finditer(rf"```python({DRAWING})?\n(.*?)```", text, flags=re.DOTALL))
    assert blocks
    for block, end in zip(blocks, [block.start() for block in blocks[1:]] + [len(text)], strict=True):
        if block[1] and not drawing:
            continue
        printed = io.StringIO()
        line = text.count("\n", 0, block.start(2))  # so that an error names the document's own line
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[2], path, "exec"), namespace)
        below = text[block.end() : end]
        shown = re.match(r"\s*```text\n(.*?)```", below, flags=re.DOTALL)
        if shown:
            assert printed.getvalue() == shown[1]
        else:
            assert printed.getvalue().strip() in below


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_the_python_of_a_document_runs_and_prints_what_the_document_says_next(path: Path) -> None:
    run_document(path)


@pytest.mark.parametrize(
    "document",
    [
        "```python\nassert 1 == 2\n```",
        "```python\nprint('| folded | 1.00 |')\n```\n\n| folded | 2.00 |",
        "```python\nprint('1.00')\n```\n```python\npass\n```\n1.00",  # under another block
        "```python\nprint('1.00')\n```\n```text\n1.00\n2.00\n```",
        "```python\npass\n```\n```text\n1.00\n```",
    ],
)
def test_a_wrong_claim_of_a_document_fails(document: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.md"
    path.write_text(document, encoding="utf-8")
    with pytest.raises(AssertionError):
        run_document(path)


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if f"```python{DRAWING}\n" in path.read_text(encoding="utf-8")],
    ids=lambda path: path.stem,
)
def test_a_document_draws_the_picture_that_it_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    run_document(path, drawing=True)
    (drawn,) = (tmp_path / "docs").iterdir()
    assert f"]({drawn.name})" in path.read_text(encoding="utf-8")
    header = slice(0, 24)  # a PNG's signature, width and height; pixels differ among matplotlib's versions
    assert drawn.read_bytes()[header] == (path.parent / drawn.name).read_bytes()[header]


def test_links_of_the_documentation_lead_to_files() -> None:
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
            assert "://" in target or (path.parent / target).is_file(), f"{path.name}: {target}"
    for path in (ROOT / "docs").glob("*.md"):
        assert f"](docs/{path.name})" in README


OPS = [
    importlib.import_module(f"{package.__name__}.{module.name}")
    for package in (functional, reference)
    for module in pkgutil.iter_modules(package.__path__)
    if module.name in package.__all__
]


@pytest.mark.parametrize("module", [*OPS, nn, patching], ids=lambda module: module.__name__)
def test_examples_in_docstrings_print_what_they_say(module: ModuleType) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_the_readme_names_every_environment_variable_that_the_code_reads() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "charlm").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"CHARLM_[A-Z_]+", path.read_text(encoding="utf-8"))}
    read -= {name for name in read if name.startswith("CHARLM_HAVE") or name == "CHARLM_ISA"}
    assert read
    assert {name for name in read if name not in README} == set()


def test_every_public_op_stands_in_the_readme() -> None:
    ops = [
        name
        for name in functional.__all__
        if inspect.isfunction(op := getattr(functional, name)) and "charlm" in op.__module__
    ]
    assert len(ops) >= 7
    for name in ops:
        assert f"`functional.{name}`" in README
    assert set(charlm.__all__) >= {"functional", "nn", "reference", "patch_torch", "patch_model", "build_info"}


def test_the_readmes_table_of_models_is_the_recorded_one() -> None:
    command = [sys.executable, "-m", "bench.studies.models"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() in README
