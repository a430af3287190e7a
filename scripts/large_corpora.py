"""Measures training on a text and a list of names of 500 MB, their batches, and counting n-grams, for docs/scale.md.

    python scripts/large_corpora.py TEXT bench/results/large_corpora.json

TEXT is any UTF-8 file of running text; pieces of it are repeated. N-grams are counted of its first 100 million
characters. It takes about five minutes and 4 GB of disk.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

BYTES = 500_000_000
COUNTED = 100_000_000  # characters
REPEATS = 3
BATCHED_BYTES, BATCHES = 20_000_000, 20_000  # of which, and how many, random batches are timed
STEP = """
import os, sys, time
import torch
def megabytes(kind):
    line = next(line for line in open("/proc/self/status") if line.startswith(kind))
    return int(line.split()[1]) / 1000
before = megabytes("VmRSS"), megabytes("RssAnon")
from charlm import cli
from charlm.lm.train import Trainer
step = Trainer._backward
def first_step(self, *arguments):
    step(self, *arguments)
    print("RESULT", time.time() - float(os.environ["START"]), megabytes("VmHWM") - before[0], flush=True)
    os._exit(0)
Trainer._backward = first_step
sys.argv = ["charlm", "train", *sys.argv[1:]]
cli.main()
"""
COUNT = """
import sys, time
import numpy as np
from charlm import ngrams
tokens = np.load(sys.argv[1], mmap_mode="r")
memory = int(sys.argv[2]) or None
start = time.perf_counter()
ngrams.count_spectra(tokens, 6, memory=memory)
print("RESULT", time.perf_counter() - start)
"""


def write_text(source: Path, target: Path) -> None:
    text, chance, written = source.read_text(encoding="utf-8"), random.Random(1), 0
    with target.open("w", encoding="utf-8") as file:
        while written < BYTES:
            at = chance.randrange(max(1, len(text) - 2_000_000))
            written += file.write(text[at : at + 2_000_000])


def write_names(target: Path) -> None:
    from charlm.lm.data import read_text

    names, chance, written = read_text(None).split(), random.Random(1), 0
    with target.open("w", encoding="utf-8") as file:
        while written < BYTES:
            first, second = chance.choices(names, k=100_000), chance.choices(names, k=100_000)
            written += file.write("".join(f"{a}{b[:3]}\n" for a, b in zip(first, second, strict=True)))


def numbers(*command: str | Path, **environment: str) -> list[float]:
    """What a process prints behind RESULT."""
    done = subprocess.run(
        [sys.executable, *command], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return [float(number) for number in done.stdout.split("RESULT")[1].split()]


def first_step(data: Path, folder: Path, type: str) -> dict[str, float]:
    found = []
    for _ in range(REPEATS):
        with tempfile.TemporaryDirectory(dir=folder) as out:
            arguments = ("-i", data, "-o", Path(out) / "run", "--type", type)
            cache = str(Path(out) / "cache")
            found.append(numbers("-c", STEP, *arguments, START=str(time.time()), XDG_CACHE_HOME=cache))
    seconds, peak = (statistics.median(column) for column in zip(*found, strict=True))
    return {"seconds": seconds, "peak_mb": peak}


def prepare(data: Path, target: Path) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "charlm", "prepare", data, "-o", target], check=True, capture_output=True)
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("text", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    found: dict[str, Any] = {"torch": torch.__version__, "cores": os.cpu_count(), "repeats": REPEATS, "bytes": BYTES}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_text(arguments.text, folder / "text.txt")
        write_names(folder / "names.txt")
        found["text, mlp, not prepared"] = first_step(folder / "text.txt", folder, "mlp")
        for data in ("text", "names"):
            found[f"prepare {data}"] = {"seconds": prepare(folder / f"{data}.txt", folder / data)}
            found[f"random batches, {data}"] = time_batches(folder / f"{data}.txt", folder)
            for type in ("mlp", "gpt"):
                found[f"{data}, {type}, prepared"] = first_step(folder / data, folder, type)
        found["names"] = sum(1 for _ in (folder / "names.txt").open("rb"))
        count_ngrams(arguments.text, folder, found)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def time_batches(data: Path, folder: Path) -> dict[str, dict[str, float]]:
    """Random rows of the beginning of `data`, from memory and from shards in turn: medians in µs, and their ratio."""
    from charlm.lm.data import read_corpus
    from charlm.lm.shards import load

    head = folder / "head.txt"
    with data.open("rb") as file:
        head.write_bytes(file.read(BATCHED_BYTES).rpartition(b"\n")[0])
    prepare(head, folder / "head")
    corpora = {"memory": read_corpus(head), "shards": load(folder / "head")}
    examples = {name: corpus.examples("train", 8) for name, corpus in corpora.items()}
    found = {}
    for batch in (32, 4096):
        times: dict[str, list[float]] = {name: [] for name in corpora}
        for _ in range(BATCHES):
            for name, rows in examples.items():
                chosen = torch.randint(len(rows), (batch,))
                start = time.perf_counter()
                rows.select(chosen)
                times[name].append(1e6 * (time.perf_counter() - start))
        median = {name: statistics.median(values) for name, values in times.items()}
        found[f"batch {batch}"] = {**median, "speed of shards": median["memory"] / median["shards"]}
    head.unlink()
    shutil.rmtree(folder / "head")
    return found


def count_ngrams(text: Path, folder: Path, found: dict[str, Any]) -> None:
    import numpy as np

    from charlm import ngrams

    with text.open(encoding="utf-8") as file:
        symbols, tokens = np.unique(ngrams.as_tokens(file.read(COUNTED)), return_inverse=True)
    np.save(folder / "tokens.npy", tokens.astype(np.uint16))
    for memory in (0, BYTES):
        runs = [numbers("-c", COUNT, folder / "tokens.npy", str(memory), OMP_NUM_THREADS="2") for _ in range(REPEATS)]
        seconds = statistics.median(run[0] for run in runs)
        found[f"n-grams up to length 6, memory {memory}"] = {
            "seconds": seconds, "tokens": len(tokens), "symbols": len(symbols),
        }  # fmt: skip


if __name__ == "__main__":
    main()
