"""The benchmark's timers, on machines whose clocks only the tests move."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_support
import pytest
import torch

from bench import timer
from bench.timer import Budget, GpuTimer, MachineBusyError, Timer

quiet = bench_support.quiet  # a fixture


class FakeMachine:
    """A clock that only its own calls move; `regions` holds what each empty parallel region takes."""

    def __init__(self, regions: Iterator[float]) -> None:
        self.time, self.regions = 0.0, regions

    def timer(self) -> Timer:
        return Timer(lambda: self.spend(next(self.regions)), lambda: self.time)

    def spend(self, seconds: float) -> None:
        self.time += seconds

    def work(self, seconds: Iterator[float]) -> Callable[[], None]:
        return lambda: self.spend(next(seconds))


def forever(value: float, *first: float) -> Iterator[float]:
    yield from first
    while True:
        yield value


CALIBRATION, QUIET = [1e-5] * (1 + timer.CALIBRATION), [1e-5] * (1 + timer.CHECKED)


def test_samples_are_interleaved_and_paired() -> None:
    machine = FakeMachine(forever(1e-5))
    order = []
    calls = {name: lambda name=name: (order.append(name), machine.spend(0.1)) for name in "abc"}
    samples = machine.timer().rounds(calls, Budget(0.0, 3))
    assert "".join(order).endswith("abcabcabc")
    assert {len(taken) for taken in samples.values()} == {3}
    assert timer.paired_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 2.0]) == 2.0


@pytest.mark.parametrize("sample", [8.444218515250481e-06, 1.0])
@pytest.mark.parametrize("n", [1, 3, 5])
def test_samples_that_are_equal_are_their_own_median_and_quantiles(sample: float, n: int) -> None:
    assert timer.Timing.of([sample] * n) == (sample, sample, sample, n)


@pytest.mark.parametrize(("seconds", "timed_before", "n_rounds"), [(1.9, 3, 7), (2.1, 1, 3)])
def test_calls_of_seconds_are_taken_in_three_rounds(seconds: float, timed_before: int, n_rounds: int) -> None:
    machine, calls = FakeMachine(forever(1e-5)), []
    samples = machine.timer().rounds({"a": lambda: (calls.append(0), machine.spend(seconds))}, Budget(3.0, 7))
    assert (len(samples["a"]), len(calls)) == (n_rounds, timed_before + n_rounds)


def test_short_calls_are_repeated_within_a_sample() -> None:
    machine = FakeMachine(forever(1e-5))
    samples = machine.timer().rounds({"a": machine.work(forever(1e-4))}, Budget(0.0, 2))
    assert samples["a"] == pytest.approx([1e-4, 1e-4])
    assert machine.time > 2 * timer.SHORTEST_SAMPLE


def test_a_disturbed_sample_is_repeated() -> None:
    disturbed = [1e-5, 1e-5, 8e-3]
    # Disturbed after the first sample, which takes 0.9, then before the next.
    machine = FakeMachine(forever(1e-5, *CALIBRATION, *QUIET, *disturbed, *disturbed))
    timed = machine.work(forever(0.5, 0.5, 0.5, 0.5, 0.9))
    found = machine.timer()
    assert found.rounds({"a": timed}, Budget(0.0, 3))["a"] == pytest.approx([0.5, 0.5, 0.5])
    assert (found.kept, found.discarded) == (3, 2)


def test_threads_that_have_to_wake_up_are_no_disturbance() -> None:
    machine = FakeMachine(forever(1e-5, *CALIBRATION, *QUIET, 4e-3, 8e-3))
    found = machine.timer()
    found.rounds({"a": machine.work(forever(0.5))}, Budget(0.0, 3))
    assert (found.kept, found.discarded) == (3, 0)


def test_a_machine_that_becomes_busy_is_refused() -> None:
    machine = FakeMachine(forever(8e-3, *CALIBRATION))
    found = machine.timer()
    with pytest.raises(MachineBusyError, match=f"{timer.PATIENCE + 1} samples were disturbed, 0 were not"):
        found.rounds({"a": machine.work(forever(0.5))}, Budget())


def test_a_busy_machine_is_one_line_with_advice_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("bench.__main__.Timer", FakeMachine(forever(8e-3)).timer)
    result = bench_support.run("cross_entropy", "--quick", "--json", tmp_path / "a.json")
    assert result.exit_code == 2
    found = "an empty parallel region takes 8.0 ms; less than 0.1 ms is normal, and 1 ms is the limit"
    assert result.stderr == f"bench: the machine is busy: {found}. {timer.ADVICE}\n"
    assert not (tmp_path / "a.json").exists()


def test_ctrl_c_is_one_line(quiet: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("bench.__main__.measure", interrupted)
    result = bench_support.run("cross_entropy", "--quick")
    assert (result.exit_code, result.stderr) == (130, "bench: interrupted\n")


class FakeGpu:
    """A GPU that runs its queue when an event is read, or after it has idled for a given time.

    `python` moves the clock of Python; the kernels of a call take `seconds` on the GPU.
    """

    def __init__(self) -> None:
        self.python = self.gpu = 0.0
        self.idle: list[float] = []

    def sleep(self, cycles: int) -> None:
        self.idle.append(cycles / timer.CYCLES_A_SECOND)
        self.gpu = max(self.gpu, self.python) + self.idle[-1]

    def call(self, launching: float, seconds: float) -> None:
        self.python += launching
        self.gpu = max(self.gpu, self.python) + seconds

    def event(gpu, enable_timing: bool) -> Any:
        class Event:
            def record(self) -> None:
                self.at = max(gpu.gpu, gpu.python)

            def query(self) -> bool:
                return gpu.python > self.at

            def elapsed_time(self, end: Any) -> float:
                return 1e3 * (end.at - self.at)

        return Event()


def test_on_a_gpu_a_sample_is_the_gpus_time_and_a_late_one_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = FakeGpu()
    monkeypatch.setattr(timer, "FLUSH_BYTES", 1)
    monkeypatch.setattr(torch.cuda, "Event", gpu.event)
    monkeypatch.setattr(torch.cuda, "_sleep", gpu.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: setattr(gpu, "python", max(gpu.python, gpu.gpu)))
    monkeypatch.setattr(timer.time, "perf_counter", lambda: gpu.python)
    found = GpuTimer(device="cpu")
    # Launching the second takes longer than the GPU ever idles.
    calls = {"quick": lambda: gpu.call(1e-3, 5e-5), "slow": lambda: gpu.call(0.05, 5e-5)}
    samples = found.rounds(calls, Budget(0.0, 4))
    assert samples["quick"] == pytest.approx([5e-5] * 4)
    assert min(samples["slow"]) > 0.02
    assert found.late == {"quick": 0, "slow": 4}
    assert gpu.idle[-2:] == pytest.approx([2e-3, timer.MOST_IDLE])
