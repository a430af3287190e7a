"""The JSON of a run: who measured it, writing, reading, and what changed between two. Importing it needs no torch."""

from __future__ import annotations

import datetime
import json
import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from bench.cases import LOWER_BOUNDS, BadRequest

SCHEMA = 1
ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).with_name("results")
REGRESSION = 1.10  # so much slower, after the lower bound's own change
CPUINFO = Path("/proc/cpuinfo")


def header(device: str = "cpu") -> dict[str, Any]:
    """Machine, versions, instruction set and threads."""
    import torch

    import charlm
    from bench.providers import cores

    gpu = {"gpu": torch.cuda.get_device_name(0)} if device == "cuda" else {}
    return {
        "date": now(),
        **gpu,
        "processor": processor(),
        "cores": cores(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "instruction_set": charlm.build_info()["instruction_set_in_use"],
        "python": platform.python_version(),
        "charlm": charlm.build_info()["charlm"],
        "commit": commit(),
        "torch": torch.__version__,
        "jax": version("jax"),
    }


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


def processor() -> str:
    """Name, family and model; virtual machines often hide the rest of the name."""
    if not CPUINFO.exists():
        return platform.processor() or platform.machine()
    fields: dict[str, str] = {}
    for line in CPUINFO.read_text(encoding="utf-8").splitlines():
        name, _, value = line.partition(":")
        fields.setdefault(name.strip(), value.strip())
    name = fields.get("model name", platform.machine())
    return f"{name}, family {fields['cpu family']} model {fields['model']}" if "cpu family" in fields else name


def commit() -> str | None:
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def write(path: Path, content: dict[str, Any] | str) -> None:
    """Replaces the file in one step, so that no reader and no interruption meets half of it."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1, ensure_ascii=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


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
    """For each case of both: charlm's time in new / in old, divided by the same ratio of a lower bound that both have.

    The bound's ratio takes out what another machine, or another day, changes for everything.
    """

    def ratio(case: dict[str, Any], earlier: dict[str, Any], provider: str) -> float:
        return case["times"][provider]["median"] / earlier["times"][provider]["median"]

    before = {case["name"]: case for case in old["cases"] if case["times"]}
    rows = []
    for case in new["cases"]:
        earlier = before.get(case["name"])
        if earlier is None or not case["times"]:
            continue
        bound = next((name for name in LOWER_BOUNDS if case["times"].get(name) and earlier["times"].get(name)), None)
        change = ratio(case, earlier, "ours") / (ratio(case, earlier, bound) if bound else 1)
        rows.append(
            {
                "name": case["name"],
                "old": earlier["times"]["ours"]["median"],
                "new": case["times"]["ours"]["median"],
                "bound": bound,
                "ratio": change,
                "regression": change > REGRESSION,
            }
        )
    return rows
