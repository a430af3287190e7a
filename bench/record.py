"""The JSON of a run: who measured it, writing, reading, comparing two, and the README's table from the recorded one."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from dataclasses import asdict
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import charlm
from bench.cases import FLOORS, BadRequest
from bench.jax_runtime import cores
from bench.measure import Result
from bench.units import duration, ratio

SCHEMA = 1
RECORDS = tuple(
    Path(__file__).with_name("results") / name for name in ("cpu_ops.json", "cpu_layers.json", "cpu_information.json")
)
RECORD, LAYERS_RECORD, INFORMATION_RECORD = RECORDS
PRODUCTS = {"embedding_linear", "linear_cross_entropy", "train_step"}  # whose floor is matrix products, not a copy
REGRESSION = 1.10  # so much slower, after the floor's own change
CPUINFO = Path("/proc/cpuinfo")
CACHES = Path("/sys/devices/system/cpu/cpu0/cache")

# The README's rows: case, and how it says what is timed.
HEADLINES = {
    "cross_entropy/default/32x27/float32": "cross_entropy, 32 × 27",
    "cross_entropy/default/4096x27/float32": "4096 × 27",
    "cross_entropy/default/65536x65/float32": "65536 × 65",
    "cross_entropy/default/65536x256/float32": "65536 × 256",
    "cross_entropy/default/2048x32000/float32": "2048 × 32000",
    "cross_entropy/default/1024x128256/float32": "1024 × 128256",
    "cross_entropy/default/2048x32000/bfloat16": "2048 × 32000, bfloat16",
    "cross_entropy/inplace_forward/65536x256/float32": '65536 × 256, `inplace="forward"`',
    "cross_entropy/inplace_forward/2048x32000/float32": '2048 × 32000, `inplace="forward"`',
    "cross_entropy/inplace_backward/2048x32000/float32": '2048 × 32000, `inplace="backward"`',
    "embedding/int64/98304x27x10/float32": "embedding, 98304 of 27 × 10",
    "embedding_backward/default/98304x27x10/float32": "its gradient",
    "embedding_backward/default/65536x256x64/float32": "its gradient, 65536 of 256 × 64",
    "embedding_linear/default/4096x8x24x200x27/float32": "embedding_linear, N 4096, T 8, D 24, H 200, V 27",
    "embedding_linear/default/32x3x10x200x27/float32": "N 32, T 3, D 10, H 200, V 27",
    "embedding_linear/default/4096x8x32x256x256/float32": "N 4096, T 8, D 32, H 256, V 256",
    "linear_cross_entropy/default/1024x512x32000/float32": "linear_cross_entropy, N 1024, D 512, V 32000",
    "linear_cross_entropy/default/512x768x50257/float32": "N 512, D 768, V 50257",
    "linear_cross_entropy/default/8192x512x32000/float32": "N 8192, D 512, V 32000",
    "linear_cross_entropy/default/4096x768x50257/float32": "N 4096, D 768, V 50257",
    "linear_cross_entropy/default/1024x512x32000/bfloat16": "N 1024, D 512, V 32000, bfloat16",
    "linear_cross_entropy/default/512x768x50257/bfloat16": "N 512, D 768, V 50257, bfloat16",
    "train_step/default/4096x8x24x200x27/float32": "a training step, batch 4096, T 8, D 24, H 200",
    "train_step/default/32x3x10x200x27/float32": "batch 32, T 3, D 10, H 200",
    "entropy/default/32x27/float32": "entropy, 32 × 27",
    "entropy/default/4096x27/float32": "4096 × 27",
    "entropy/default/65536x256/float32": "65536 × 256",
    "entropy/default/2048x32000/float32": "2048 × 32000",
    "entropy/default/2048x32000/bfloat16": "2048 × 32000, bfloat16",
    "kl_divergence/default/32x27/float32": "kl_divergence, 32 × 27",
    "kl_divergence/default/4096x27/float32": "4096 × 27",
    "kl_divergence/default/65536x256/float32": "65536 × 256",
    "kl_divergence/default/2048x32000/float32": "2048 × 32000",
    "kl_divergence/default/2048x32000/bfloat16": "2048 × 32000, bfloat16",
    "surprisal/default/32x27/float32": "surprisal, 32 × 27",
    "surprisal/default/4096x27/float32": "4096 × 27",
    "surprisal/default/65536x256/float32": "65536 × 256",
    "surprisal/default/2048x32000/float32": "2048 × 32000",
    "surprisal/default/2048x32000/bfloat16": "2048 × 32000, bfloat16",
}


def header() -> dict[str, Any]:
    """Machine, versions, instruction set and threads."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "processor": processor(),
        "cores": cores(),
        "caches": _caches(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "instruction_set": charlm.build_info()["instruction_set_in_use"],
        "python": platform.python_version(),
        "charlm": charlm.build_info()["charlm"],
        "commit": _commit(),
        "torch": torch.__version__,
        "jax": _version("jax"),
    }


