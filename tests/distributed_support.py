"""Runs functions in several processes that form a process group on the CPU."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from charlm.lm.processes import Launch, Processes


def _work(rank: int, size: int, folder: str, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=size, timeout=timedelta(seconds=60)
    )
    try:
        torch.save(function(*arguments), f"{folder}/{rank}.pt")
        torch.distributed.barrier()
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    # A thread of gloo may still hold tensors, and ends the process if the interpreter is finalized then.
    os._exit(0)


def processes() -> Processes:
    """The processes of the group that this one is in; without a group, this one alone."""
    if not torch.distributed.is_initialized():
        return Processes()
    return Processes(Launch(torch.distributed.get_rank(), torch.distributed.get_world_size()))


def results_of_processes(size: int, folder: Path, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function`, which a module defines, returns in each of `size` processes, by rank."""
    folder.mkdir(parents=True)
    torch.multiprocessing.spawn(_work, (size, str(folder), function, arguments), nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
