"""What docs/benchmarks.md says of the models, from recorded runs of the command line.

    python -m bench.studies.models NAMES    trains the configurations that bench/results/models.json lacks (an hour
                                            for all of them, without that file), and adds them to it
    python -m bench.studies.models          prints the table of docs/benchmarks.md from that file

NAMES is makemore's names.txt (32,033 names, sha256 0a30b555…8cc4d), with which others have published results. The
running text is all of Python's standard library, which every machine has: its .py files, by path.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
import sys
import sysconfig
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from bench.record import RESULTS, processor

RECORD = RESULTS / "models.json"
SHIPPED, MAKEMORE, LIBRARY = "the names that ship", "makemore's names.txt", "Python's standard library"
LECTURE = (
    "--block-size 3 --n-embd 10 --n-hidden 200 --max-steps 200000 --batch-size 32 "
    "--optimizer sgd --schedule step -l 0.1 -w 0 --dropout 0 --warmup-steps 0 --no-mix"
)
NANOGPT = (  # the model that it gives for a CPU
    "--type gpt --block-size 64 --n-layer 4 --n-head 4 --n-embd 128 --dropout 0 "
    "--batch-size 32 --max-steps 4000 --eval-interval 4000 -l 2e-3"
)
RUNS = [
    (SHIPPED, ""),
    (MAKEMORE, ""),
    (SHIPPED, "--type mlp --no-mix"),
    (MAKEMORE, "--type bigram"),
    (MAKEMORE, "--type ngram --order 3"),
    (MAKEMORE, "--type ngram --order 6"),
    (MAKEMORE, LECTURE),
    (MAKEMORE, "--type mlp --no-mix"),
    (MAKEMORE, "--type wavenet --no-mix"),
    (MAKEMORE, "--type wavenet --max-steps 20000 --no-mix"),
    (LIBRARY, "--type ngram --order 6"),
    (LIBRARY, f"{NANOGPT} --no-mix"),
    (LIBRARY, f"{NANOGPT} --mix-ngram 7 --mix-tokens 100000000"),  # all of train is counted
    (MAKEMORE, "--type gpt --no-mix"),
    (MAKEMORE, "--type gpt --n-embd 96 --token-noise 0.05 --max-steps 8000 -l 2e-3 --no-mix"),
]

# `charlm train` of a process that has imported all it needs: prints on stderr how long it takes from there on.
TIMED = """
import sys, time
from charlm.cli import app
import charlm.lm.checkpoint, charlm.lm.display, charlm.lm.evaluate, charlm.lm.sample, charlm.lm.train
start = time.perf_counter()
app(sys.argv[1:], prog_name="charlm", standalone_mode=False)
print(time.perf_counter() - start, file=sys.stderr)
"""


def record(names: Path) -> None:
    """Runs configurations once, and writes what each reached as soon as it has, in the order of RUNS."""
    import torch

    versions = {"torch": torch.__version__, "python": platform.python_version()}
    machine = {"architecture": platform.machine(), "threads": torch.get_num_threads(), **versions}
    recorded = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {"machine": machine, "runs": []}
    if recorded["machine"] != machine:
        raise SystemExit(f"{RECORD} is of another kind of machine: {recorded['machine']}, not {machine}")
    done = {(run["data"], run["flags"]): run for run in recorded["runs"]}
    with tempfile.TemporaryDirectory() as folder:
        sources = {SHIPPED: None, MAKEMORE: names, LIBRARY: _library(Path(folder))}
        for data, flags in RUNS:
            if (data, flags) not in done:
                done[data, flags] = {**_run(data, flags, sources[data]), "processor": processor()}
            runs = [done[key] for key in RUNS if key in done]
            RECORD.write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n", encoding="utf-8")


def _library(folder: Path) -> Path:
    """The .py files of this Python's standard library that are UTF-8, one after the other by path, in one file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = (path.relative_to(root) for path in root.rglob("*.py") if path.is_file())
    kept = sorted(path.as_posix() for path in paths if "site-packages" not in path.parts)
    target = folder / "library.txt"
    with target.open("w", encoding="utf-8", newline="") as out:
        for path in kept:
            raw = (root / path).read_bytes()
            with suppress(UnicodeDecodeError):  # tests of the parser are in other encodings
                out.write(raw.decode("utf-8"))
    return target


def _run(data: str, flags: str, file: Path | None) -> dict[str, Any]:
    from charlm.lm.examples import PROTOCOLS

    source = ["-i", str(file)] if file else []
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-c", TIMED, "train", *source, "-o", folder, "--overwrite", *flags.split()]
        start = time.perf_counter()
        done = subprocess.run(command, check=True, stdout=sys.stderr, stderr=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - start
        command = [sys.executable, "-m", "charlm", "compare", folder, "--split", "dev", "--json"]
        compared = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = json.loads(compared)["models"][0]
    return {
        "data": data,
        "flags": flags,
        "seconds": seconds,
        "seconds_without_imports": float(done.stderr.split()[-1]),
        "parameters": row["parameters"],
        "dev_nats": row["nats"],
        "protocol": PROTOCOLS[row["protocol"]],
        "standard_error": row["standard_error"],
    }


def table() -> str:
    """The table of docs/benchmarks.md, in Markdown, from the record."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = [
        "| data | `charlm train` with | parameters | dev nats | ± | bits per character | whole command |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in recorded["runs"]:
        flags = f"`{run['flags']}`" if run["flags"] else "its defaults: an mlp and a 6-gram"
        if run["flags"] == LECTURE:
            flags = f"the lecture's configuration: {flags}"
        data = f"{LIBRARY}, {run['protocol']}" if run["data"] == LIBRARY else run["data"]
        parameters = f"{run['parameters']:,}" if run["parameters"] else "counts"
        lines.append(
            f"| {data} | {flags} | {parameters} "
            f"| {run['dev_nats']:.3f} | {run['standard_error']:.3f} "
            f"| {run['dev_nats'] / math.log(2):.3f} | {_seconds(run)}{_mark(recorded, run['processor'])} |"
        )
    machine = recorded["machine"]
    where = (
        f"{machine['architecture']}, {machine['threads']} threads, torch {machine['torch']}, Python {machine['python']}"
    )
    lines += ["", f"({where}; ±: standard error of the mean over dev's names, or over blocks of 256 characters."]
    processors = list(dict.fromkeys(run["processor"] for run in recorded["runs"]))
    lines[-1] += f" Processors: {'; '.join(f'{_mark(recorded, name)}{name}' for name in processors)}.)"
    return "\n".join(lines)


def _mark(recorded: dict[str, Any], processor: str) -> str:
    """A star for each processor before this one in the record."""
    names = list(dict.fromkeys(run["processor"] for run in recorded["runs"]))
    return "\\*" * names.index(processor)


def _seconds(run: dict[str, Any]) -> str:
    if run["seconds"] >= 10:
        return f"{run['seconds']:.0f} s"
    return f"{run['seconds']:.1f} s, imports included; {run['seconds_without_imports']:.2f} s without"


if __name__ == "__main__":
    if len(sys.argv) > 1:
        record(Path(sys.argv[1]))
    print(table())
