"""Runs checks in several processes on the CPU (gloo), and collects what failed in each."""

from __future__ import annotations

import contextlib
import faulthandler
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
from torch import Tensor

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


def with_special_values(n_classes: int) -> Tensor:
    """Rows with a special value in one class, in the classes of one rank of two, or in all, and two values of them."""
    half, last = -(-n_classes // 2), n_classes - 1
    values = [-torch.inf, torch.inf, torch.nan]
    if not EMULATED:  # of one process the CUDA kernels, as torch, overflow in a sum over the classes; the parts do not
        values += [3e38, -3e38]
    everywhere = slice(None)
    special: list[list[tuple[int | slice, float]]] = [
        [(where, value)] for value in values for where in (0, half, last, slice(half), slice(half, None), everywhere)
    ]
    pairs = [(-torch.inf, torch.inf), (torch.inf, -torch.inf)]
    if torch.distributed.get_world_size() > 1:  # on one rank, NaN beside +inf has the state of +inf alone
        pairs += [(torch.nan, infinite) for infinite in (torch.inf, -torch.inf)]
        pairs += [(infinite, torch.nan) for infinite in (torch.inf, -torch.inf)]
    special += [[(0, a), (last, b)] for a, b in pairs]
    special += [[(everywhere, -torch.inf), (0, 0.0)], [(everywhere, -torch.inf), (last, 0.0)], [(everywhere, 1.0)]]
    logits = torch.randn(len(special), n_classes, generator=torch.Generator().manual_seed(0))
    for row, values in zip(logits, special, strict=True):
        for where, value in values:
            row[where] = value
    return logits


def run_parts(parts: list[Part], world: int, folder: Path) -> dict[str, Failures]:
    """The failures of each part by its name; those of the ranks are joined."""
    torch.multiprocessing.spawn(_work, (parts, world, str(folder)), nprocs=world)
    joined: dict[str, Failures] = {part.__name__: {} for part in parts}
    for rank in range(world):
        for part, failures in torch.load(folder / f"{rank}.pt").items():
            joined[part].update({f"{name}, rank {rank} of {world}": text for name, text in failures.items()})
    return joined


def _work(rank: int, parts: list[Part], world: int, folder: str) -> None:
    faulthandler.enable()  # prints the threads' tracebacks if a rank crashes
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
