"""What the README says of the model, from recorded runs of the command line.

    python bench/models.py NAMES     trains each configuration below and writes bench/models.json (five minutes)
    python bench/models.py           prints the README's table from bench/models.json

NAMES is makemore's names.txt (32,033 names, sha256 0a30b555…8cc4d), with which others have published results.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RECORD = Path(__file__).with_suffix(".json")
SHIPPED, MAKEMORE = "the names that ship", "makemore's names.txt"
LECTURE = (
    "--block-size 3 --n-embd 10 --n-hidden 200 --max-steps 200000 --batch-size 32 "
    "--optimizer sgd --schedule step -l 0.1 -w 0 --dropout 0 --warmup-steps 0"
)
RUNS = [(SHIPPED, ""), (MAKEMORE, ""), (MAKEMORE, LECTURE)]


def record(names: Path) -> None:
    """Runs every configuration once and writes what it reached."""
    import torch

    runs = [_run(data, flags, names) for data, flags in RUNS]
    machine = {"processor": platform.machine(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    RECORD.write_text(json.dumps({"machine": machine, "runs": runs}, indent=2) + "\n", encoding="utf-8")


def _run(data: str, flags: str, names: Path) -> dict[str, str | float]:
    source = ["-i", str(names)] if data == MAKEMORE else []
    with tempfile.TemporaryDirectory() as folder:
        work_dirs = {kind: str(Path(folder, kind)) for kind in ("mlp", "bigram")}
        start = time.perf_counter()
        subprocess.run(["charlm", "train", *source, "-o", work_dirs["mlp"], *flags.split()], check=True)
        seconds = time.perf_counter() - start
        subprocess.run(["charlm", "train", *source, "-o", work_dirs["bigram"], "--type", "bigram"], check=True)
        nats = {kind: _dev_nats(work_dir) for kind, work_dir in work_dirs.items()}
    return {
        "data": data,
        "flags": flags,
        "seconds": seconds,
        "dev_nats": nats["mlp"],
        "bigram_dev_nats": nats["bigram"],
    }


def _dev_nats(work_dir: str) -> float:
    command = ["charlm", "eval", work_dir, "--split", "dev", "--json"]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)["nats"]


def table() -> str:
    """The README's table, in Markdown, from the record."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))
    lines = ["| data | `charlm train` with | dev nats | bigram's | whole command |", "|---|---|---|---|---|"]
    for run in recorded["runs"]:
        flags = "its defaults" if not run["flags"] else f"the lecture's configuration: `{run['flags']}`"
        lines.append(
            f"| {run['data']} | {flags} | {run['dev_nats']:.3f} | {run['bigram_dev_nats']:.3f} "
            f"| {run['seconds']:.0f} s |"
        )
    machine = recorded["machine"]
    lines += ["", f"({machine['processor']}, {machine['threads']} threads, torch {machine['torch']}.)"]
    return "\n".join(lines)


if __name__ == "__main__":
    if len(sys.argv) == 2:
        record(Path(sys.argv[1]))
    print(table())
