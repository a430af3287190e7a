"""The benchmark: what it refuses, what it repeats, what it compares, and that the README says what was recorded."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_support
import pytest
import torch

from bench import cases, check, clock, contenders, grid, inputs, jax_runtime, memory, record, scaling
from bench.cases import Case, at_least, at_most
from bench.clock import Budget, Busy, Clock
from bench.measure import Result, WrongResult, measure
from charlm import functional

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
quiet = bench_support.quiet  # a fixture
SMALL = Case("cross_entropy", "default", (33, 27))


def measured(case: Case, budget: Budget = bench_support.TINY_BUDGET) -> Result:
    return measure(case, Clock(region=lambda: None), budget, without=("compile", "jax"))


# ------------------------------------------------------------------------------------------------ what it refuses


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["softmax"], "unknown op 'softmax'"),
        (["--dtype", "int8"], "unknown dtype 'int8'"),
        (["--shape", "0x27"], "impossible shape '0x27'"),
        (["--shape", "4096"], "impossible shape '4096'"),
        (["--shape", "-4x27"], "impossible shape '-4x27'"),
        (["cross_entropy", "--shape", "4x5x6"], "impossible shape '4x5x6' for cross_entropy: it takes NxV"),
        (["embedding", "--shape", "4x27"], "impossible shape '4x27' for embedding: it takes NxVxD"),
        (["embedding", "--variant", "uint8", "--shape", "4x257x2"], "uint8 indices reach 256 rows, not 257"),
        (["cross_entropy", "--shape", "1000000000x1000000"], "too little memory: it needs about 40000000.0 GB"),
    ],
)
def test_what_cannot_be_run_is_one_line_on_stderr_and_exit_code_1(quiet: None, arguments: list[str], said: str) -> None:
    result = bench_support.run(*arguments)
    assert result.exit_code == 1, (result.output, result.exception)
    assert result.stderr.startswith("bench: ")
    assert said in result.stderr
    assert result.stderr.count("\n") == 1


def test_files_that_cannot_be_written_are_refused_before_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.__main__.Clock", None)
    result = bench_support.run("--json", tmp_path / "none" / "a.json")
    assert (result.exit_code, result.stderr) == (1, f"bench: there is no folder {tmp_path / 'none'}\n")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = bench_support.run("--plot", tmp_path / "a.png")
    assert (result.exit_code, result.stderr) == (1, "bench: --plot needs matplotlib: pip install matplotlib\n")


def test_half_sums_that_overflow_in_torch_alone_are_right() -> None:
    result = measured(Case("cross_entropy", "default", (65537, 3), "float16"))  # torch divides by inf
    assert result.error is None


def test_the_rest_goes_on_after_a_shape_that_does_not_fit(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "available_memory", lambda: 10**6)
    result = bench_support.run("softmax", "cross_entropy", "--quick", "--shape", "4096x4096", "--shape", "33x27")
    assert result.exit_code == 1
    assert [line.split(":")[1] for line in result.stderr.splitlines()] == [
        " unknown op 'softmax'",
        " cross_entropy/default/4096x4096/float32",
    ]
    assert "default 33×27" in result.stdout


def test_memory_that_torch_cannot_allocate_is_one_line(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inputs, "available_memory", lambda: None)
    result = bench_support.run("cross_entropy", "--quick", "--shape", "1000000000x1000000")
    assert result.exit_code == 1
    assert result.stderr == "bench: cross_entropy/default/1000000000x1000000/float32: too little memory\n"


def test_a_wrong_kernel_is_caught_and_not_timed(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = functional.cross_entropy
    monkeypatch.setattr(functional, "cross_entropy", lambda *args, **options: right(*args, **options) * 1.0001)
    result = measured(SMALL)
    assert result.error.startswith("loss: RMS error")
    assert not result.times
    printed = bench_support.run("cross_entropy", "--quick", "--shape", "33x27")
    assert printed.exit_code == 1
    assert "WRONG: loss: RMS error" in printed.stderr
    assert "WRONG" in printed.stdout
    with pytest.raises(WrongResult, match="WRONG: loss: RMS error"):
        scaling.measure(quick=True)


@pytest.mark.parametrize("place", [0, 1, 64, -1])
def test_a_wrong_row_of_the_gradient_is_caught(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "ELEMENTS", 27)  # as if the logits were large
    rows = check._spread_rows(1000, 27)
    assert (len(rows), rows[0], rows[-1]) == (128, 0, 999)
    assert set(rows.diff().tolist()) == {7, 8}
    row = rows[place]
    case = Case("cross_entropy", "default", (1000, 27))
    made = inputs.make_inputs(case)
    loss, gradient = contenders.build("ours", case, made)()
    assert check.error(case, made, (loss, gradient)) is None
    gradient[row, 5] += 1e-6
    assert "gradient: RMS error" in check.error(case, made, (loss, gradient))


@pytest.mark.parametrize("op", ["embedding", "embedding_backward"])
def test_a_wrong_embedding_is_caught(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functional, "embedding", lambda index, weight: torch.nn.functional.embedding(index, weight) * 2)
    assert measured(Case(op, cases.VARIANTS[op][0], (33, 27, 10))).error is not None


def test_an_exception_of_ours_is_a_wrong_result(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise ValueError("no such thing\nand more")

    monkeypatch.setattr(functional, "cross_entropy", fails)
    assert measured(SMALL).error == "no such thing"


# ------------------------------------------------------------------------------------------------ what it measures


def test_a_peer_that_is_not_installed_is_a_dash(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_runtime, "cores", torch.get_num_threads)
    monkeypatch.setitem(sys.modules, "jax", None)
    result = bench_support.run("cross_entropy", "--quick", "--shape", "33x27")
    assert result.exit_code == 0, result.stderr
    assert "– jax: jax is not installed (1 cases)" in result.stdout
    assert measure(SMALL, Clock(lambda: None), bench_support.TINY_BUDGET, ("compile",)).times["jax"] is None


def test_a_peer_that_fails_on_a_case_is_a_dash(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> None:
        raise NotImplementedError("not for this dtype")

    monkeypatch.setattr(torch.nn.functional, "cross_entropy", fails)
    result = measured(Case("cross_entropy", "default", (33, 27), goals=(at_least("eager", 3),)))
    assert result.times["eager"] is None
    assert result.absent == {"eager": "not for this dtype"}
    assert result.goals()[0][1] is None


def test_jax_takes_part_with_all_cores_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax_runtime, "cores", lambda: torch.get_num_threads() + 1)
    with pytest.raises(jax_runtime.Unavailable, match="XLA uses"):
        contenders.build("jax", SMALL, inputs.make_inputs(SMALL))


@pytest.mark.parametrize("op", cases.OPS)
def test_every_variant_is_checked_and_timed(op: str) -> None:
    for variant in cases.VARIANTS[op]:
        shape = {2: (33, 27), 3: (33, 27, 10), 5: (33, 3, 10, 20, 27)}[len(cases.SHAPES[op].split("x"))]
        dtypes = ("float32", "float16") if variant in ("default", "int64") and op != "train_step" else ("float32",)
        for dtype in dtypes:
            result = measured(Case(op, variant, shape, dtype))
            assert result.error is None
            # Where the machine has no instructions for products of float16, torch's own take no part.
            assert set(result.absent) <= ({"eager"} if op == "linear_cross_entropy" and dtype == "float16" else set())
            assert all(timing.p10 <= timing.median <= timing.p90 for timing in result.times.values() if timing)
            assert set(result.times) == set(contenders.names(result.case)) - {"compile", "jax"}


def test_what_a_goal_needs_takes_part_in_its_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(contenders, "_load_noop", lambda: lambda logits: logits.sum())
    figures = ("noop", "float32", "threads")
    result = measured(Case("cross_entropy", "default", (33, 27), "bfloat16", tuple(at_least(f, 0) for f in figures)))
    assert {"noop", "ours_float32", "ours_1_thread", "scale_1_thread"} <= set(result.times)
    assert all(result.figures[name] for name in ("float32", "threads", "scale_threads"))
    result = measured(Case("embedding", "uint8", (33, 27, 10), goals=(at_least("int64", 0),)))
    assert [reached for _, reached in result.goals()] == [True]


def test_two_threads_are_asked_for_only_where_the_memory_gains_from_them() -> None:
    case = Case("cross_entropy", "default", (33, 27), goals=(at_least("threads", 1.7),))
    slow_memory = Result(case, 0, figures={"threads": 1.2, "scale_threads": 1.3})
    fast_memory = Result(case, 0, figures={"threads": 1.2, "scale_threads": 1.9})
    assert [result.goals()[0][1] for result in (slow_memory, fast_memory)] == [None, False]


@pytest.mark.parametrize("mode", contenders.INPLACE)
def test_inplace_writes_over_memory_that_every_call_shares(mode: str) -> None:
    case = Case("cross_entropy", mode, (33, 27))
    call = contenders.build("ours", case, inputs.make_inputs(case))
    assert call()[1].data_ptr() == call()[1].data_ptr()


def test_peak_memory_is_that_of_the_worst_moment() -> None:
    def call() -> torch.Tensor:
        first = torch.empty(1000)
        second = torch.empty(500)
        del first
        return second

    assert memory.peak_bytes(call) == 6000


def test_goals_are_bounds_of_figures() -> None:
    assert at_most("copy", 0.9).reached(0.9)
    assert not at_most("copy", 0.9).reached(0.91)
    assert at_least("eager", 5).reached(5.0)
    assert at_least("eager", 5).reached(None) is None
    listed = [case for op in cases.OPS for case in cases.CASES[op]]
    assert len({case.name for case in listed}) == len(listed)


def test_the_grid_has_shapes_of_all_kinds() -> None:
    listed = list(grid.shapes())
    logits = {case.shape for case in listed if case.op == "cross_entropy"}
    assert len(logits) >= 60
    assert {case.dtype for case in listed} == set(cases.DTYPES)
    assert {min(n for n, _ in logits), max(n for n, _ in logits)} == {1, 10**6}
    assert max(v for _, v in logits) == 262144
    assert all(inputs.main_elements(case) * inputs.item_size(case) <= 1.1e9 for case in listed)


def test_the_grid_lists_what_is_slower_than_torch_after_measuring_twice(
    quiet: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shapes = (SMALL, Case("embedding", "int64", (33, 27, 10)))
    monkeypatch.setattr(grid, "shapes", lambda: shapes)
    ratios = iter([0.5, 0.8, 0.9, 1.1])
    monkeypatch.setattr(grid, "paired_ratio", lambda a, b: next(ratios))
    result = bench_support.run("grid", "--json", tmp_path / "grid.json")
    assert result.exit_code == 1
    assert result.stderr == f"bench: {SMALL.name}: slower than torch, 0.80×\n"
    points = record.read(tmp_path / "grid.json")["grid"]
    assert [(point["again"], point["reached"]) for point in points] == [(True, False), (True, True)]


# ------------------------------------------------------------------------------------------------------- the clock


class FakeMachine:
    """A clock that only its own calls move; `regions` holds what each empty parallel region takes."""

    def __init__(self, regions: Iterator[float]) -> None:
        self.time, self.regions = 0.0, regions

    def clock(self) -> Clock:
        return Clock(lambda: self.spend(next(self.regions)), lambda: self.time)

    def spend(self, seconds: float) -> None:
        self.time += seconds

    def work(self, seconds: Iterator[float]) -> Callable[[], None]:
        return lambda: self.spend(next(seconds))


def forever(value: float, *first: float) -> Iterator[float]:
    yield from first
    while True:
        yield value


def test_samples_are_interleaved_and_paired() -> None:
    machine = FakeMachine(forever(1e-5))
    order = []
    calls = {name: lambda name=name: (order.append(name), machine.spend(0.1)) for name in "abc"}
    samples = machine.clock().rounds(calls, Budget(0.0, 3))
    assert "".join(order).endswith("abcabcabc")
    assert {len(taken) for taken in samples.values()} == {3}
    assert clock.paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


@pytest.mark.parametrize("sample", [8.444218515250481e-06, 1.0])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_samples_that_are_equal_are_their_own_median_and_quantiles(sample: float, n: int) -> None:
    assert clock.Timing.of([sample] * n) == (sample, sample, sample, n)


@pytest.mark.parametrize(("seconds", "timed_before", "n_rounds"), [(1.9, 3, 7), (2.1, 1, 3)])
def test_calls_of_seconds_are_taken_in_three_rounds(seconds: float, timed_before: int, n_rounds: int) -> None:
    machine, calls = FakeMachine(forever(1e-5)), []
    samples = machine.clock().rounds({"a": lambda: (calls.append(0), machine.spend(seconds))}, Budget(3.0, 7))
    assert (len(samples["a"]), len(calls)) == (n_rounds, timed_before + n_rounds)


def test_a_disturbed_sample_is_repeated() -> None:
    calibration, quiet, disturbed = [1e-5] * (1 + clock.CALIBRATION), [1e-5] * (1 + clock.CHECKED), [1e-5, 1e-5, 8e-3]
    # Disturbed after the first sample, which takes 0.9, then before the next.
    machine = FakeMachine(forever(1e-5, *calibration, *quiet, *disturbed, *disturbed))
    timed = machine.work(forever(0.5, 0.5, 0.5, 0.5, 0.9))
    found = machine.clock()
    assert found.rounds({"a": timed}, Budget(0.0, 3))["a"] == pytest.approx([0.5, 0.5, 0.5])
    assert (found.kept, found.discarded) == (3, 2)


def test_threads_that_have_to_wake_up_are_no_disturbance() -> None:
    calibration, quiet = [1e-5] * (1 + clock.CALIBRATION), [1e-5] * (1 + clock.CHECKED)
    machine = FakeMachine(forever(1e-5, *calibration, *quiet, 4e-3, 8e-3))
    found = machine.clock()
    found.rounds({"a": machine.work(forever(0.5))}, Budget(0.0, 3))
    assert (found.kept, found.discarded) == (3, 0)


def test_a_machine_that_becomes_busy_is_refused() -> None:
    machine = FakeMachine(forever(8e-3, *[1e-5] * (1 + clock.CALIBRATION)))
    found = machine.clock()
    with pytest.raises(Busy, match=f"{clock.PATIENCE + 1} samples were disturbed, 0 were not"):
        found.rounds({"a": machine.work(forever(0.5))}, Budget())


def test_a_busy_machine_is_one_line_and_exit_code_2(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    machine = FakeMachine(forever(8e-3))
    with pytest.raises(Busy, match=r"an empty parallel region takes 8\.0 ms"):
        machine.clock()
    monkeypatch.setattr("bench.__main__.Clock", machine.clock)
    result = bench_support.run("cross_entropy", "--quick", "--json", tmp_path / "a.json")
    assert result.exit_code == 2
    assert result.stderr.startswith("bench: the machine is busy")
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "a.json").exists()


def test_ctrl_c_is_one_line(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.__main__.measure", interrupted)
    result = bench_support.run("cross_entropy", "--quick")
    assert (result.exit_code, result.stderr) == (130, "bench: interrupted\n")


def test_short_calls_are_repeated_within_a_sample() -> None:
    machine = FakeMachine(forever(1e-5))
    samples = machine.clock().rounds({"a": machine.work(forever(1e-4))}, Budget(0.0, 2))
    assert samples["a"] == pytest.approx([1e-4, 1e-4])
    assert machine.time > 2 * clock.SHORTEST_SAMPLE


# ------------------------------------------------------------------------------------------------------- the record


@pytest.fixture(scope="module")
def quick_record(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A quick run of two small cases, from the command line to the JSON."""
    path = tmp_path_factory.mktemp("bench") / "quick.json"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock.EmptyRegion, "__call__", lambda self: None)
        patch.setattr(clock, "DISTURBED", 10.0)
        shapes = ["--shape", "4096x27", "--shape", "33x27x10"]
        result = bench_support.run("cross_entropy", "embedding", "--quick", *shapes, "--json", path)
    assert result.exit_code == 0, (result.output, result.exception)
    assert "default 4096×27" in result.stdout
    assert "int64 33×27×10" in result.stdout
    assert "eager ≥ 6" in result.stdout
    assert "compile" not in result.stdout.split("floors")[0]
    return path


