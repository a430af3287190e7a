"""The benchmark on a GPU, on a machine without one: its cases and goals, its figures, and the table of a record."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import bench_support
import pytest
from gpu_machine import ENVIRONMENT

from bench import cases, measure, record, report
from bench.cases import Case
from bench.ops import make_workload


def test_a_case_for_which_no_time_is_left_is_named(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    result = bench_support.run("embedding", "--dry-run", "--seconds", "-1", "--json", path)
    assert result.exit_code == 0
    content = record.read(path)
    assert content["cases"] == []
    assert content["not_run"] == {
        case.name: "no time was left" for case in cases.dry_run("cpu") if case.op == "embedding"
    }


def test_the_goals_of_the_gpu_stand_beside_their_cases() -> None:
    goals = {case.name: [(g.figure, g.bound, g.value) for g in case.goals] for case in cases.CASES["cuda"]}
    for shape in ((16384, 8192), (8192, 32000), (8192, 50257), (4096, 65536)):
        for dtype in ("bfloat16", "float32"):
            name = f"cross_entropy/default/{shape[0]}x{shape[1]}/{dtype}"
            assert goals[name] == [("copy_bandwidth", ">=", 0.92)]
    assert goals["cross_entropy/default/262144x27/bfloat16"] == [("copy_bandwidth", ">=", 0.62)]
    assert goals["cross_entropy/default/65536x65/float32"] == [("over_copy_us", "<=", 4.5)]
    assert goals["cross_entropy/softcap/8192x32000/bfloat16"] == [("copy_bandwidth", ">=", pytest.approx(0.782))]
    assert goals["kl_div/default/2048x32000/bfloat16"] == [("copy_bandwidth", ">=", 0.9)]
    assert goals["embedding_backward/default/262144x27x10/float32"] == [("read", "<=", 2.0), ("eager", ">=", 2.0)]
    assert goals["embedding_backward/default/262144x256x768/bfloat16"] == []
    linear = "linear_cross_entropy/small_budget/8192x2304x256000/bfloat16"
    assert goals[linear] == [("ms", "<=", 58.0), ("extra_mb", "<=", 1700)]


def test_on_a_gpu_the_libraries_for_it_take_part_and_jax_does_not() -> None:
    loss = make_workload(Case("cross_entropy", "default", (65536, 27), "bfloat16"))
    loss.device = "cuda"
    assert loss.providers() == ["ours", "eager", "compile", "liger", "quack", "copy"]
    many = make_workload(Case("cross_entropy", "default", (262144, 27), "bfloat16"))
    many.device = "cuda"
    assert many.providers() == ["ours", "eager", "copy"]  # not those that compile for each shape
    linear = make_workload(Case("linear_cross_entropy", "default", (33, 20, 27)))
    linear.device = "cuda"
    assert linear.providers() == ["ours", "eager", "liger", "cce", "gemms"]
    step = make_workload(Case("train_step", "graph", (33, 3, 10, 20, 27)))
    step.device = "cuda"
    assert step.providers() == ["ours", "eager", "drop_in"]
    gradient = make_workload(Case("embedding_backward", "default", (33, 27, 10)))
    gradient.device = "cuda"
    assert gradient.providers() == ["ours", "eager", "eager_index", "copy", "read"]


def test_figures_are_medians_of_ratios_within_a_round() -> None:
    samples = {"ours": [2.0, 2.0], "copy": [1.0, 1.0], "eager": [6.0, 6.0], "liger": [4.0, 4.0]}
    assert measure.ratios(samples) == {"copy": 2.0, "eager": 3.0, "liger": 2.0, "best_peer": 2.0}


def test_bytes_per_second_are_compared_with_those_of_the_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    class GpuOfOneSecond:
        discarded = 0

        def __init__(self) -> None:
            self.late = {"ours": 2, "copy": 0}

        def rounds(self, calls: dict[str, Any], budget: object) -> dict[str, list[float]]:
            return {name: [0.5 if name == "copy" else 1.0] for name in calls}

    monkeypatch.setattr(measure, "make_workload", lambda case, device: make_workload(case))
    monkeypatch.setattr(measure, "peak_bytes", lambda call, device: 0)
    case = Case("cross_entropy", "default", (33, 27))
    entry = measure.measure(case, GpuOfOneSecond(), bench_support.TINY_BUDGET, "cuda", without=("compile", "jax"))
    # Logits read and a gradient written, and the targets read, in twice the time of the copy.
    moved, copied = 2 * 4 * 33 * 27 + 8 * 33, 2 * 4 * 33 * 27
    assert entry["figures"]["copy_bandwidth"] == pytest.approx(moved / copied / 2)
    assert entry["late"] == {"ours": 2}


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
                name: {"median": seconds, "p10": seconds, "p90": seconds, "samples": 50}
                for name, seconds in (("ours", 3.8e-4), ("eager", 1.9e-3))
            },
            "figures": {"eager": 5.0, "copy_bandwidth": 0.93},
            "goals": [goal],
            "absent": {"liger": "liger_kernel is not installed"},
            "late": {},
            "error": None,
            **changes,
        }

    missed = [{"figure": "eager", "bound": ">=", "value": 3, "measured": 2.1, "reached": False}]
    content = {
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
    lines = [" ".join(line.split()) for line in report.render_gpu(content).splitlines()]
    assert lines[0].startswith("charlm on NVIDIA H100 80GB HBM3: failed, 2026-11-23T08:00:00+00:00, commit unknown")
    assert (
        "1 × NVIDIA H100 80GB HBM3, compute capability 9.0, 80 GiB, 132 multiprocessors, L2 50 MiB, driver 580.159.04"
        in lines
    )
    assert "torch 2.11.0+cu130 (CUDA 13.0, nvcc 13.0), python 3.12.3, numpy 2.5.2" in lines
    assert "tests failed 61 2 failed, 300 passed in 58.1s" in lines
    assert "case charlm GB/s lower bounds × torch memory, torch's goals" in lines
    assert (
        "cross_entropy default 8192×32000 bfloat16 380 µs ±0% 2759 93 % of a copy 5.00 – copy_bandwidth >= 0.9: reached"
        in lines
    )
    assert (
        "embedding_backward default 262144×27×10 float32 380 µs ±0% 2759 93 % of a copy 5.00 – eager >= 3: MISSED"
        in lines
    )
    assert (
        "embedding_backward default 262144×27×768 float32 ≤ 380 µs ±0% 2759 93 % of a copy 5.00? – eager >= 3: unproven"
        in lines
    )
    assert "cross_entropy default 65536×27 float32 WRONG – – – – loss: NaN" in lines
    assert "device-to-device copy of a gigabyte: 2900 GB/s, read and written" in lines
    assert "goals: 1 reached, 1 missed, 1 unproven" in lines
    assert "– Liger: liger_kernel is not installed (3 cases)" in lines
    late = "– torch: some samples may hold time that the GPU waited for Python"
    assert f"{late} (2 cases)" in lines
    assert "– not run: no time was left (embedding/int64/262144x27x10/float32)" in lines
