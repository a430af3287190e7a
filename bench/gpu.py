"""`make gpu`: on a machine with a GPU, build this source tree, test it, check it and time it, in nine minutes at most.

    python -m bench.gpu [--json build/gpu.json] [--no-build] [--device cpu]

Needed: python3 with a CUDA build of torch, nvcc of the same major version, and setuptools, ninja, pybind11 and numpy.
No network, and nothing is installed: the build goes to build/gpu, compiled for this GPU alone. pytest,
compute-sanitizer, triton, Liger, CCE and quack take part where they are installed.

Each step is processes of their own with a share of the time; what a quick step leaves over, later ones may use. The
JSON and the table beside it (.txt) are written again after each step. The exit code is 1 if a step failed, and 77, with
one sentence, where a CUDA torch, a GPU or nvcc is missing. `--device cpu` is a dry run of the same steps.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from bench import record
from bench.report import render_gpu
from scripts import cuda_toolkit

ROOT = record.ROOT
INSTALLED = ROOT / "build" / "gpu"  # where the built package is put
FAILED, MISSING = 1, 77
TOTAL = 520.0  # seconds of all steps; the rest of the nine minutes is for what stands around them
LONGEST_BENCH = 240.0
LAST_CASE = 30.0  # the bench begins no case in this time before its end
GRACE = 3.0  # seconds between asking a process to end and ending it
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FOUND = 86  # the exit code that compute-sanitizer is given for errors
TAIL, MOST_ERRORS = 60, 40  # lines of a failed process that are kept: the last, and those before them that say "error"
PACKAGES = ("triton", "liger-kernel", "cut-cross-entropy", "quack-kernels", "pytest", "numpy", "ninja", "pybind11")

# What is built has to raise before all else: a module with a C++ runtime of its own (setup.py, LINK_FLAGS) cannot.
SHOW_BUILD = """
import charlm, torch
try:
    charlm.functional.embedding(torch.tensor([3]), torch.zeros(3, 2))
except IndexError as error:
    assert "index 3 at position (0,) is out of range for 3 embeddings" in str(error), error
else:
    raise SystemExit("an index out of range raised nothing")