def test_a_quick_run_records_machine_times_figures_and_goals(quick_record: Path) -> None:
    content = record.read(quick_record)
    assert {"processor", "cores", "threads", "instruction_set", "torch", "jax", "python"} <= content["header"].keys()
    logits, embedding = content["cases"]
    assert logits["name"] == "cross_entropy/default/4096x27/float32"
    assert {"ours", "eager", "scale", "copy"} <= logits["times"].keys()
    assert logits["goals"][0] == {
        "figure": "eager",
        "bound": ">=",
        "value": 6,
        "measured": logits["figures"]["eager"],
        "reached": logits["figures"]["eager"] >= 6,
    }
    assert logits["memory"]["ours"] >= 4096 * 27 * 4
    assert embedding["times"]["fresh_copy"]["samples"] >= 5


def changed(path: Path, to: Path, ours: float, floor: float) -> Path:
    """The record with other times of ours and of every floor in its first case."""
    content = copy.deepcopy(json.loads(path.read_text(encoding="utf-8")))
    for name, timing in content["cases"][0]["times"].items():
        if timing and name in ("ours", *cases.FLOORS):
            timing["median"] *= ours if name == "ours" else floor
    to.write_text(json.dumps(content), encoding="utf-8")
    return to


def test_compare_flags_a_regression(quick_record: Path, tmp_path: Path) -> None:
    result = bench_support.run("compare", quick_record, changed(quick_record, tmp_path / "slower.json", 1.2, 1.0))
    assert result.exit_code == 1
    assert "regression" in next(line for line in result.stdout.splitlines() if "4096x27" in line)
    assert "1 regressions in 2 cases" in result.stdout


