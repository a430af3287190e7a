"""Shared by all tests: hypothesis repeats its examples on every run, and `isa` goes through the kernels.

With CHARLM_CUDA_EMULATED=LIBRARY the CPU's kernels are replaced by the CUDA kernels as the emulator runs them
(tests/cuda_emulator): tests/test_cuda_emulated.py starts pytest so.
"""

from __future__ import annotations

import os
import signal
import zlib
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from charlm import _C
from tests.covering import mark_exhaustive
from tests.cuda_emulator.ops import run_cpu_ops_on_emulator

hypothesis.settings.register_profile(
    "charlm",
    derandomize=True,
    deadline=None,
    max_examples=60,
    # `isa` is set once for all examples of a test, which is what is wanted.
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
hypothesis.settings.load_profile("charlm")


# Compiled graphs that torch caches name our private ops: a cache for each build, so that none is of another version.
BUILD = zlib.crc32(Path(_C.__file__).read_bytes())
CACHE = Path(__file__).resolve().parents[1] / "build" / "torchinductor" / f"{BUILD:08x}"
os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE))

# Subprocesses inherit signals that are ignored: by nohup, or by a shell that starts a job in the background.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# One thread, here and in subprocesses: most tensors are tiny, and threads that wait for each other took up to 30 times
# as long. A test of threads sets its own number.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"

collect_ignore = ["thirdparty"]  # `make thirdparty` runs these, with the libraries that they need

EMULATED = os.environ.get("CHARLM_CUDA_EMULATED")
if EMULATED:
    run_cpu_ops_on_emulator(EMULATED)


@pytest.hookimpl(tryfirst=True)  # before pytest deselects the exhaustive tests
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_exhaustive(items)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=["emulated"] if EMULATED else _C.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set that this machine can run, one after the other; restored afterwards."""
    if EMULATED:
        yield request.param
        return
    found = _C.cpu_isa()
    _C.set_cpu_isa(request.param)
    yield request.param
    _C.set_cpu_isa(found)


@pytest.fixture
def torchs_products() -> Iterator[None]:
    """Products whose sides are not short are torch's own, as they are where its vectors are no narrower than ours."""
    found = _C.cpu_isa()
    _C.set_cpu_isa("baseline")
    yield
    _C.set_cpu_isa(found)


@pytest.fixture(params=[1, 2, 3, 5])
def n_threads(request: pytest.FixtureRequest) -> Iterator[int]:
    found = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(found)
