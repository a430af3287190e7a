"""Training in several processes is training in one: the same losses, and the same state after a resume."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_support import processes, results_of_processes
from lm_support import StopAt

from charlm.lm import checkpoint
from charlm.lm.config import NETWORKS, Config
from charlm.lm.data import build_corpus, read_text
from charlm.lm.evaluate import evaluate, predictions
from charlm.lm.memory import estimate_bytes
from charlm.lm.metrics import METRICS
from charlm.lm.processes import Launch
from charlm.lm.train import Trainer

CORPUS = build_corpus("\n".join(read_text(None).split("\n")[:300]))
SMALL = {"block_size": 4, "n_embd": 4, "n_hidden": 12, "max_steps": 200, "eval_interval": 50, "warmup_steps": 10}
TRAINING = {**SMALL, "learning_rate": 3e-3, "log_interval": 5, "dropout": 0.2, "token_noise": 0.1}
CONFIGS = {
    "mlp": Config.of_type("mlp", **TRAINING, batch_size=11, gradient_accumulation_steps=2, grad_clip=0.5),
    "mlp with batch norm": Config.of_type("mlp", **TRAINING, batch_size=10, batch_norm=True),
    "wavenet": Config.of_type("wavenet", **TRAINING, batch_size=10),
    "bow": Config.of_type("bow", **TRAINING, batch_size=7),
    "rnn": Config.of_type("rnn", **TRAINING, batch_size=7),
    "gru": Config.of_type("gru", **{**TRAINING, "block_size": 6}, n_layer=2, batch_size=6),
    "lstm": Config.of_type("lstm", **TRAINING, batch_size=7, gradient_accumulation_steps=2),
    "gpt": Config.of_type(
        "gpt", **{**TRAINING, "n_embd": 8, "block_size": 6}, n_head=2, n_layer=2, batch_size=6, grad_clip=0.5
    ),
    "mlp mixed with an n-gram": Config.of_type("mlp", **{**TRAINING, "max_steps": 20}, batch_size=8, mix_ngram=3),
    "bigram": Config.of_type("bigram"),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
TOLERANCE = {"float32": 1e-5, "float64": 1e-9}
# The runs of each number of processes: name, dtype, parallel, steps.
CASES = {
    2: [
        *[(name, "float32", "ddp", 200) for name in CONFIGS],
        *[(name, "float64", "ddp", 40) for name in ("mlp", "mlp with batch norm", *NETWORKS[1:])],
        ("gpt", "float32", "fsdp", 200),
    ],
    4: [
        ("mlp", "float32", "ddp", 200),
        ("mlp with batch norm", "float32", "ddp", 200),
        ("wavenet", "float32", "ddp", 200),
        ("gru", "float32", "ddp", 200),
        ("gpt", "float32", "ddp", 200),
        ("wavenet", "float64", "ddp", 40),
        ("gpt", "float64", "fsdp", 20),
    ],
}
FEW = {(2, "mlp", "float32", "ddp", 200), (2, "gru", "float64", "ddp", 40), (2, "gpt", "float32", "fsdp", 200)}
ALL_CASES = [
    pytest.param(size, *case, marks=[] if (size, *case) in FEW else [pytest.mark.exhaustive])
    for size, cases in CASES.items()
    for case in cases
]


def losses(directory: Path) -> list[tuple[int, str, float]]:
    lines = map(json.loads, (directory / METRICS).read_text().splitlines())
    return [(line["step"], line["split"], line["nats"]) for line in lines]


def train(name: str, dtype: str, parallel: str, steps: int, directory: Path) -> Any:
    """Trains in `directory`, in every process; returns what all have to agree on."""
    config = CONFIGS[name]
    config = replace(config, max_steps=min(steps, config.max_steps), eval_interval=min(steps, 50))
    torch.set_default_dtype(DTYPES[dtype])
    try:
        trainer = Trainer(config, CORPUS, directory, processes=processes(), parallel=parallel)
        assert trainer.run()
        check_final_evaluation(trainer)
    finally:
        torch.set_default_dtype(torch.float32)
    return trainer.step, trainer.best_step, trainer.best_nats


def check_final_evaluation(trainer: Trainer) -> None:
    """Each process evaluates its share; the total is the loss of the whole model."""
    totals: list[int] = []
    result, model = trainer.evaluate_best(lambda done, total: totals.append(total)), trainer.whole_model()
    if trainer.processes.rank == 0:
        assert model is not None
        whole = evaluate(model, predictions(model, CORPUS, "dev"), "dev")
        assert result.nats == pytest.approx(whole.nats, rel=1e-6)
        assert result.tokens == whole.tokens
        assert totals[-1] == pytest.approx(whole.tokens / trainer.processes.size, rel=0.2)


def train_all(cases: list[tuple[str, str, str, int]], folder: str) -> list[Any]:
    return [train(*case, Path(folder, "-".join(map(str, case)))) for case in cases]


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a folder per number of processes, which has a run per selected case."""
    folder = tmp_path_factory.mktemp("runs")
    here = [item for item in request.session.items if item.path == request.path]
    selected = {tuple(item.callspec.params.values()) for item in here if hasattr(item, "callspec")}
    for size, all_cases in CASES.items():
        if cases := [case for case in all_cases if (size, *case) in selected]:
            ends = results_of_processes(size, folder / str(size), train_all, cases, str(folder / str(size)))
            assert all(end == ends[0] for end in ends)
    return folder


