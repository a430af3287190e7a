"""The benchmark: what it refuses, what it checks, what it times, and that documents say what was recorded."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bench_support
import pytest
import torch

from bench import cases, measure, ops, providers, record, report
from bench.cases import Case, at_least, at_most
from bench.ops import make_workload
from bench.ops.cross_entropy import INPLACE
from bench.timer import Timer
from charlm import functional

ROOT = Path(__file__).parent.parent
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
CPU_RECORDS = [record.RESULTS / f"cpu_{name}.json" for name in ("ops", "layers", "information")]
quiet = bench_support.quiet  # a fixture
SMALL = Case("cross_entropy", "default", (33, 27))


def measured(case: Case, without: tuple[str, ...] = ("compile", "jax")) -> dict[str, Any]:
    return measure.measure(case, Timer(region=lambda: None), bench_support.TINY_BUDGET, without=without)


# --- what it refuses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["softmax"], "unknown op 'softmax'"),
        (["--shape", "0x27"], "impossible shape '0x27'"),
        (["--shape", "4096"], "impossible shape '4096'"),
        (["--shape=-4x27"], "impossible shape '-4x27'"),
        (["cross_entropy", "--shape", "4x5x6"], "impossible shape '4x5x6': cross_entropy takes NxV"),
        (["embedding", "--variant", "uint8", "--shape", "4x257x2"], "uint8 indices reach 256 rows, not 257"),
        (["cross_entropy", "--shape", "1000000000x1000000"], "too little memory: it needs about 40000000.0 GB"),
        (["linear_cross_entropy", "--quick"], "no listed case fits this request"),
        (["--device", "cuda"], "torch sees no GPU"),
        (["--json", "/no/such/folder/a.json"], "there is no folder /no/such/folder"),
    ],
)
def test_a_request_that_cannot_be_met_is_one_line_on_stderr_and_exit_code_1(
    quiet: None, monkeypatch: pytest.MonkeyPatch, arguments: list[str], said: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    result = bench_support.run(*arguments)
    assert result.exit_code == 1
    assert result.stderr.startswith("bench: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_other_cases_go_on_after_one_that_does_not_fit(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "available_memory", lambda device: 10**6)
    shapes = ("--shape", "4096x4096", "--shape", "33x27")
    result = bench_support.run("cross_entropy", "--quick", *shapes)
    assert result.exit_code == 1
    assert result.stderr.startswith("bench: cross_entropy/default/4096x4096/float32: too little memory: it needs")
    assert "cross_entropy default 33×27 float32" in result.stdout
    assert "– not run: too little memory" in result.stdout


def test_memory_that_torch_cannot_allocate_is_one_line(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "available_memory", lambda device: None)
    result = bench_support.run("cross_entropy", "--quick", "--shape", "1000000000x1000000")
    assert result.exit_code == 1
    assert result.stderr == "bench: cross_entropy/default/1000000000x1000000/float32: too little memory\n"


# --- what it checks


def test_a_wrong_kernel_is_caught_and_not_timed(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda *args, **options: right(*args, **options) * 1.0001)
    printed = bench_support.run("cross_entropy", "--quick", "--shape", "33x27")
    assert printed.exit_code == 1
    assert "cross_entropy/default/33x27/float32: WRONG: loss: RMS error" in printed.stderr
    assert "WRONG" in printed.stdout
    assert measured(SMALL)["times"] == {}


@pytest.mark.parametrize("place", [0, 1, 64, -1])
def test_a_wrong_row_of_the_gradient_is_caught(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "CHECKED_ELEMENTS", 27)  # as if the logits were large
    rows = providers.spread_rows(1000, 27)
    assert (len(rows), rows[0], rows[-1]) == (128, 0, 999)
    assert set(rows.diff().tolist()) == {7, 8}
    workload = make_workload(Case("cross_entropy", "default", (1000, 27)))
    loss, gradient = workload.build("ours")()
    workload.check((loss, gradient))
    gradient[rows[place], 5] += 1e-6
    with pytest.raises(AssertionError, match="gradient: RMS error"):
        workload.check((loss, gradient))


@pytest.mark.parametrize("op", ["embedding", "embedding_backward"])
def test_a_wrong_embedding_is_caught(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "embedding", lambda index, weight: torch.nn.functional.embedding(index, weight) * 2)
    assert "RMS error" in measured(Case(op, cases.VARIANTS[op][0], (33, 27, 10)))["error"]


def test_an_exception_of_charlm_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr(functional, "cross_entropy", fails)
    assert measured(SMALL)["error"] == "no such thing"


def test_half_sums_that_overflow_in_torch_alone_are_right() -> None:
    assert measured(Case("cross_entropy", "default", (65537, 3), "float16"))["error"] is None  # torch divides by inf


# --- what it times


@pytest.mark.parametrize("op", [pytest.param(op, marks=pytest.mark.exhaustive) for op in cases.OPS])
def test_every_variant_is_checked_and_timed(op: str) -> None:
    shape = {2: (33, 27), 3: (33, 27, 10), 5: (33, 3, 10, 20, 27)}[len(cases.SHAPES[op].split("x"))]
    for variant in cases.VARIANTS[op]:
        dtypes = ("float32", "float16") if variant in ("default", "int64") and op != "train_step" else ("float32",)
        for dtype in dtypes:
            result = measured(Case(op, variant, shape, dtype))
            assert result["error"] is None
            # Where the machine has no instructions for products of float16, torch's own do not take part.
            slow = {"eager"} if op == "linear_cross_entropy" and dtype == "float16" else set()
            assert set(result["absent"]) <= slow
            assert all(
                timing["p10"] <= timing["median"] <= timing["p90"] for timing in result["times"].values() if timing
            )
            assert {"ours", "eager"} <= set(result["times"])


def test_a_case_takes_as_many_bytes_as_its_tensors_and_makes_no_memory_to_say_so() -> None:
    v = 1 << 40
    workload = ops.without_memory(Case("cross_entropy", "default", (10, v), "bfloat16"))
    assert (workload.elements(), workload.minimal_bytes()) == (10 * v, 2 * 2 * 10 * v + 8 * 10)
    forward = ops.without_memory(Case("cross_entropy", "forward_only", (10, v)))
    assert forward.minimal_bytes() == 4 * 10 * v + 8 * 10
    embedding = ops.without_memory(Case("embedding", "uint8", (10, 256, 1000)))
    assert embedding.minimal_bytes() == 10 + 4 * (10 * 1000 + 256 * 1000)


@pytest.mark.parametrize(
    ("provider", "case", "module", "attributes"),
    [
        ("liger", SMALL, "liger_kernel.transformers", {"LigerCrossEntropyLoss": torch.nn.CrossEntropyLoss}),
        ("quack", SMALL, "quack.cross_entropy", {"cross_entropy": torch.nn.functional.cross_entropy}),
        (
            "liger",
            Case("linear_cross_entropy", "default", (33, 20, 27)),
            "liger_kernel.transformers",
            {
                "LigerFusedLinearCrossEntropyLoss": lambda: (
                    lambda weight, x, target: torch.nn.functional.cross_entropy(x @ weight.t(), target)
                )
            },
        ),
        (
            "cce",
            Case("linear_cross_entropy", "default", (33, 20, 27)),
            "cut_cross_entropy",
            {"linear_cross_entropy": lambda e, c, target: torch.nn.functional.cross_entropy(e @ c.t(), target)},
        ),
    ],
    ids=["liger", "quack", "liger_linear", "cce"],
)
def test_libraries_for_gpus_are_called_in_their_own_order_and_absent_where_not_installed(
    provider: str, case: Case, module: str, attributes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = make_workload(case)
    assert provider in workload.gpu_peers
    package = module.partition(".")[0]
    monkeypatch.setitem(sys.modules, package, None)
    assert measure.warm(lambda: workload.build(provider)) == f"{package} is not installed"
    monkeypatch.setitem(sys.modules, package, SimpleNamespace(__path__=[]))
    monkeypatch.setitem(sys.modules, module, SimpleNamespace(**attributes))
    workload.check(workload.build(provider)())


def test_a_peer_that_is_not_installed_is_named(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "cores", torch.get_num_threads)
    monkeypatch.setitem(sys.modules, "jax", None)
    printed = bench_support.run("cross_entropy", "--quick", "--shape", "33x27")
    assert printed.exit_code == 0
    assert "– JAX: jax is not installed (cross_entropy/default/33x27/float32)" in printed.stdout


def test_a_peer_that_fails_is_named_and_its_goal_unproven(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise NotImplementedError("not for this dtype\nand more")

    monkeypatch.setattr(providers, "compiled", lambda function: fails)
    case = Case("cross_entropy", "default", (33, 27), goals=(at_least("compile", 3),))
    result = measured(case, without=("jax",))
    assert result["times"]["compile"] is None
    assert result["absent"] == {"compile": "not for this dtype"}
    assert result["goals"][0]["reached"] is None


def test_jax_takes_part_with_all_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(providers, "cores", lambda: torch.get_num_threads() + 1)
    with pytest.raises(providers.Unavailable, match="XLA uses"):
        make_workload(SMALL).build("jax")


@pytest.mark.parametrize("mode", INPLACE)
def test_inplace_writes_over_memory_that_every_call_shares(mode: str) -> None:
    call = make_workload(Case("cross_entropy", mode, (33, 27))).build("ours")
    assert call()[1].data_ptr() == call()[1].data_ptr()


def test_peak_memory_is_that_of_the_worst_moment() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second

    assert measure.peak_bytes(call) == 6000


def test_goals_are_bounds_of_figures_and_every_case_is_listed_once() -> None:
    assert at_most("copy", 0.9).reached(0.9)
    assert not at_most("copy", 0.9).reached(0.91)
    assert at_least("eager", 5).reached(5.0)
    assert at_least("eager", 5).reached(None) is None
    for listed in (*cases.CASES.values(), list(cases.grid())):
        assert len({case.name for case in listed}) == len(listed)


def test_the_grid_has_all_dtypes_and_at_most_a_gigabyte_of_logits() -> None:
    logits = [case for case in cases.grid() if case.op == "cross_entropy"]
    assert {case.dtype for case in logits} == set(cases.DTYPES)
    assert len(logits) >= 60
    assert max(n * v for n, v in (case.shape for case in logits)) <= 1 << 28


# --- records and what is made of them


@pytest.fixture(scope="module")
def quick_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run of two small cases, from the command line to the JSON."""
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bench.timer.DISTURBED", 10.0)
        shapes = ["--shape", "4096x27", "--shape", "33x27x10"]
        result = bench_support.run("cross_entropy", "embedding", "--quick", *shapes, "--json", path)
    assert result.exit_code == 0, result
    assert "cross_entropy default 4096×27" in result.stdout
    assert "embedding int64 33×27×10" in result.stdout
    assert "eager >= 6" in result.stdout
    return path


