"""The command behind `make gpu`, on a machine without a GPU: everything but the device."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gpu_machine import ENVIRONMENT

from bench import cases, gpu, report
from bench.gpu import Child, Outcome

PASSED = {"status": "passed", "note": "all of it"}


def command(*arguments: object, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "bench.gpu", *map(str, arguments)],
        cwd=gpu.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        check=False,
    )


def python(code: str, end: float = 60.0) -> Outcome:
    return Child([sys.executable, "-c", code], Path.cwd(), os.environ).wait(time.monotonic() + end)


@pytest.fixture
def run(tmp_path: Path) -> gpu.Run:
    return gpu.Run("cuda", tmp_path / "gpu.json", True, copy.deepcopy(ENVIRONMENT), time.monotonic())


def written(run: gpu.Run) -> dict[str, Any]:
    return json.loads(run.path.read_text(encoding="utf-8"))


def test_a_machine_without_a_gpu_is_one_sentence_and_status_77(tmp_path: Path) -> None:
    result = command("--json", tmp_path / "gpu.json", CUDA_VISIBLE_DEVICES="")
    assert (result.returncode, result.stdout) == (77, "")
    assert result.stderr.startswith("make gpu cannot run here: torch ")
    assert result.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lacking", "sentence"),
    [
        ({}, None),
        ({"torch": None, "why_no_torch": "No module named 'torch'"}, "torch cannot be imported by /usr/bin/python3"),
        ({"torch_cuda": None, "gpu": None}, "torch 2.11.0+cu130 is a CPU build, and a CUDA build of torch is needed"),
        ({"gpu": None}, "torch 2.11.0+cu130 sees no GPU (torch.cuda.is_available() is false)"),
        ({"nvcc": None}, "nvcc is missing: there is no CUDA toolkit in CUDA_HOME or on PATH"),
    ],
)
def test_what_is_missing_is_named(lacking: dict[str, Any], sentence: str | None) -> None:
    found = gpu.missing({**ENVIRONMENT, **lacking}, builds=True)
    assert found == sentence or found.startswith(sentence)


SLOW_PRODUCTS = "products of bfloat16 without instructions for them take minutes"


@pytest.mark.exhaustive
def test_a_dry_run_goes_through_every_step_and_writes_json_and_table(tmp_path: Path) -> None:
    sanitizer = tmp_path / "bin" / "compute-sanitizer"
    sanitizer.parent.mkdir()
    run_the_program = f'while [ "$1" != {sys.executable} ]; do shift; done; exec "$@"'
    sanitizer.write_text(f'#!/bin/sh\nif [ "$2" = memcheck ]; then {run_the_program}; fi\necho 0 errors\n')
    sanitizer.chmod(0o755)
    path = tmp_path / "new" / "gpu.json"
    env = {"PATH": f"{sanitizer.parent}{os.pathsep}{os.environ['PATH']}"}
    result = command("--device", "cpu", "--no-build", "--json", path, **env)
    assert result.returncode == 0, result.stdout + result.stderr

    record = json.loads(path.read_text(encoding="utf-8"))
    assert (record["status"], record["device"]) == ("passed", "cpu")
    steps = {step["name"]: step for step in record["steps"]}
    assert list(steps) == ["tests", "sanitizer", "bench"]
    assert {step["status"] for step in steps.values()} == {"passed"}
    assert " passed" in steps["tests"]["note"]
    assert list(steps["sanitizer"]["tools"]) == list(gpu.TOOLS)
    assert {case["name"] for case in record["bench"]["cases"]} == {case.name for case in cases.dry_run("cpu")}
    assert record["bench"]["not_run"] == {}
    absent = [case["absent"] for case in record["bench"]["cases"] if case["absent"]]
    # On a CPU without instructions for bfloat16 torch's own products of it would take minutes, and are left out.
    slow = set() if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {SLOW_PRODUCTS}
    assert [reasons for reasons in absent if not set(reasons.values()) <= slow] == []
    assert sorted(file.name for file in path.parent.iterdir()) == ["gpu.json", "gpu.txt"]
    table = path.with_suffix(".txt").read_text(encoding="utf-8")
    assert table.strip() in result.stdout
    assert table == report.render_gpu(record) + "\n"


@pytest.mark.parametrize("failing", ["build", "tests"])
def test_a_failing_step_leaves_json_and_table_and_only_a_failed_build_ends_the_run(
    failing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(run: gpu.Run, end: float) -> gpu.Finding:
        return python("print('first'); print('it broke'); raise SystemExit(3)").finding()

    steps = {
        name: (fail if name == failing else lambda run, end: PASSED, share) for name, (_, share) in gpu.STEPS.items()
    }
    monkeypatch.setattr(gpu, "STEPS", steps)
    monkeypatch.setattr(gpu, "environment_of_a_process", lambda: ENVIRONMENT)
    path = tmp_path / "gpu.json"
    assert gpu.main(["--json", str(path)]) == 1

    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["status"] == "failed"
    names = [step["name"] for step in record["steps"]]
    assert names == (["build"] if failing == "build" else list(gpu.STEPS))
    step = record["steps"][names.index(failing)]
    assert (step["status"], step["note"], step["code"]) == ("failed", "it broke", 3)
    assert step["output"] == ["first", "it broke"]
    assert "it broke" in path.with_suffix(".txt").read_text(encoding="utf-8")
    assert "    first\n    it broke\n" in capsys.readouterr().err


def test_an_interrupted_step_is_noted_as_such(run: gpu.Run) -> None:
    def interrupt(run: gpu.Run, end: float) -> gpu.Finding:
        raise SystemExit(143)

    with pytest.raises(SystemExit):
        run.step("tests", interrupt, run.end)
    assert [(step["status"], step["note"]) for step in written(run)["steps"]] == [("failed", "interrupted")]


@pytest.mark.exhaustive
def test_a_step_whose_time_runs_out_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    grandchild = (
        f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    code = f"import subprocess, sys; print('began', flush=True); subprocess.run([sys.executable, '-c', {grandchild!r}])"
    outcome = python(code, end=2.0)
    assert (outcome.code, outcome.output) == (None, "began\n")
    assert outcome.seconds < 10
    assert outcome.finding()["note"] == f"ended after {outcome.seconds:.0f} s: no time was left"
    time.sleep(0.2)
    state = Path("/proc", pid_file.read_text(), "stat")
    assert not state.exists() or state.read_text().split()[2] == "Z"


def test_what_the_bench_had_measured_when_its_time_ran_out_is_kept(
    run: gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = {"copy_bandwidth": 3e12, "cases": [], "not_run": {}}

    def start(*command: str) -> Child:
        path = command[command.index("--json") + 1]
        code = f"import pathlib, time; pathlib.Path({path!r}).write_text({json.dumps(content)!r}); time.sleep(60)"
        return Child([sys.executable, "-c", code], Path.cwd(), os.environ)

    monkeypatch.setattr(run, "start", start)
    assert not run.step("bench", gpu.bench, time.monotonic() + 1.0)
    assert written(run)["bench"] == content
    assert "copy of a gigabyte: 3000 GB/s" in run.path.with_suffix(".txt").read_text(encoding="utf-8")


def test_the_steps_fit_into_nine_minutes() -> None:
    assert sum(share for _, share in gpu.STEPS.values()) <= gpu.TOTAL
    assert gpu.TOTAL <= 9 * 60 - 20


@pytest.mark.parametrize("pip", [True, False])
def test_the_build_takes_what_is_installed_and_compiles_for_this_gpu_alone(
    pip: bool, run: gpu.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[list[str], dict[str, str]]] = []

    def child(command: list[str], folder: Path, env: dict[str, str]) -> Any:
        started.append((command, env))
        return SimpleNamespace(wait=lambda end: Outcome(0, "sm_90\n", 1.0))

    monkeypatch.setattr(gpu, "Child", child)
    monkeypatch.setattr(gpu, "INSTALLED", tmp_path)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: pip or None)
    assert gpu.build(run, run.end) == {"status": "passed", "note": "CUDA: sm_90"}
    (arguments, env), _ = started
    assert set(arguments) >= ({"--no-build-isolation", "--no-deps", "--no-index"} if pip else {"setup.py", "build"})
    assert (env["TORCH_CUDA_ARCH_LIST"], env["FORCE_CUDA"], env["MAX_JOBS"]) == ("9.0", "1", "16")


def test_without_pytest_the_sample_inputs_are_compared(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[str, ...]] = []

    def start(*command: str) -> Any:
        started.append(command)
        return SimpleNamespace(wait=lambda end: Outcome(0, "308 samples, 0 wrong\n", 1.0))

    monkeypatch.setattr(run, "start", start)
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: None)
    finding = gpu.tests(run, run.end)
    assert finding["note"] == "pytest is not installed, so the sample inputs only: 308 samples, 0 wrong"
    assert started == [(str(gpu.ROOT / "scripts" / "cuda_samples.py"), "--device", "cuda", "--compare")]


def test_of_a_failed_build_the_compilers_errors_are_kept_with_the_last_lines() -> None:
    said = ["[3/9] nvcc …", "loss.cu(7): error: expected a ;", *(f"line {i}" for i in range(200)), "CalledProcessError"]
    kept = Outcome(1, "\n".join(said), 1.0).finding()["output"]
    assert kept[0] == "loss.cu(7): error: expected a ;"
    assert (kept[1:], len(kept)) == (said[-gpu.TAIL :], gpu.TAIL + 1)


@pytest.mark.parametrize(
    ("code", "output", "status"),
    [
        (0, "308 samples\n========= ERROR SUMMARY: 0 errors\n", "passed"),
        (86, "========= Invalid read\n=========     at charlm::cuda::sum<float>\n", "failed"),
        (86, "========= Uninitialized read\n=========     at at::native::sort\n", "passed"),
        (1, "AssertionError: a bad index was not reported\n", "failed"),
        (1, "========= Error: Device not supported\n", "absent"),
        (None, "", "unfinished"),
        (None, "========= Invalid read\n=========     at charlm::cuda::sum<float>\n", "failed"),
    ],
)
def test_what_compute_sanitizer_finds_counts_in_our_kernels(code: int | None, output: str, status: str) -> None:
    assert gpu.of_tool(Outcome(code, output, 1.0))["status"] == status
