"""charlm.build_info(): what is built, what runs, and what CHARLM_BACKEND and CHARLM_CPU_ISA change in it."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys

import pytest
import torch

import charlm
from charlm import _ext


def info_with(**env):
    """build_info() of a fresh python with these settings."""
    code = "import json, charlm; print(json.dumps(charlm.build_info()))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CHARLM_")}
    result = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, text=True, check=True
    )
    return json.loads(result.stdout)


def test_versions_are_those_running_and_those_built_with():
    info = charlm.build_info()
    assert info["charlm"] == info["charlm_built"] == charlm.__version__
    assert info["torch"] == info["torch_built_with"] == torch.__version__
    assert info["python"] == platform.python_version()
    assert info["python_built_with"].rpartition(".")[0] == info["python"].rpartition(".")[0]
    assert info["compiler"]


def test_instruction_sets_are_the_modules_own():
    info = charlm.build_info()
    assert info["backend"] == "extension"
    assert info["instruction_sets_compiled"] == _ext._C.compiled_isas()
    assert info["instruction_sets_supported"] == _ext._C.supported_isas()
    assert info["instruction_set_in_use"] == _ext._C.cpu_isa()
    assert info["instruction_set_in_use"] in info["instruction_sets_supported"]
    assert set(info["instruction_sets_supported"]) <= set(info["instruction_sets_compiled"])


def test_the_record_beside_the_module_agrees_with_the_headers_it_was_compiled_with():
    built = _ext._C.build_config()
    assert built["torch"] == torch.__version__.partition("+")[0]


@pytest.mark.parametrize("isa", _ext._C.supported_isas())
def test_a_forced_instruction_set_is_the_one_in_use(isa):
    assert info_with(CHARLM_CPU_ISA=isa)["instruction_set_in_use"] == isa


def test_the_fastest_supported_instruction_set_is_the_default():
    info = info_with()
    assert info["instruction_set_in_use"] == info["instruction_sets_supported"][-1]


def test_cuda_is_architectures_or_a_reason():
    info = charlm.build_info()
    assert bool(info["cuda_architectures"]) != bool(info["why_no_cuda"])


def test_threads_are_torchs():
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert charlm.build_info()["threads"] == before + 1
    finally:
        torch.set_num_threads(before)


def test_reference_backend_says_so_and_has_no_instruction_set_in_use():
    info = info_with(CHARLM_BACKEND="reference")
    assert info["backend"] == "reference"
    assert info["instruction_set_in_use"] is None
    assert info["instruction_sets_supported"] == []
    assert info["torch"] == torch.__version__
