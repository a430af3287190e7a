"""Measures training in 1, 2 and 4 processes on this machine, and the exchange of the vocabulary-parallel loss.

    python scripts/scale.py bench/results/scale.json

The numbers of processes take turns, in ROUNDS rounds of one thread a process; medians are written. With more processes
than cores the figures show that training is right, not that it is fast. docs/scale.md explains them.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from charlm.lm.config import Config
from charlm.lm.data import read_corpus
from charlm.lm.processes import Launch, Processes, joined
from charlm.lm.train import Progress, Trainer

SIZES = (1, 2, 4)
ROUNDS = 3
# Of the training runs: the first report, which includes warm-up, is not counted.
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "mlp, ddp": ("ddp", {"type": "mlp", "max_steps": 120, "log_interval": 40}),
    "gpt, ddp": ("ddp", {"type": "gpt", "max_steps": 30, "log_interval": 10}),
    "gpt, fsdp": ("fsdp", {"type": "gpt", "max_steps": 30, "log_interval": 10}),
}
EXCHANGED_ROWS = (256, 4096, 65536)
REPEATS = 50


def measure(processes: Processes) -> dict[str, Any]:
    """What one launch measures, in each of its processes."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name, (parallel, options) in RUNS.items():
        if processes.size == 1 and parallel == "fsdp":
            continue
        found[name] = of_training(processes, parallel, options)
    if processes.size > 1:
        found["exchange"] = {str(rows): of_exchange(rows) for rows in EXCHANGED_ROWS}
    return found


def of_training(processes: Processes, parallel: str, options: dict[str, Any]) -> dict[str, float]:
    """Tokens per second of all processes together, and the share of the time that collectives take in this process."""
    corpus = read_corpus(None)
    config = Config.of_type(**options, eval_interval=options["max_steps"])
    speeds = []

    def report(progress: Progress) -> None:
        if progress.split == "train":
            speeds.append(progress.tokens_per_second)

    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(config, corpus, Path(folder), processes=processes, parallel=parallel)
        parameters = sum(parameter.numel() for parameter in trainer.model.parameters())
        start = time.perf_counter()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            trainer.run(report)
        seconds = time.perf_counter() - start
        processes.wait()
    collectives = [event for event in profile.key_averages() if event.key.startswith("gloo:")]
    share = sum(event.cpu_time_total for event in collectives) / 1e6 / seconds
    return {"tokens_per_second": statistics.median(speeds[1:]), "collectives": share, "parameters": parameters}


def of_exchange(rows: int) -> dict[str, float]:
    """Microseconds of one all-gather of (maximum, sum, target) of each row, and of two all-reduces of the same."""
    size = dist.get_world_size()
    own, gathered = torch.rand(3 * rows), torch.empty(size * 3 * rows)
    maximum, rest = torch.rand(rows), torch.rand(2 * rows)

    def two_reductions() -> None:
        dist.all_reduce(maximum, dist.ReduceOp.MAX)
        dist.all_reduce(rest)

    all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    ways: dict[str, Callable[[], object]] = {
        "all_gather": lambda: all_gather(gathered, own),
        "two_all_reduces": two_reductions,
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, way in ways.items():
            dist.barrier()
            start = time.perf_counter()
            way()
            times[name].append(1e6 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def launch(size: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(size)]
        subprocess.run(
            [*command, __file__, "--worker", str(output)], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        return json.loads(output.read_text(encoding="utf-8"))


def median_of(found: list[Any]) -> Any:
    """The medians of dictionaries of the same keys."""
    if isinstance(found[0], dict):
        return {key: median_of([one[key] for one in found]) for key in found[0]}
    return statistics.median(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        with joined(Launch.from_environment(), 300) as processes:
            found = measure(processes)
            if processes.rank == 0:
                arguments.output.write_text(json.dumps(found), encoding="utf-8")
        os._exit(0)  # a thread of gloo may still hold tensors, and aborts a process that is finalized
    rounds: dict[int, list[Any]] = {size: [] for size in SIZES}
    for _ in range(ROUNDS):
        for size in SIZES:
            rounds[size].append(launch(size))
    record = {
        "torch": torch.__version__,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "rounds": ROUNDS,
        "processes": {str(size): median_of(found) for size, found in rounds.items()},
    }
    arguments.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
