"""What the documentation shows is run: the README's Python, and the examples in the docstrings."""

import doctest
import importlib
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
