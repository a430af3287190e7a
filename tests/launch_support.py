"""Starts `charlm train` in several processes, by torchrun or one by one."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "PYTHONUNBUFFERED": "1"}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def start(
    size: int, *arguments: str | Path, of_rank: dict[int, Sequence[str | Path]] | None = None
) -> list[subprocess.Popen[str]]:
    """The `size` processes of one run of `charlm train`, by rank; `of_rank` has more arguments of single ranks."""
    port = str(free_port())
    group = {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "charlm", "train", *map(str, arguments), *map(str, (of_rank or {}).get(rank, ()))],
            env={**ENVIRONMENT, **group, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]


def ends(processes: list[subprocess.Popen[str]], seconds: float = 120) -> list[tuple[int, str, str]]:
    """The exit code, the output and the errors of each process."""
    found = []
    try:
        for process in processes:
            output, errors = process.communicate(timeout=seconds)
            found.append((process.returncode, output, errors))
    finally:
        for process in processes:
            process.kill()
    return found


def torchrun(size: int, *arguments: str | Path, max_restarts: int = 0) -> subprocess.Popen[str]:
    """torchrun with `size` processes of `charlm train`."""
    options = [f"--nproc-per-node={size}", f"--master-port={free_port()}", f"--max-restarts={max_restarts}"]
    return subprocess.Popen(
        [*TORCHRUN, *options, "-m", "charlm", "train", *map(str, arguments)],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def workers(torchrun: subprocess.Popen[str]) -> dict[int, int]:
    """The process ids of the processes that `torchrun` has started, by rank."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError, KeyError):  # it has ended, or not yet begun
            parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == torchrun.pid:
                variables = dict(x.split("=", 1) for x in (process / "environ").read_text().split("\0") if "=" in x)
                found[int(variables["RANK"])] = int(process.name)
    return found
