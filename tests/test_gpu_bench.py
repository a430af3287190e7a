"""The benchmark on a GPU, on a machine without one: its cases and goals, its figures, and the table of a record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gpu_machine import ENVIRONMENT

from bench import gpu_bench, gpu_cases, gpu_report
from bench.cases import Case


def test_cases_for_which_no_time_is_left_are_named_and_wrong_ones_are_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = Case("cross_entropy", "default", (5, 27))
    path = tmp_path / "bench.json"
    assert gpu_bench.run([case], "cpu", -1.0, path)["not_run"] == {case.name: "no time was left"}
    monkeypatch.setattr(gpu_bench, "why_wrong", lambda *_: "loss: RMS error")
    (measured,) = gpu_bench.run([case], "cpu", 60.0, path)["cases"]
    assert (measured["error"], measured["times"]) == ("loss: RMS error", {})
    assert json.loads(path.read_text(encoding="utf-8"))["cases"][0]["name"] == case.name


def test_the_goals_of_the_gpu_stand_beside_their_cases() -> None:
    goals = {case.name: list(map(str, case.goals)) for case in gpu_cases.CASES}
    assert len(goals) == len(gpu_cases.CASES)
    for v in (8192, 32000, 50257, 65536):
        assert goals[f"cross_entropy/default/{gpu_cases.LARGE_V[v]}x{v}/bfloat16"] == ["copy_bandwidth ≥ 0.9"]
    for v in (27, 65, 256):
        for n in (65536, 262144):
            for dtype in ("bfloat16", "float32"):
                assert goals[f"cross_entropy/default/{n}x{v}/{dtype}"] == ["eager ≥ 2"]
    assert goals["embedding_backward/default/262144x27x10/float32"] == ["eager ≥ 3"]
    assert goals["embedding_backward/default/262144x256x768/bfloat16"] == ["eager ≥ 3"]
    assert goals["embedding_backward/default/262144x50257x768/float32"] == []


def test_bytes_per_second_are_compared_with_those_of_the_copy() -> None:
    samples = {"ours": [2.0, 2.0], "copy": [1.0, 1.0], "eager": [6.0, 6.0], "liger": [4.0, 4.0]}
    # Half as many bytes in twice the time: a quarter of the bandwidth.
    assert gpu_bench._figures(samples, moved=100, copied=200) == {
        "eager": 3.0,
        "liger": 2.0,
        "copy_bandwidth": 0.25,
        "best_peer": 2.0,
    }


def test_the_table_says_times_ratios_goals_and_what_is_missing() -> None:
    def case(name: str, **changes: Any) -> dict[str, Any]:
        op, variant, shape, dtype = name.split("/")
        goal = {"figure": "copy_bandwidth", "bound": ">=", "value": 0.9, "measured": 0.93, "reached": True}
        return {
            "name": name,
            "op": op,
            "variant": variant,
            "shape": shape.split("x"),
            "dtype": dtype,
            "bytes": 1_048_576_000,
            "times": {
                name: {"median": seconds, "samples": 50} for name, seconds in (("ours", 3.8e-4), ("eager", 1.9e-3))
            },
            "figures": {"eager": 5.0, "copy_bandwidth": 0.93},
            "goals": [goal],
            "absent": {"liger": "liger_kernel is not installed"},
            "late": {},
            "error": None,
            **changes,
        }

    missed = [{"figure": "eager", "bound": ">=", "value": 3, "measured": 2.1, "reached": False}]
    record = {
        "device": "cuda",
        "status": "failed",
        "date": "2026-11-23T08:00:00+00:00",
        "commit": None,
        "environment": ENVIRONMENT,
        "steps": [{"name": "tests", "status": "failed", "seconds": 61.2, "note": "2 failed, 300 passed in 58.1s"}],
        "bench": {
            "copy_bandwidth": 2.9e12,
            "cases": [
                case("cross_entropy/default/8192x32000/bfloat16"),
                case("embedding_backward/default/262144x27x10/float32", goals=missed, late={"eager": 3}),
                case("embedding_backward/default/262144x27x768/float32", goals=missed, late={"ours": 26, "eager": 26}),
                case(
                    "cross_entropy/default/65536x27/float32",
                    error="loss: NaN",
                    times={},
                    figures={},
                    goals=[],
                    absent={},
                ),
            ],
            "not_run": {"embedding/int64/262144x27x10/float32": "no time was left"},
        },
    }
    lines = [" ".join(line.split()) for line in gpu_report.render(record).splitlines()]
    assert lines[0].startswith("charlm on NVIDIA H100 80GB HBM3: failed, 2026-11-23T08:00:00+00:00, commit unknown")
    assert (
        "1 × NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB, 132 multiprocessors, L2 50 MiB, driver 580.159.04"
        in lines
    )
    assert "torch 2.11.0+cu130 (CUDA 13.0, nvcc 13.0), python 3.12.3, numpy 2.5.2" in lines
    assert "tests failed 61 2 failed, 300 passed in 58.1s" in lines
    assert "case ours GB/s of a copy × torch goals" in lines
    assert "cross_entropy default 8192×32000 bfloat16 380 µs 2759 93 % 5.00 copy_bandwidth >= 0.9: reached" in lines
    assert "embedding_backward default 262144×27×10 float32 380 µs 2759 93 % 5.00 eager >= 3: MISSED" in lines
    assert "embedding_backward default 262144×27×768 float32 ≤ 380 µs 2759 93 % 5.00? eager >= 3: unproven" in lines
    assert "cross_entropy default 65536×27 float32 WRONG – – – loss: NaN" in lines
    assert "device-to-device copy of a gigabyte: 2900 GB/s, read and written" in lines
    assert "goals: 1 reached, 1 missed, 1 unproven" in lines
    assert "– Liger: liger_kernel is not installed (3 cases)" in lines
    late = "– torch: some samples may hold time that the GPU waited for Python"
    assert f"{late} (2 cases)" in lines
    assert "– not run: no time was left (embedding/int64/262144x27x10/float32)" in lines
