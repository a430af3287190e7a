"""Builds charlm for CUDA and tests what needs no GPU, in a separate environment; run by `make cuda-check`.

With the nvcc of this machine and a torch that was built with CUDA (.venv-cuda, requirements-cuda.txt: several GB), it
builds the whole extension, imports it, and tests the ops on the CPU with the kernels of this build.
tests/test_cuda_build.py checks the registrations for CUDA. All GPUs are hidden. charlm is installed into that
environment, and the tests run from a copy of the sources without charlm, so that a build in the source folder for
another torch is neither used nor changed.

Exit status: 0, 1 if a step fails, or 77 (automake's "skipped") without nvcc.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cuda_toolkit import find_toolkit, nvcc_release

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / ".venv-cuda"
PYTHON = ENVIRONMENT / "bin" / "python"
REQUIREMENTS = ROOT / "requirements-cuda.txt"
SKIPPED = 77
TESTED_FOLDER = ("tests", "bench", "scripts", "csrc", "setup.py", "pyproject.toml")
TESTS = (
    "test_build_info.py",
    "test_cross_entropy*.py",
    "test_cuda_build.py",
    "test_devices.py",
    "test_embedding.py",
    "test_embedding_linear.py",
    "test_linear_cross_entropy*.py",
    "test_modules.py",
    "test_torch_citizenship_*.py",
)
SUMMARY = """
import charlm
info = charlm.build_info()
print(f"charlm {info['charlm']} for {', '.join(info['cuda_architectures'])}, torch {info['torch']}")
"""


class StepError(Exception):
    """A step failed; its output has been printed."""


def step(what: str, *command: str | Path, cwd: Path = ROOT, **env: str) -> list[str]:
    """Prints the name of a step, runs its command, and returns the lines of its output."""
    print(f"cuda-check: {what}", flush=True)
    settings = ("CHARLM_BACKEND", "CHARLM_CPU_ISA", "PYTHONPATH")
    clean = {name: value for name, value in os.environ.items() if name not in settings}
    lines = []
    with subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, "CUDA_VISIBLE_DEVICES": "", **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line.rstrip())
    if process.returncode:
        raise StepError(what)
    return lines


def make_environment() -> None:
    """Creates .venv-cuda with the requirements, unless it has them already."""
    installed = ENVIRONMENT / "installed.txt"
    wanted = REQUIREMENTS.read_text(encoding="utf-8")
    if installed.exists() and installed.read_text(encoding="utf-8") == wanted:
        return
    if not PYTHON.exists():
        venv.create(ENVIRONMENT, with_pip=True)
    step(f"install {REQUIREMENTS.name} into {ENVIRONMENT.name}", *pip("install", "-r", REQUIREMENTS))
    installed.write_text(wanted, encoding="utf-8")


def pip(*arguments: str | Path) -> list[str | Path]:
    return [PYTHON, "-m", "pip", "--disable-pip-version-check", *arguments]


def check(toolkit: Path) -> str:
    """Runs every step and returns a one-line summary."""
    start = time.perf_counter()
    make_environment()
    step(
        f"build charlm with nvcc {nvcc_release(toolkit)} ({toolkit})",
        *pip("install", "--no-build-isolation", "--no-deps", "--force-reinstall", "."),
        FORCE_CUDA="1",
        CUDA_HOME=str(toolkit),
    )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in TESTED_FOLDER:
            copy = shutil.copytree if (ROOT / part).is_dir() else shutil.copy2
            copy(ROOT / part, folder / part)
        built = step("import it without a GPU", PYTHON, "-c", SUMMARY, cwd=folder)[-1]
        tests = sorted(str(path) for pattern in TESTS for path in (folder / "tests").glob(pattern))
        result = step("test it without a GPU", PYTHON, "-m", "pytest", *tests, cwd=folder, CUDA_HOME=str(toolkit))[-1]
    return f"{built}: {result} ({time.perf_counter() - start:.0f} s in all)"


def main() -> int:
    toolkit = find_toolkit(os.environ)
    if toolkit is None:
        print("cuda-check: skipped: no CUDA toolkit (put its nvcc on PATH, or set CUDA_HOME to its folder)")
        return SKIPPED
    try:
        print(f"cuda-check: passed: {check(toolkit)}")
    except StepError as failed:
        print(f"cuda-check: failed: {failed}")
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
