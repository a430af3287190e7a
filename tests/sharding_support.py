"""Runs checks in several processes on the CPU (gloo), and collects what failed in each."""

from __future__ import annotations

import contextlib
import importlib
import os
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing

from charlm import reference
from tests.cuda_emulator.ops import run_cpu_ops_on_emulator

kl_div = importlib.import_module("charlm.functional.kl_div")  # charlm.functional.kl_div is the function

EMULATED = os.environ.get("CHARLM_CUDA_EMULATED")
Failures = dict[str, str]  # the traceback of each check that failed, by its name
Part = Callable[[Failures, int], None]  # it is given the number of processes


def check(failures: Failures, name: str, function: Callable[..., None], *args: Any) -> None:
    """Calls `function`, and keeps its error: the processes go on together with the next check."""
    try:
        function(*args)
    except Exception:
        failures[name] = traceback.format_exc()


@contextlib.contextmanager
def no_reference() -> Iterator[None]:
    """Every call that takes `charlm.reference` fails: only kernels may compute."""

    def refused(*args: Any, **keywords: Any) -> None:
        raise AssertionError("the call took the reference")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("cross_entropy", "embedding", "embedding_linear", "entropy", "kl_divergence"):
            patch.setattr(reference, name, refused)
        patch.setattr(kl_div, "_by_torch", refused)
        yield


def run_parts(parts: list[Part], world: int, folder: Path) -> dict[str, Failures]:
    """The failures of each part by its name; those of the ranks are joined."""
    torch.multiprocessing.spawn(_work, (parts, world, str(folder)), nprocs=world)
    joined: dict[str, Failures] = {part.__name__: {} for part in parts}
    for rank in range(world):
        for part, failures in torch.load(folder / f"{rank}.pt").items():
            joined[part].update({f"{name}, rank {rank} of {world}": text for name, text in failures.items()})
    return joined


def _work(rank: int, parts: list[Part], world: int, folder: str) -> None:
    torch.set_num_threads(1)
    if EMULATED:  # as in tests/conftest.py, which this process does not run
        run_cpu_ops_on_emulator(EMULATED)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=60),  # of a rank that waits for one whose check failed
    )
    results: dict[str, Failures] = {part.__name__: {} for part in parts}
    for part in parts:
        torch.manual_seed(0)
        part(results[part.__name__], world)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    # A thread of gloo may still hold tensors of the last collective: while the interpreter is finalized it cannot
    # release their Python objects, and ends the process ("terminate called without an active exception").
    os._exit(0)