@pytest.mark.parametrize(("ours", "floor"), [(1.0, 1.0), (1.09, 1.0), (1.5, 1.5), (0.5, 1.0)])
def test_compare_takes_out_what_changed_for_the_floor_too(
    quick_record: Path, tmp_path: Path, ours: float, floor: float
) -> None:
    result = bench_support.run("compare", quick_record, changed(quick_record, tmp_path / "other.json", ours, floor))
    assert result.exit_code == 0, result.output


def test_compare_and_table_say_what_is_wrong_with_a_file(quick_record: Path, tmp_path: Path) -> None:
    broken, old = tmp_path / "broken.json", tmp_path / "old.json"
    broken.write_text("{", encoding="utf-8")
    old.write_text('{"schema": 0}', encoding="utf-8")
    for path, said in ((tmp_path / "none.json", "cannot read"), (broken, "is not JSON"), (old, "another version")):
        for arguments in (["compare", quick_record, path], ["table", path]):
            result = bench_support.run(*arguments)
            assert result.exit_code == 1
            assert said in result.stderr
            assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("file", record.RECORDS, ids=lambda path: path.stem)
def test_the_readmes_tables_of_speed_are_the_recorded_ones(file: Path) -> None:
    result = bench_support.run("table", file)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.strip() in README


def test_the_records_hold_every_case_and_every_peer() -> None:
    recorded = {case["name"]: case for file in record.RECORDS for case in record.read(file)["cases"]}
    assert recorded.keys() == {case.name for op in cases.OPS for case in cases.CASES[op]}
    for case in recorded.values():
        assert case["error"] is None
        if case["op"] == "linear_cross_entropy" and case["dtype"] == "bfloat16":
            assert {reason.split(" without")[0] for reason in case["absent"].values()} <= {"products of bfloat16"}
        else:
            assert all(case["times"].get(peer) for peer in ("eager", "compile", "jax")), (case["name"], case["absent"])
