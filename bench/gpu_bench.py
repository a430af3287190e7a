"""The benchmark on a GPU: ours against torch eager, torch.compile and Liger, beside a device-to-device copy.

    python -m bench.gpu_bench --json FILE [--device cuda] [--seconds 240]

`make gpu` runs it. Each case is checked against float64 before it is timed. The JSON is written again after each case,
so that what was measured survives whatever ends the run; a case for which there is no time left is named in it. The
exit code is 1 if a result is wrong; a goal that is missed is reported, and no failure. On the CPU it is a dry run.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from bench import contenders, gpu_cases
from bench.cases import BadRequest, Case
from bench.clock import Timing, paired_ratio
from bench.contenders import Call
from bench.gpu_clock import GpuClock
from bench.gpu_report import write
from bench.inputs import CrossEntropyInputs, EmbeddingInputs, item_size, main_elements, make_inputs
from bench.jax_runtime import Unavailable
from bench.layers import LAYERS
from bench.measure import Result, warm, why_wrong
from bench.record import to_json

PEERS = ("eager", "eager_index", "compile", "liger")


def measure(case: Case, clock: GpuClock) -> Result:
    """One case: inputs, check, contenders, samples, figures."""
    gc.collect()  # the case before may have left cycles that hold its tensors
    inputs = make_inputs(case, device=clock.device)
    moved = gpu_cases.bytes_to_move(case)
    calls: dict[str, Call] = {"ours": contenders.build("ours", case, inputs)}
    error = why_wrong(case, inputs, calls["ours"])
    if error is not None:
        return Result(case, moved, error=error)
    absent: dict[str, str] = {}
    for name in gpu_cases.names(case, compiled=clock.on_gpu)[1:]:
        call = warm(lambda name=name: _build(name, case, inputs))
        if isinstance(call, str):
            absent[name] = call
        else:
            calls[name] = call
    samples = clock.rounds(calls)
    times = {name: Timing.of(taken) for name, taken in samples.items()}
    copied = 2 * item_size(case) * main_elements(case)  # read and written
    return Result(case, moved, times, _figures(samples, moved, copied), absent=absent)


def _build(name: str, case: Case, inputs: CrossEntropyInputs | EmbeddingInputs) -> Call:
    if name == "copy" and case.op not in LAYERS:
        source = _of_main_size(inputs)
        target = torch.empty_like(source)
        return lambda: target.copy_(source)
    if name == "liger":
        return contenders.over_logits(_liger(inputs.target), inputs)
    return contenders.build(name, case, inputs)


def _of_main_size(inputs: CrossEntropyInputs | EmbeddingInputs) -> Tensor:
    """A tensor as large as the logits, or as an embedding's output or its gradient."""
    if isinstance(inputs, CrossEntropyInputs):
        return inputs.logits
    if inputs.gradient is not None:
        return inputs.gradient
    return inputs.weight.new_zeros(len(inputs.index), inputs.weight.size(1))


def _liger(target: Tensor) -> Any:
    """Liger's loss, which turns the logits into their gradient as `inplace="forward"` does."""
    try:
        from liger_kernel.transformers import LigerCrossEntropyLoss
    except ImportError as error:
        raise Unavailable("liger_kernel is not installed") from error
    loss = LigerCrossEntropyLoss()
    return lambda logits: loss(logits, target)


def _figures(samples: dict[str, list[float]], moved: int, copied: int) -> dict[str, float | None]:
    ours = samples["ours"]
    figures: dict[str, float | None] = {name: paired_ratio(samples[name], ours) for name in PEERS if name in samples}
    if "copy" in samples:
        figures["copy_bandwidth"] = moved / copied * paired_ratio(samples["copy"], ours)
    peers = [name for name in PEERS if name in samples]
    if peers:
        figures["best_peer"] = figures[min(peers, key=lambda name: median(samples[name]))]
    return figures


def run(cases: list[Case], device: str, seconds: float, path: Path) -> dict[str, Any]:
    """Measures for so many seconds, and leaves in `path` what the benchmark's part of the JSON holds."""
    end = time.monotonic() + seconds
    clock = GpuClock(device)
    content: dict[str, Any] = {"copy_bandwidth": clock.copy_bandwidth(), "cases": [], "not_run": {}}
    for case in cases:
        if time.monotonic() > end:
            content["not_run"][case.name] = "no time was left"
            continue
        try:
            result = measure(case, clock)
        except (BadRequest, torch.OutOfMemoryError) as reason:
            content["not_run"][case.name] = str(reason).splitlines()[0]
            continue
        content["cases"].append({**to_json(result), "late": {name: n for name, n in clock.late.items() if n}})
        print(f"{case.name}: {'WRONG: ' + result.error if result.error else 'timed'}", flush=True)
        write(path, json.dumps(content))
    write(path, json.dumps(content))
    return content


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, required=True, help="the file to write")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: a dry run of tiny shapes")
    parser.add_argument("--seconds", type=float, default=240.0, help="no case begins later (default: %(default)s)")
    arguments = parser.parse_args()
    cases = gpu_cases.CASES if arguments.device == "cuda" else gpu_cases.dry_run()
    content = run(cases, arguments.device, arguments.seconds, arguments.json)
    wrong = sum(case["error"] is not None for case in content["cases"])
    print(f"{len(content['cases'])} cases, {wrong} of them wrong, {len(content['not_run'])} not run")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