def test_a_run_records_machine_times_figures_and_goals(quick_record: Path) -> None:
    content = record.read(quick_record)
    assert {"processor", "cores", "threads", "instruction_set", "torch", "jax", "python"} <= content["header"].keys()
    logits, embedding = content["cases"]
    assert logits["name"] == "cross_entropy/default/4096x27/float32"
    assert {"ours", "eager", "scale", "copy"} <= logits["times"].keys()
    assert "compile" not in logits["times"]
    assert logits["goals"][0] == {
        "figure": "eager",
        "bound": ">=",
        "value": 6,
        "measured": logits["figures"]["eager"],
        "reached": logits["figures"]["eager"] >= 6,
    }
    assert logits["memory"]["ours"] >= 4096 * 27 * 4
    assert embedding["times"]["fresh_copy"]["samples"] >= 5
    shown = bench_support.run("show", quick_record, main=report.main)
    assert shown.stdout.strip() == report.render_run(content)


def changed(path: Path, to: Path, ours: float, bound: float) -> Path:
    """The record with other times of charlm and of every lower bound in its first case."""
    content = copy.deepcopy(json.loads(path.read_text(encoding="utf-8")))
    for name, timing in content["cases"][0]["times"].items():
        if timing and name in ("ours", *cases.LOWER_BOUNDS):
            timing["median"] *= ours if name == "ours" else bound
    to.write_text(json.dumps(content), encoding="utf-8")
    return to


