"""What `import charlm` says where the kernels beside it do not load: a source folder hides an installed charlm."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from charlm import _ext

ROOT = Path(__file__).resolve().parent.parent
IN_PLACE = "pip install --no-build-isolation -e ."


@pytest.fixture
def source(tmp_path, monkeypatch):
    """The package of a source folder in which nothing is built; charlm._ext takes it for its own."""
    package = tmp_path / "checkout" / "charlm"
    package.mkdir(parents=True)
    (package.parent / "setup.py").touch()
    monkeypatch.setattr(_ext, "CONFIG_PATH", package / "_build_config.json")
    monkeypatch.setattr(sys, "path", [str(package.parent)])
    return package


def install(site, torch_version=torch.__version__):
    """A package in the folder `site` that was built with `torch_version`."""
    (site / "charlm").mkdir(parents=True)
    (site / "charlm" / "_build_config.json").write_text(json.dumps({"torch": torch_version}))
    return site / "charlm"


def error():
    with pytest.raises(ImportError) as caught:
        _ext.load_extension()
    return str(caught.value)


def test_a_source_folder_names_the_installed_kernels_that_it_hides(source, tmp_path):
    installed = install(tmp_path / "site")
    sys.path.append(str(tmp_path / "site"))
    assert error() == (
        f"charlm's kernels are not built in {source}. There are kernels in {installed}, but Python imports {source}, "
        f"because {source.parent} comes before {installed.parent} on sys.path. Run Python from another folder, or "
        f"build them in {source.parent}: {IN_PLACE}"
    )


def test_what_pip_installs_with_minus_e_is_found_in_the_working_folder(source, monkeypatch):
    install(source.parent.parent / "other")
    monkeypatch.chdir(source.parent.parent / "other")
    sys.path.append("")
    assert f"There are kernels in {source.parent.parent / 'other' / 'charlm'}, " in error()


def test_a_source_folder_is_never_told_to_install_elsewhere(source):
    assert error() == (
        f"charlm's kernels are not built in {source}. To use kernels, build them in {source.parent}: {IN_PLACE} "
        "To run without them, in plain torch: CHARLM_BACKEND=reference"
    )


def test_kernels_for_another_torch_are_not_named_as_a_cure(source, tmp_path):
    install(tmp_path / "site", "2.12.1")
    sys.path += [str(tmp_path / "site"), str(tmp_path / "nowhere"), str(source.parent / "setup.py")]
    assert "There are kernels" not in error()


def test_a_source_folder_built_for_another_torch_names_the_installed_kernels_too(source, tmp_path):
    _ext.CONFIG_PATH.write_text(json.dumps({"torch": "2.12.1"}))
    installed = install(tmp_path / "site")
    sys.path.append(str(tmp_path / "site"))
    message = error()
    assert message.startswith(f"charlm was built with torch 2.12.1, but torch {torch.__version__} is running. ")
    assert f"There are kernels in {installed}" in message
    assert message.endswith(IN_PLACE)


def test_an_installed_package_is_rebuilt_from_wherever_its_source_is(source):
    (source.parent / "setup.py").unlink()
    assert "build them in charlm's source folder: pip install --no-build-isolation . To run without them" in error()


def test_import_in_the_source_folder_says_where_the_installed_kernels_are(tmp_path):
    package = Path(_ext.__file__).parent
    ignored = shutil.ignore_patterns("*.so", "_build_config.json", "__pycache__")
    shutil.copytree(package, tmp_path / "checkout" / "charlm", ignore=ignored)
    installed = install(tmp_path / "site")
    result = subprocess.run(
        [sys.executable, "-c", "import charlm"],
        cwd=tmp_path / "checkout",
        env={**os.environ, "CHARLM_BACKEND": "", "PYTHONPATH": str(tmp_path / "site")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 1
    assert f"There are kernels in {installed}, but Python imports {tmp_path / 'checkout' / 'charlm'}" in result.stderr