info = charlm.build_info()
print(*info["cuda_architectures"] or [info["why_no_cuda"]])
"""

Finding = dict[str, Any]  # of a step: "status", "note", and what else is kept of it


# --- processes ----------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """How a process ended: its exit code, None if its time ran out; all it printed; how long it took."""

    code: int | None
    output: str
    seconds: float

    @property
    def last_line(self) -> str:
        lines = self.output.strip().splitlines()
        return lines[-1].strip() if lines else "it printed nothing"

    def finding(self, note: str | None = None) -> Finding:
        if self.code == 0:
            return {"status": "passed", "note": note or self.last_line}
        why = f"ended after {self.seconds:.0f} s: no time was left" if self.code is None else self.last_line
        # The last lines, and the errors of a compiler or a test long before them, once.
        lines = self.output.splitlines()
        errors = [line for line in lines[:-TAIL] if re.search(r"\b(error|FAILED|undefined reference)\b", line)]
        output = [*list(dict.fromkeys(errors))[:MOST_ERRORS], *lines[-TAIL:]]
        return {"status": "failed", "note": why, "code": self.code, "output": output}


class Child:
    """A process with a time limit that holds for everything it starts: its group is ended with it."""

    def __init__(self, command: Sequence[str], folder: Path, env: Mapping[str, str]) -> None:
        # A file, not a pipe: a grandchild that outlives its parent keeps a pipe open.
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  closed by wait
        self.began = time.monotonic()
        self.process = subprocess.Popen(
            command,
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self, end: float) -> Outcome:
        """Until it has ended, or until `end` of the monotonic clock; nothing of its group is left then."""
        code = None
        try:
            code = self.process.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            self._signal(signal.SIGTERM)
            self._reap(GRACE)
        finally:
            self.end()
        self.log.seek(0)
        with self.log:
            output = self.log.read().decode(errors="replace")
        return Outcome(code, output, time.monotonic() - self.began)

    def end(self) -> None:
        """At once, and whatever it has started."""
        self._signal(signal.SIGKILL)
        self._reap(None)

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def _reap(self, seconds: float | None) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)


# --- the machine --------------------------------------------------------------------------------------------


def environment() -> dict[str, Any]:
    """Printed as JSON by a process of its own, which keeps no memory of the GPU. What is missing is null."""
    toolkit = cuda_toolkit.find_toolkit(os.environ)
    folders = [os.environ.get("PATH", "")]
    if toolkit is not None:
        folders += [str(toolkit / folder) for folder in ("bin", "compute-sanitizer")]
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "packages": {name: record.version(name) for name in (*PACKAGES, "setuptools")},
        "nvcc": cuda_toolkit.nvcc_release(toolkit),
        "compute_sanitizer": shutil.which("compute-sanitizer", path=os.pathsep.join(folders)),
        "driver": _driver(),
        **dict.fromkeys(("torch", "torch_cuda", "gpu")),
    }
    try:
        import torch
    except ImportError as error:
        return {**found, "why_no_torch": str(error)}
    found |= {"torch": torch.__version__, "torch_cuda": torch.version.cuda}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = {
            "name": properties.name,
            "count": torch.cuda.device_count(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "l2_cache": properties.L2_cache_size,
        }
    return found


def _driver() -> str | None:
    command = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    try:
        printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.partition("\n")[0].strip()


def environment_of_a_process() -> dict[str, Any]:
    command = [sys.executable, "-c", "import json; from bench import gpu; print(json.dumps(gpu.environment()))"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120).stdout
    return json.loads(printed.strip().splitlines()[-1])


def missing(found: dict[str, Any], builds: bool) -> str | None:
    """The sentence that says what this machine lacks; None if it lacks nothing."""
    if found["torch"] is None:
        return f"torch cannot be imported by {found['executable']} ({found['why_no_torch']})"
    if found["torch_cuda"] is None:
        return f"torch {found['torch']} is a CPU build, and a CUDA build of torch is needed"
    if found["gpu"] is None:
        return f"torch {found['torch']} sees no GPU (torch.cuda.is_available() is false)"
    if builds and found["nvcc"] is None:
        return "nvcc is missing: there is no CUDA toolkit in CUDA_HOME or on PATH"
    return None


# --- the steps ----------------------------------------------------------------------------------------------


class Run:
    """What is known so far, and how much time is left."""

    def __init__(self, device: str, path: Path, builds: bool, environment: dict[str, Any], began: float) -> None:
        self.device, self.path = device, path
        self.site = INSTALLED if builds else ROOT
        self.end = began + TOTAL
        self.environment = environment
        self.record: dict[str, Any] = {
            "schema": record.SCHEMA,
            "date": record.now(),
            "commit": record.commit(),
            "device": device,
            "status": "running",
            "environment": environment,
            "steps": [],
        }

    def start(self, *command: str, prefix: tuple[str, ...] = (), **variables: str) -> Child:
        """`python command`, in the folder of the built package, so that no other charlm is imported."""
        path = [str(self.site), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(path), **variables}
        return Child([*prefix, sys.executable, *command], self.site, env)

    def step(self, name: str, work: Callable[[Run, float], Finding], end: float) -> bool:
        """One step, from its line on the screen to its entry in the JSON; whether it did not fail."""
        began = time.monotonic()
        entry: dict[str, Any] = {"name": name, "status": "running", "seconds": None, "note": ""}
        self.record["steps"].append(entry)
        self.write()
        print(f"{name} …", flush=True)
        finding: Finding = {"status": "failed", "note": "interrupted"}
        try:
            finding = work(self, end)
        except (OSError, ValueError) as error:
            finding = {"status": "failed", "note": f"{type(error).__name__}: {error}"}
        finally:
            entry.update(finding, seconds=time.monotonic() - began)
            self.write()
        print(f"{name}: {entry['status']}. {entry['note']} ({entry['seconds']:.0f} s)", flush=True)
        if entry["status"] == "failed":
            print(*(f"    {line}" for line in entry.get("output", [])), sep="\n", file=sys.stderr, flush=True)
        return entry["status"] != "failed"

    def finish(self) -> None:
        failed = any(step["status"] == "failed" for step in self.record["steps"])
        self.record["status"] = "failed" if failed else "passed"
        self.write()

    def write(self) -> None:
        record.write(self.path, self.record)
        record.write(self.path.with_suffix(".txt"), render_gpu(self.record) + "\n")


def build(run: Run, end: float) -> Finding:
    """With what is installed, for the GPU of this machine."""
    INSTALLED.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("pip"):
        options = ("--no-build-isolation", "--no-deps", "--no-index", "--disable-pip-version-check", "--upgrade", "-v")
        command = ["-m", "pip", "install", *options, "--target", str(INSTALLED), "."]
    else:
        command = ["setup.py", "build", "--build-lib", str(INSTALLED)]
    env = {**os.environ, "MAX_JOBS": str(run.environment["cores"])}
    if run.device == "cuda":
        env |= {"FORCE_CUDA": "1", "TORCH_CUDA_ARCH_LIST": run.environment["gpu"]["capability"]}
    outcome = Child([sys.executable, *command], ROOT, env).wait(end)
    if outcome.code != 0:
        return outcome.finding()
    shown = run.start("-c", SHOW_BUILD).wait(end)
    return shown.finding(f"CUDA: {shown.last_line}")


def tests(run: Run, end: float) -> Finding:
    """The tests that need a GPU, without the settings, plugins and conftest that a pytest may be too old for."""
    if importlib.util.find_spec("pytest") is None:
        outcome = run.start(str(ROOT / "scripts" / "cuda_samples.py"), "--device", run.device, "--compare").wait(end)
        return outcome.finding(f"pytest is not installed, so the sample inputs only: {outcome.last_line}")
    options = ("-q", "-rfEs", "-p", "no:cacheprovider", "-o", "faulthandler_timeout=60", "--noconftest")
    files = [str(ROOT / "tests" / f"test_{name}.py") for name in ("cuda", "cuda_indices", "cuda_runtime")]
    command = ["-m", "pytest", *files, "-c", os.devnull, "--rootdir", str(ROOT)]
    if run.device == "cpu":
        options += ("-k", "not (torch.float64 or float16 or long_rows or 70001)")  # seconds, not a minute
    variables = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": "", "CHARLM_TEST_DEVICE": run.device}
    return run.start(*command, *options, **variables).wait(end).finding()


def sanitizer(run: Run, end: float) -> Finding:
    """compute-sanitizer's tools, side by side, on a few samples."""
    path = run.environment["compute_sanitizer"]
    if path is None:
        return {"status": "absent", "note": "compute-sanitizer is not installed"}
    options = ("--show-backtrace", "no", "--print-limit", "0", "--error-exitcode", str(FOUND))
    # Each tensor is memory of its own: inside a block of torch's cache no tool can see where one ends.
    variables = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    samples = ("-X", "faulthandler", str(ROOT / "scripts" / "cuda_samples.py"), "--device", run.device, "--small")
    children: dict[str, Child] = {}
    try:
        for tool in TOOLS:
            children[tool] = run.start(*samples, prefix=(path, "--tool", tool, *options), **variables)
        found = {tool: of_tool(child.wait(end)) for tool, child in children.items()}
    finally:
        for child in children.values():
            child.end()
    statuses = [finding["status"] for finding in found.values()]
    status = next((status for status in ("failed", "unfinished", "absent") if status in statuses), "passed")
    note = "; ".join(f"{tool} {finding['note']}" for tool, finding in found.items())
    output = [line for finding in found.values() for line in finding.get("output", [])]
    return {"status": status, "note": note, "tools": found, **({"output": output} if output else {})}