@pytest.mark.parametrize(("ours", "bound"), [(1.0, 1.0), (1.09, 1.0), (1.5, 1.5), (0.5, 1.0), (1.2, 1.0)])
def test_compare_fails_on_a_regression_that_the_lower_bound_does_not_share(
    quick_record: Path, tmp_path: Path, ours: float, bound: float
) -> None:
    after = changed(quick_record, tmp_path / "after.json", ours, bound)
    result = bench_support.run("compare", quick_record, after, main=report.main)
    regression = ours / bound > 1.1
    assert result.exit_code == regression
    assert f"{regression:d} regressions in 2 cases" in result.stdout
    assert ("regression" in next(line for line in result.stdout.splitlines() if "4096x27" in line)) == regression


def test_compare_and_table_say_what_is_wrong_with_a_file(quick_record: Path, tmp_path: Path) -> None:
    broken, old = tmp_path / "broken.json", tmp_path / "old.json"
    broken.write_text("{", encoding="utf-8")
    old.write_text('{"schema": 0}', encoding="utf-8")
    for path, said in ((tmp_path / "none.json", "cannot read"), (broken, "is not JSON"), (old, "another version")):
        for arguments in (["compare", quick_record, path], ["table", path]):
            result = bench_support.run(*arguments, main=report.main)
            assert result.exit_code == 1
            assert said in result.stderr
            assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("file", CPU_RECORDS, ids=lambda path: path.stem)
def test_the_tables_of_speed_are_the_recorded_ones(file: Path) -> None:
    result = bench_support.run("table", file, main=report.main)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() in BENCHMARKS


def test_the_chart_is_the_recorded_one_and_has_a_bar_for_each_of_its_cases() -> None:
    drawn = report.CHART.read_text(encoding="utf-8")
    assert drawn == report.chart(), "run python -m bench.report chart"
    assert drawn.count("<rect ") == sum(map(len, report.BARS.values()))
    assert "NVIDIA H200" in drawn
    assert "2026-11-23" in drawn


def test_the_records_hold_every_case_and_every_peer() -> None:
    recorded = {case["name"]: case for file in CPU_RECORDS for case in record.read(file)["cases"]}
    assert recorded.keys() == {case.name for case in cases.CASES["cpu"]}
    for case in recorded.values():
        assert case["error"] is None
        if case["op"] == "linear_cross_entropy" and case["dtype"] == "bfloat16":
            assert {reason.split(" without")[0] for reason in case["absent"].values()} <= {"products of bfloat16"}
        else:
            assert all(case["times"].get(peer) for peer in ("eager", "compile", "jax")), (case["name"], case["absent"])