@pytest.mark.exhaustive
@pytest.mark.parametrize(("size", "name", "dtype", "parallel", "steps"), ALL_CASES)
def test_several_processes_have_the_losses_of_one(
    tmp_path: Path, runs: Path, size: int, name: str, dtype: str, parallel: str, steps: int
) -> None:
    ours = runs / str(size) / f"{name}-{dtype}-{parallel}-{steps}"
    train(name, dtype, "ddp", steps, tmp_path)
    our_lines, their_lines = losses(ours), losses(tmp_path)
    assert [line[:2] for line in our_lines] == [line[:2] for line in their_lines]
    for (*_, actual), (*_, expected) in zip(our_lines, their_lines, strict=True):
        assert actual == pytest.approx(expected, rel=0, abs=TOLERANCE[dtype])
    saved, expected = checkpoint.load(ours), checkpoint.load(tmp_path)
    assert {key: value.shape for key, value in saved.training.items()} == {
        key: value.shape for key, value in expected.training.items()
    }
    assert saved.build_model()(torch.zeros(1, saved.config.block_size, dtype=torch.uint8))[0].isfinite().all()


# ---- resuming in another number of processes

STOPPED = {
    "mlp": replace(CONFIGS["mlp with batch norm"], max_steps=60, eval_interval=20, gradient_accumulation_steps=2),
    "gpt": replace(CONFIGS["gpt"], max_steps=40, eval_interval=20),
}


PARALLEL = {"mlp": "ddp", "gpt": "fsdp"}


def train_parts(folder: str, stop: int) -> None:
    """Begins the runs, or resumes them, and stops them at a step."""
    for name, config in STOPPED.items():
        run = Path(folder, name)
        saved = checkpoint.load(run) if checkpoint.exists(run) else None
        parallel = PARALLEL[name] if torch.distributed.is_initialized() else "ddp"
        trainer = Trainer(config, CORPUS, run, saved, processes=processes(), parallel=parallel)
        trainer.run(stop=StopAt(trainer, stop))


@pytest.mark.exhaustive
def test_a_run_goes_on_in_another_number_of_processes(tmp_path: Path) -> None:
    runs, whole = str(tmp_path / "runs"), str(tmp_path / "whole")
    train_parts(whole, 1000)
    results_of_processes(2, tmp_path / "two", train_parts, runs, 13)
    train_parts(runs, 23)
    results_of_processes(3, tmp_path / "three", train_parts, runs, 1000)
    for name in STOPPED:
        our_lines, their_lines = losses(Path(runs, name)), losses(Path(whole, name))
        assert [line[:2] for line in our_lines] == [line[:2] for line in their_lines]
        for (*_, actual), (*_, expected) in zip(our_lines, their_lines, strict=True):
            assert actual == pytest.approx(expected, rel=0, abs=1e-5)


# ---- memory

LARGE = {
    "ddp": Config.of_type("mlp", max_steps=2, n_hidden=20_000, block_size=64, n_embd=32),
    "fsdp": Config.of_type("gpt", max_steps=2, n_embd=640, n_head=4, n_layer=6, batch_size=4, eval_tokens=100),
}


def memory_taken(parallel: str, folder: str) -> int:
    """The peak memory of a run in this process, beyond what it had before."""

    def peak() -> int:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found
        return int(found[1]) * 1024

    if parallel == "fsdp":
        importlib.import_module("torch.distributed.fsdp")
    before = peak()
    Trainer(LARGE[parallel], CORPUS, Path(folder), processes=processes(), parallel=parallel).run()
    return peak() - before


@pytest.mark.exhaustive
@pytest.mark.parametrize("parallel", list(LARGE))
def test_the_memory_of_two_processes_is_within_a_factor_of_two_of_the_estimate(tmp_path: Path, parallel: str) -> None:
    taken = sum(results_of_processes(2, tmp_path / "group", memory_taken, parallel, str(tmp_path / "run")))
    assert 0.5 < taken / estimate_bytes(LARGE[parallel], CORPUS, Launch(0, 2, 0, 2), parallel) < 2


@pytest.mark.parametrize(("device", "processes"), [("cpu", 2), ("cuda", 1)])
def test_processes_of_a_machine_share_its_memory_but_not_a_gpu(device: str, processes: int) -> None:
    config = replace(LARGE["fsdp"], device=device)
    alone = estimate_bytes(config, CORPUS, Launch(0, 8, 0, 1), "fsdp")
    assert estimate_bytes(config, CORPUS, Launch(0, 8, 0, 2), "fsdp") == processes * alone
    assert alone < estimate_bytes(config, CORPUS) / 4


def test_training_in_one_process_imports_neither_fsdp_nor_dtensor() -> None:
    heavy = ("torch.distributed.fsdp", "torch.distributed.tensor")
    code = f"import sys, charlm.cli, charlm.lm.train; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
