"""The ladder of docs/ladder.md: cross_entropy from a naive kernel to a fast one, a rung a file: checked, then timed.

    python -m bench.ladder                          compile, check and time every rung, torch, charlm and a copy
    python -m bench.ladder --json FILE              the same, recorded
    python -m bench.ladder --check --shape 33x257   compile and check only, on a busy machine too
    python -m bench.ladder --show FILE              print the table of a record

The first line of a rung is the command that compiles it, the second says what it changes. Each takes logits (N, V) in
float32 and class indices (N), and returns the losses of the rows and the gradient of their mean; the mean of N numbers
is left to torch, and is timed with it. The gradient is new memory in every call, as autograd's is.

Without a GPU the rungs for CUDA are run by tests/cuda_emulator at 33 × 257, and are not timed; where there is nvcc, it
has to accept them too. A wrong result, and a rung that does not compile, ends the command with exit code 1, a busy
machine with 2.
"""

from __future__ import annotations

import argparse
import ctypes
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import record
from bench.cases import BadRequest, Case, of_shape
from bench.ops import make_workload
from bench.providers import Workload
from bench.report import DASH, duration, ratio
from bench.timer import Budget, GpuTimer, Timer, Timing, WrongResult, exit_codes, paired_ratio

FOLDER = Path(__file__).parent
CPU, CUDA = sorted(FOLDER.glob("cpu*.cpp")), sorted(FOLDER.glob("cuda*.cu"))
SHAPE, EMULATED_SHAPE = "2048x32000", "33x257"
BUDGET = Budget(3.0, 7)
OTHERS = {"eager": "torch", "ours": "charlm", "copy": "a copy of the logits"}

Kernel = Callable[..., None]