def processor() -> str:
    """ "AMD EPYC, family 25 model 1"; virtual machines often hide the rest of the name."""
    if not CPUINFO.exists():
        return platform.processor() or platform.machine()
    fields = {}
    for line in CPUINFO.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name}, family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else name


def _caches() -> str | None:
    """ "L1 32K, L2 512K, L3 32768K", as core 0 sees them."""
    sizes = {}
    for index in sorted(CACHES.glob("index*")):
        level, kind, size = ((index / name).read_text(encoding="ascii").strip() for name in ("level", "type", "size"))
        if kind != "Instruction":
            sizes[f"L{level}"] = size
    return ", ".join(f"{level} {size}" for level, size in sizes.items()) or None


def _commit() -> str | None:
    command = ["git", "-C", str(RECORD.parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def to_json(result: Result) -> dict[str, Any]:
    case = asdict(result.case)
    case["goals"] = [
        {**asdict(goal), "measured": result.figures.get(goal.figure), "reached": reached}
        for goal, reached in result.goals()
    ]
    times = {name: timing and timing._asdict() for name, timing in result.times.items()}
    others = {name: getattr(result, name) for name in ("bytes", "figures", "memory", "absent", "discarded", "error")}
    return {"name": result.case.name, **case, "times": times, **others}


def write(path: Path, results: list[Result], **parts: Any) -> None:
    """parts: "scaling", "grid", "fold" and "plans", where they were run."""
    content = {"schema": SCHEMA, "header": header(), "cases": [to_json(result) for result in results], **parts}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadRequest(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise BadRequest(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or content.get("schema") != SCHEMA:
        raise BadRequest(f"{path} is no record of this benchmark, or of another version of it")
    return content


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[dict[str, Any]]:
    """For each case of both: the time of ours in new / in old, divided by the same ratio of a floor that both have.

    The floor's ratio takes out what another machine, or another day, changes for everything.
    """
    before = {case["name"]: case for case in old["cases"]}
    rows = []
    for case in new["cases"]:
        earlier = before.get(case["name"])
        if earlier is None or not case["times"] or not earlier["times"]:
            continue
        floor = next((name for name in FLOORS if case["times"].get(name) and earlier["times"].get(name)), None)
        raw = _ratio(case, earlier, "ours")
        ratio = raw / _ratio(case, earlier, floor) if floor else raw
        rows.append(
            {
                "name": case["name"],
                "old": earlier["times"]["ours"]["median"],
                "new": case["times"]["ours"]["median"],
                "floor": floor,
                "ratio": ratio,
                "regression": ratio > REGRESSION,
            }
        )
    return rows


def _ratio(new: dict[str, Any], old: dict[str, Any], contender: str) -> float:
    return new["times"][contender]["median"] / old["times"][contender]["median"]


def readme_table(record: dict[str, Any]) -> str:
    """The README's table of speed, in Markdown."""
    cases = {case["name"]: case for case in record["cases"]}
    layers = not PRODUCTS.isdisjoint(case["op"] for case in cases.values())
    floors, title = (("gemms",), "products") if layers else (("copy", "fresh_copy", "read_write"), "copy")
    lines = [f"| work | time | × {title} | × torch eager | × best peer |", "|---|---|---|---|---|"]
    for name, work in HEADLINES.items():
        case = cases.get(name)
        if case is None or not case["times"]:
            continue
        figures = case["figures"]
        of_floor = next((figures[floor] for floor in floors if floor in figures), None)
        ratios = [of_floor, figures.get("eager"), figures.get("best_peer")]
        cells = [work, duration(case["times"]["ours"]["median"]), *("–" if r is None else ratio(r) for r in ratios)]
        lines.append(f"| {' | '.join(cells)} |")
    made = record["header"]
    peers = "torch eager, torch.compile" + (f" and JAX {made['jax']}" if made["jax"] else "")
    explained = (
        "× products: ours / the three bare products x Wᵀ, g W and gᵀ x (in float32 where the machine has no "
        "instructions for bfloat16: torch's own then take minutes, and no part)"
        if layers
        else "× copy: ours / one copy of the logits, for an embedding of its output, for its gradient one read and one "
        "write"
    )
    lines += [
        "",
        f"({made['processor']}, {made['threads']} threads, {made['instruction_set']}, torch {made['torch']}; float32, "
        f"forward and gradient, unless said. {explained}. The others: how many times faster than torch, and than the "
        f"best of {peers}.)",
    ]
    return "\n".join(lines)