def of_tool(outcome: Outcome) -> Finding:
    """Errors count where they are in a kernel of ours: torch's own kernels read padding that was never written."""
    if "Device not supported" in outcome.output:
        return {"status": "absent", "note": "does not support this device"}
    if outcome.code is None and "charlm::" not in outcome.output:
        return {"status": "unfinished", "note": f"found nothing in {outcome.seconds:.0f} s, then was ended"}
    if outcome.code == FOUND and "charlm::" not in outcome.output:
        return {"status": "passed", "note": f"found nothing in charlm's kernels ({outcome.last_line.strip('= ')})"}
    return outcome.finding("found nothing" if outcome.code == 0 else None)


def bench(run: Run, end: float) -> Finding:
    end = min(end, time.monotonic() + LONGEST_BENCH)
    path = run.path.with_suffix(".bench.json")
    path.unlink(missing_ok=True)
    seconds = max(0.0, end - time.monotonic() - LAST_CASE)
    options = ("--dry-run",) if run.device == "cpu" else ("--seconds", f"{seconds:.0f}")
    outcome = run.start("-m", "bench", "--device", run.device, "--json", str(path), *options).wait(end)
    if path.exists():  # what was measured counts, however it ended
        run.record["bench"] = json.loads(path.read_text(encoding="utf-8"))
        path.unlink()
    cases = run.record.get("bench", {"cases": [], "not_run": {}})
    return outcome.finding(f"{len(cases['cases'])} cases, {len(cases['not_run'])} not run")


# The seconds that each step is sure to have; it may take more where those before it took less. Of a build that is cut
# off nothing is left, so the others have to do with less.
STEPS: dict[str, tuple[Callable[[Run, float], Finding], float]] = {
    "build": (build, 310.0),
    "tests": (tests, 75.0),
    "sanitizer": (sanitizer, 45.0),
    "bench": (bench, 90.0),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, default=ROOT / "build" / "gpu.json", help="default: build/gpu.json")
    parser.add_argument("--no-build", action="store_true", help="take the charlm that was built in place")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run")
    given = parser.parse_args(arguments)
    builds, began = not given.no_build, time.monotonic()
    environment = environment_of_a_process()
    lacking = missing(environment, builds) if given.device == "cuda" else None
    if lacking is not None:
        print(f"make gpu cannot run here: {lacking}.", file=sys.stderr)
        return MISSING
    run = Run(given.device, given.json.resolve(), builds, environment, began)
    steps = {name: step for name, step in STEPS.items() if name != "build" or builds}
    later = sum(share for _, share in steps.values())
    try:
        for name, (work, share) in steps.items():
            later -= share
            if not run.step(name, work, run.end - later) and name == "build":
                break
    finally:
        run.finish()
    print(f"\n{render_gpu(run.record)}\n\n{run.path}\n{run.path.with_suffix('.txt')}")
    return 0 if run.record["status"] == "passed" else FAILED


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGINT):  # so that a running step is ended, and noted
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    raise SystemExit(main())