def compile_rung(source: Path, folder: Path) -> Path:
    """Runs the command in the first line of the file, with its output in `folder`."""
    *command, output = shlex.split(source.read_text(encoding="utf-8").splitlines()[0].removeprefix("//"))
    done = subprocess.run([*command, folder / output], cwd=FOLDER, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BadRequest(f"{source.name} does not compile: {done.stderr or shlex.join(command)}")
    return folder / output


def compile_for_emulator(source: Path, folder: Path) -> Path:
    """Compiles for the CPU a copy in which every launch is the emulator's."""
    from tests.cuda_emulator.build import build

    launch = r"charlm::cuda::launch_kernel(\1, \2, \3, 0, nullptr, "
    copy = folder / source.name
    copy.write_text(re.sub(r"(\w+)<<<(\w+), (\w+)>>>\(", launch, source.read_text(encoding="utf-8")), encoding="utf-8")
    flags = ["-include", "cuda/cuda.cuh", "-fvisibility=default"]
    return build([copy], "plain", flags=flags, include_dirs=[record.ROOT / "csrc"])


def load(library: Path) -> Kernel:
    kernel = ctypes.CDLL(str(library)).cross_entropy
    kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2
    kernel.restype = None
    return kernel


def run(kernel: Kernel, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The mean of the losses, and its gradient (N, V)."""
    losses, grad = logits.new_empty(len(logits)), torch.empty_like(logits)
    kernel(*(tensor.data_ptr() for tensor in (logits, target, losses, grad)), *logits.shape)
    return losses.mean(), grad


def checked(source: Path, library: Path, workload: Workload) -> Callable[[], object]:
    """The call of a rung whose result is as close to float64 as the tests demand of charlm's ops."""
    call = partial(run, load(library), workload.leaves[0], workload.arguments[0])
    try:
        workload.check(call())
    except AssertionError as wrong:
        raise WrongResult(f"{source.name}: WRONG: {str(wrong).splitlines()[0]}") from wrong
    return call


def case_of(shape: str) -> Case:
    return of_shape(shape, ["cross_entropy"], ["default"], ["float32"], "cpu")[0]


def climb(shape: str, device: str, timed: bool, folder: Path) -> dict[str, Any]:
    """Checks the rungs of a device; the seconds of each, and how many times faster it is than another.

    A rung is timed in turn with the rung before and the others. In turn with all rungs, the slow ones let the host of a
    virtual machine take back the memory that the fast ones have freed.
    """
    workload = make_workload(case_of(shape), device)
    sources = CPU if device == "cpu" else CUDA
    calls = {source.name: checked(source, compile_rung(source, folder), workload) for source in sources}
    if not timed:
        return {}
    others = {name: workload.build(name) for name in OTHERS}
    timer: Any = Timer() if device == "cpu" else GpuTimer()
    rows, before = [], {}
    for name, call in calls.items():
        samples = timer.rounds({**before, name: call, **others}, BUDGET)
        rows.append(_row(name, samples, *before))
        before = {name: call}
    rows += [_row(name, samples) for name in OTHERS]
    n, v = workload.leaves[0].shape
    return {"schema": record.SCHEMA, "header": record.header(device), "shape": [n, v], "rows": rows}


def _row(name: str, samples: dict[str, Any], before: str | None = None) -> dict[str, Any]:
    own = samples[name]
    return {
        "name": name,
        **Timing.of(own)._asdict(),
        "copies": paired_ratio(own, samples["copy"]),
        "torch": paired_ratio(samples["eager"], own),
        "before": paired_ratio(samples[before], own) if before else None,
    }


def check_by_emulator(folder: Path) -> None:
    workload = make_workload(case_of(EMULATED_SHAPE))
    for source in CUDA:
        checked(source, compile_for_emulator(source, folder), workload)
        if shutil.which("nvcc"):
            compile_rung(source, folder)


def table(content: dict[str, Any]) -> str:
    """The table of docs/ladder.md, in Markdown."""
    made, (n, v) = content["header"], content["shape"]
    lines = ["| rung | time | GB/s | × copy | × the rung before | × torch |", "|---|---|---|---|---|---|"]
    for row in content["rows"]:
        speed = f"{8e-9 * n * v / row['median']:.3g}"
        ratios = [DASH if row[key] is None else ratio(row[key]) for key in ("copies", "before", "torch")]
        name = OTHERS.get(row["name"], f"`{row['name']}`")
        lines.append(f"| {' | '.join([name, duration(row['median']), speed, *ratios])} |")
    device = made.get("gpu") or f"{made['processor']}, {made['threads']} threads, {made['instruction_set']}"
    lines += [
        "",
        f"({device}, torch {made['torch']}, {made['date'][:10]}; N = {n}, V = {v}, float32. GB/s: the "
        f"{8e-6 * n * v:.0f} MB of the logits, read once, and of the gradient, written once, over the time. × copy: "
        "how many times as long as the last row, which moves as many bytes. Then: how many times faster.)",
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.ladder", description="Checks and times the rungs.")
    parser.add_argument("--shape", default=SHAPE, help="N x V; default: %(default)s")
    parser.add_argument("--check", action="store_true", help="compile and check, without timing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there")
    parser.add_argument("--show", type=Path, metavar="FILE", help="print the table of a record, and measure nothing")
    given = parser.parse_args(arguments)
    try:
        if given.show is not None:
            print(table(record.read(given.show)))
            return 0
        with exit_codes(), tempfile.TemporaryDirectory() as folder:
            has_gpu = torch.cuda.is_available()
            found = climb(given.shape, "cpu", not given.check, Path(folder))
            on_gpu = climb(given.shape, "cuda", not given.check, Path(folder)) if has_gpu else {}
            if not has_gpu:
                check_by_emulator(Path(folder))
    except BadRequest as problem:
        print(f"bench: {problem}", file=sys.stderr)
        return 1
    for content in filter(None, (found, on_gpu)):
        print(table(content), end="\n\n")
    how = "also on the GPU" if has_gpu else f"those for CUDA in the emulator, at {EMULATED_SHAPE}, and not timed"
    print(f"{len(CPU) + len(CUDA)} rungs are right: {how}")
    if given.json is not None and found:
        record.write(given.json, found | ({"gpu": on_gpu} if on_gpu else {}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
