"""What the documentation shows is run: the Python of README.md and docs/, and the examples in the docstrings."""

import contextlib
import doctest
import importlib
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


@pytest.mark.parametrize("path", sorted((ROOT / "docs").glob("*.md")), ids=lambda path: path.stem)
def test_the_python_of_a_document_runs_and_prints_what_the_document_says_next(path: Path) -> None:
    namespace: dict[str, object] = {}
    text = path.read_text(encoding="utf-8")
    blocks = list(re.finditer(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert blocks
    for block in blocks:
        printed = io.StringIO()
        line = text.count("\n", 0, block.start(1))  # so that an error names the document's own line
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[1], path, "exec"), namespace)
        assert printed.getvalue().strip() in text[block.end() :]


def test_a_wrong_claim_of_a_document_fails(tmp_path: Path) -> None:
    for block in ("assert 1 == 2", "print('| folded | 1.00 |')"):
        path = tmp_path / "wrong.md"
        path.write_text(f"```python\n{block}\n```\n\n| folded | 2.00 |\n", encoding="utf-8")
        with pytest.raises(AssertionError):
            test_the_python_of_a_document_runs_and_prints_what_the_document_says_next(path)


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
    for name in functional.__all__:
        if name[0].islower():
            assert f"`functional.{name}`" in README
    assert set(charlm.__all__) >= {"functional", "nn", "reference", "patch_torch", "patch_model", "build_info"}


def test_the_readmes_table_of_models_is_the_recorded_one() -> None:
    printed = subprocess.run([sys.executable, ROOT / "bench" / "models.py"], capture_output=True, text=True, check=True)
    assert printed.stdout.strip() in README
