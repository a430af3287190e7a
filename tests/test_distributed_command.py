"""`charlm train` in several processes: what ends a run, what restarts it, and what it says about bad input."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from distributed_support import results_of_processes
from launch_support import ends, free_port, start, torchrun, workers
from lm_support import fails, succeeds

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.config import Config
from charlm.lm.data import read_text
from charlm.lm.metrics import METRICS
from charlm.lm.parallel import check_parallel
from charlm.lm.processes import Launch, Processes
from charlm.lm.stop import StopRequest

KILLS = int(os.environ.get("CHARLM_KILLS", "2"))
SMALL = ("--batch-size", 32, "--log-interval", 5, "--timeout", 60)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("\n".join(read_text(None).split("\n")[:300]))
    return path


def lines(run: Path) -> list[tuple[int, str, float]]:
    """The lines of the metrics, but for the speed; the last one may be half written."""
    path = run / METRICS
    text = path.read_text() if path.exists() else ""
    found = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return [(line["step"], line["split"], line["nats"]) for line in found]


def wait_for_step(run: Path, step: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not any(found >= step for found, *_ in lines(run)):
        assert time.monotonic() < end
        time.sleep(0.01)


# ---- the end of a rank


GPT = ("--type", "gpt", "--n-layer", 1, "--n-embd", 16, "--n-head", 2, "--parallel", "fsdp")


@pytest.mark.exhaustive
@pytest.mark.parametrize("model", [("--n-hidden", 16), GPT], ids=["ddp", "fsdp"])
def test_a_killed_rank_costs_a_restart_and_changes_nothing(
    tmp_path: Path, data: Path, model: tuple[str | int, ...]
) -> None:
    """CHARLM_KILLS=20 kills 20 times."""
    steps, interval = 200 + 100 * KILLS, 40
    flags = ("-i", data, *model, *SMALL, "--max-steps", steps, "--eval-interval", interval)
    whole = torchrun(2, "-o", tmp_path / "whole", *flags)
    assert ends([whole], seconds=60 + 60 * KILLS)[0][0] == 0
    seed = random.randrange(10**6)
    chosen = random.Random(seed)
    killed = torchrun(2, "-o", tmp_path / "run", *flags, max_restarts=KILLS)
    print("seed", seed)
    repeated = 0
    for step in sorted(chosen.sample(range(interval, steps - interval), KILLS)):
        wait_for_step(tmp_path / "run", step)
        while len(running := workers(killed)) < 2:
            time.sleep(0.01)
        rank = chosen.randrange(2)
        os.kill(running[rank], signal.SIGKILL)
        reached, saved = lines(tmp_path / "run")[-1][0], checkpoint.load(tmp_path / "run").step
        print(f"killed rank {rank} after step {reached}; the checkpoint is that of step {saved}")
        repeated = max(repeated, reached - saved)
        while any(running[rank] == process for process in workers(killed).values()):
            time.sleep(0.01)
    code, _, errors = ends([killed], seconds=60 + 60 * KILLS)[0]
    assert code == 0, errors
    # An interval, and the steps made while a checkpoint was written: the next one waits until it is.
    assert repeated < 2 * interval
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    ours, theirs = checkpoint.load(tmp_path / "run"), checkpoint.load(tmp_path / "whole")
    assert (ours.best_step, ours.best_nats) == (theirs.best_step, theirs.best_nats)
    assert all(tensor.equal(theirs.training[name]) for name, tensor in ours.training.items())
    diagnostics = set() if model is GPT else {"diagnostics.jsonl"}  # a sharded run has none
    assert {path.name.partition("-")[0] for path in (tmp_path / "run").iterdir()} == {
        *("checkpoint.json", "metrics.jsonl", "metrics.csv", "model", "training"),
        *diagnostics,
    }


@pytest.mark.exhaustive
def test_a_terminated_run_is_saved_once_and_goes_on_in_one_process(tmp_path: Path, data: Path) -> None:
    flags = ("-i", data, *SMALL, "--max-steps", 3000, "--eval-interval", 100, "-o", tmp_path / "run")
    launched = torchrun(2, *flags)
    wait_for_step(tmp_path / "run", 100)
    running = workers(launched)
    for pid in running.values():  # as a terminal sends it to all, before torchrun does so again
        os.kill(pid, signal.SIGTERM)
    launched.terminate()
    _, output, errors = ends([launched])[0]
    saved = checkpoint.load(tmp_path / "run")
    assert 100 <= saved.step < 3000
    assert output.count(f"stopped at step {saved.step} of 3000 and saved in") == 1, errors
    assert "charlm: rank" not in errors
    succeeds("train", "-o", tmp_path / "run", "--resume", "--max-steps", saved.step + 5)
    assert checkpoint.load(tmp_path / "run").step == saved.step + 5


@pytest.mark.exhaustive
def test_a_rank_that_hangs_is_named_by_the_others(tmp_path: Path, data: Path) -> None:
    flags = ("-i", data, "-o", tmp_path / "run", *SMALL[:-1], 4, "--max-steps", 10**6, "--eval-interval", 50)
    processes = start(3, *flags)
    try:
        wait_for_step(tmp_path / "run", 50)
        os.kill(processes[1].pid, signal.SIGSTOP)
        for rank in (0, 2):
            code, _, errors = ends([processes[rank]], seconds=60)[0]
            last = errors.strip().splitlines()[-1]
            assert code == 2
            assert last == (f"charlm: rank {rank}: rank 1 has ended, or has not answered for 4 s: training stops")
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    assert checkpoint.load(tmp_path / "run").step >= 50


# ---- bad input


def test_ranks_with_different_data_are_refused_and_nothing_is_written(tmp_path: Path, data: Path) -> None:
    other = tmp_path / "other.txt"
    other.write_text("one\ntwo\nthree\nfour\n")
    found = ends(start(2, "-i", data, "-o", tmp_path / "run", *SMALL, of_rank={1: ("-i", other)}))
    for rank, (code, _, errors) in enumerate(found):
        assert code == 2
        assert errors == f"charlm: rank {rank}: the data of rank 1 differ from those of rank 0\n"
    assert not (tmp_path / "run").exists()


def check(values: dict[str, str]) -> str:
    import torch.distributed as dist

    processes = Processes(Launch(dist.get_rank(), dist.get_world_size()))
    if processes.rank == 1:
        values = {**values, "options": "others"}
    try:
        processes.check_equal({"data": values["data"]})
        processes.check_equal(values)
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.exhaustive
def test_all_ranks_learn_of_the_rank_with_other_options(tmp_path: Path) -> None:
    found = results_of_processes(3, tmp_path / "group", check, {"data": "a", "options": "b"})
    assert found == ["the options of rank 1 differ from those of rank 0"] * 3


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0', but must be a number and at least 1"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two', but must be a number and at least 1"),
        ({"WORLD_SIZE": "-1"}, "WORLD_SIZE is '-1', but must be a number"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is set but RANK is not: start charlm with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2, but must be below WORLD_SIZE, which is 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "x"}, "LOCAL_RANK is 'x', but must be a number"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_WORLD_SIZE": "0"}, "LOCAL_WORLD_SIZE is '0', but must be a number"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "rank 1: MASTER_ADDR and MASTER_PORT are not both set"),
        (
            {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "x"},
            "rank 1: cannot meet the other processes at 127.0.0.1:x",
        ),
    ],
    ids=str,
)
def test_an_environment_that_cannot_be_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], words: str
) -> None:
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert words in fails("train", "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.exhaustive
def test_a_master_that_cannot_be_reached_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    port = str(free_port())
    for name, value in {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    message = fails("train", "-o", tmp_path / "run", "--timeout", 1)
    assert message == f"charlm: rank 1: cannot meet the other processes at 127.0.0.1:{port} within 1 s\n"
    assert time.monotonic() - began < 30


@pytest.mark.parametrize("timeout", [0, -1, "nan", "inf", 1e9])
def test_a_timeout_that_cannot_be_is_one_sentence(tmp_path: Path, timeout: Any) -> None:
    assert "but must be above 0 and at most" in fails("train", "-o", tmp_path / "run", "--timeout", timeout)


def test_standard_input_is_refused_where_several_would_read_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert "rank 0: standard input and pipes can be read by one process only" in fails(
        "train", "-i", "-", "-o", tmp_path / "run"
    )


@pytest.mark.parametrize(
    ("size", "parallel", "options", "words"),
    [
        (5, "ddp", {"batch_size": 4}, "batch_size is 4, but must be at least the number of processes, 5"),
        (2, "tensor", {}, "parallel is 'tensor', but must be ddp or fsdp"),
        (2, "fsdp", {}, "parallel is fsdp, which shards the gpt; the mlp takes ddp"),
        (1, "fsdp", {"type": "gpt"}, "over the processes of torchrun"),
        (2, "fsdp", {"type": "gpt", "compile": True}, "--compile does not go with --parallel fsdp"),
    ],
)
def test_what_processes_cannot_train_together_is_refused(
    size: int, parallel: str, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        check_parallel(parallel, Config(**options), Processes(Launch(0, size)))


@pytest.mark.parametrize(
    ("device", "words"),
    [("cuda", "needs a GPU for each process of a machine"), ("cuda:0", "which is one GPU for 2 processes")],
)
def test_a_gpu_that_is_not_there_is_refused(monkeypatch: pytest.MonkeyPatch, device: str, words: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match=words):
        Processes(Launch(1, 2, 1)).device(device)
    assert Processes(Launch(1, 2, 1)).device("cpu") == "cpu"


def test_shares_are_all_in_order_and_differ_by_one_at_most() -> None:
    for size in (1, 2, 3, 7):
        for count in (0, 1, 6, 20):
            parts = [Processes(Launch(rank, size)).share(count) for rank in range(size)]
            assert [i for part in parts for i in range(count)[part]] == list(range(count))
            sizes = [part.stop - part.start for part in parts]
            assert max(sizes) - min(sizes) <= 1


def test_signals_that_torchrun_repeats_do_not_interrupt_the_saving() -> None:
    with StopRequest(ignores_repeats=True).listening() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
