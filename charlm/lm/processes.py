"""The processes that train one model together, as torchrun starts them: on the CPU over gloo, on GPUs over NCCL.

A step of n processes is a step of one. All draw the same rows of the global batch, each computes the loss of its share
of them, and the gradients are added. What has to be equal is compared once; everything else follows from it.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from charlm._errors import UserError
from charlm.lm.stop import StopRequest

Result = TypeVar("Result")
SECONDS_TO_ANSWER = 5.0  # after a time-out, in which a process that lives says so
SECONDS_TO_END = 1.0  # the same after a closed connection


@dataclass(frozen=True)
class Launch:
    """The place of this process among those of the run."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # on its machine
    local_size: int = 1  # the number of processes that are known to run on its machine

    @classmethod
    def from_environment(cls) -> Launch:
        """Reads RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as torchrun sets them; without WORLD_SIZE it is one
        process.

        Raises:
            UserError: One of them is missing, is not a number, or is out of its range.
        """
        if not os.environ.get("WORLD_SIZE"):
            return cls()
        size = _number("WORLD_SIZE", at_least=1)
        rank = _number("RANK", below=size) if "RANK" in os.environ or size > 1 else 0
        local_rank = _number("LOCAL_RANK", below=size) if "LOCAL_RANK" in os.environ else rank
        local_size = _number("LOCAL_WORLD_SIZE", at_least=1) if "LOCAL_WORLD_SIZE" in os.environ else 1
        return cls(rank, size, local_rank, local_size)


def is_under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def _number(name: str, at_least: int = 0, below: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        raise UserError(f"WORLD_SIZE is set but {name} is not: start charlm with torchrun, which sets both")
    if not text.isdecimal() or int(text) < at_least:
        raise UserError(f"{name} is {text!r}, but must be a number and at least {at_least}")
    if below is not None and int(text) >= below:
        raise UserError(f"{name} is {text}, but must be below WORLD_SIZE, which is {below}")
    return int(text)


class Processes:
    """What the processes of a run do together; by default there is one, and nothing is communicated.

    Args:
        launch: The place of this process.
        store: The store of the process group; None without one.
        timeout: Seconds after which a process that waits for others gives up.
        group: The process group; None is torch's default one.
    """

    def __init__(
        self,
        launch: Launch | None = None,
        store: dist.Store | None = None,
        timeout: float = 600,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        self.launch = launch or Launch()
        self.rank, self.size = self.launch.rank, self.launch.size
        self._store = store
        self._timeout = timeout
        self._group = group

    def in_a_thread(self) -> Processes:
        """The same processes with a process group of their own, for a thread beside the main one; all must call it."""
        if self.size == 1:
            return self
        group = dist.new_group(timeout=timedelta(seconds=self._timeout), backend="gloo")
        return Processes(self.launch, self._store, self._timeout, group)

    def share(self, count: int) -> slice:
        """The part of `count` things in a row that belongs to this process; the sizes of two parts differ by 0 or 1."""
        return slice(self.rank * count // self.size, (self.rank + 1) * count // self.size)

    def sums(self, *values: float) -> list[float]:
        """The sums of `values` over the processes, in double precision."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, group=self._group)
        return tensor.tolist()

    def results_of_all(self, work: Callable[[], Result]) -> list[Result]:
        """What `work` returns in each process, by rank. If it fails in one, all raise.

        Raises:
            Exception: The error of `work` in this process.
            UserError: `work` failed in another process, which the sentence names.
        """
        if self.size == 1:
            return [work()]
        result, failed, reason = None, None, None
        try:
            result = work()
        except UserError as error:
            failed, reason = error, str(error)
        except OSError as error:
            failed, reason = error, f"cannot write {error.filename}: {error.strerror}"
        except Exception as error:  # such as a MemoryError: the others wait for it
            failed, reason = error, f"{type(error).__name__}: {error}"
        found: list[tuple[Any, str | None]] = [(None, None)] * self.size
        dist.all_gather_object(found, (result, reason), group=self._group)
        if failed is not None:
            raise failed
        for rank, (_, reason) in enumerate(found):
            if reason is not None:
                raise UserError(f"rank {rank}: {reason}")
        return [result for result, _ in found]

    def from_first(self, value: int) -> int:
        """The `value` of the first process."""
        return round(self.sums(value if self.rank == 0 else 0)[0])

    def stopping(self, stop: StopRequest) -> Callable[[], int | None]:
        """Begins to ask all processes for a signal; the result waits for the largest one, which all then have.

        Between the two, this takes no time of the caller.
        """
        if self.size == 1:
            return lambda: stop.signal
        signal = torch.tensor(stop.signal or 0)
        work = dist.all_reduce(signal, dist.ReduceOp.MAX, group=self._group, async_op=True)

        def result() -> int | None:
            work.wait()
            found = int(signal.item()) or None
            if found is not None and stop.signal is None:
                stop.signal = found
            return found

        return result

    def check_equal(self, values: Mapping[str, str]) -> None:
        """Raises UserError unless all processes have equal `values`; the names of these are plural nouns."""
        first, *others = self.results_of_all(lambda: values)
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise UserError(f"the {name} of rank {rank} differ from those of rank 0")

    def first_time(self, name: str, value: str) -> bool:
        """Whether `value` is what this was first called with under the running torchrun, before any restart."""
        if self._store is None:
            return True
        store = self._store
        while isinstance(store, dist.PrefixStore):  # without the prefix, which names the restart
            store = store.underlying_store
        return store.compare_set(f"charlm/{name}", "", value).decode() == value

    def device(self, name: str) -> str:
        """The device called `name` of this process: of several GPUs on a machine, its own.

        Raises:
            UserError: There are fewer GPUs than processes.
        """
        if self.size == 1 or not name.startswith("cuda"):
            return name
        if name != "cuda":
            raise UserError(f"device is {name}, which is one GPU for {self.size} processes: give --device cuda")
        found = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if self.launch.local_rank >= found:
            raise UserError(
                f"device cuda needs a GPU for each process of a machine: this one is number "
                f"{self.launch.local_rank + 1}, and {found} can be used"
            )
        torch.cuda.set_device(self.launch.local_rank)
        return f"cuda:{self.launch.local_rank}"

    def missing(self, seconds: float) -> list[int]:
        """The ranks that do not say within `seconds` that they live; every rank that lost the others must call it."""
        others = {rank for rank in range(self.size) if rank != self.rank}

        def ask(store: dist.Store) -> None:
            with suppress(RuntimeError):  # the process that holds the store has ended
                store.set(f"alive/{self.rank}", "")
                while others:
                    time.sleep(0.02)
                    others.difference_update([rank for rank in others if store.check([f"alive/{rank}"])])

        # A store whose process hangs does not answer, whatever its time-out.
        asking = threading.Thread(target=ask, args=(self._store,), daemon=True)
        asking.start()
        asking.join(seconds)
        return sorted(others)


@contextmanager
def joined(launch: Launch, timeout: float) -> Iterator[Processes]:
    """Joins the process group of the run, and leaves it at the end. A process waits `timeout` seconds for the others.

    Raises:
        UserError: Rank 0 cannot be reached, or a process was lost, which the sentence names.
    """
    if launch.size == 1 and not is_under_torchrun():
        yield Processes()
        return
    store = _connect(launch, timeout)
    processes = Processes(launch, store, timeout)
    if launch.size == 1:
        yield processes
        return
    try:
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
            store=store,
            rank=launch.rank,
            world_size=launch.size,
            timeout=timedelta(seconds=timeout),
        )
        yield processes
    except RuntimeError as error:
        seconds = _seconds_to_answer(error)
        if seconds is None:
            raise
        _leave()  # so that processes that wait for this one notice
        missing = ", ".join(f"rank {rank}" for rank in processes.missing(seconds)) or "another process"
        raise UserError(f"{missing} has ended, or has not answered for {timeout:g} s: training stops") from error
    finally:
        _leave()


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _seconds_to_answer(error: RuntimeError) -> float | None:
    """How long to wait for other processes after `error`; None if it is not one of communication."""
    text = str(error)
    # gloo's errors name its sources, but for the one of a collective that another thread finds timed out.
    is_gloo = "gloo" in text or text == "Application timeout caused pair closure"
    if not (isinstance(error, dist.DistError) or is_gloo or "NCCL" in text):
        return None
    timed_out = "imed out" in text or "imeout" in text
    return SECONDS_TO_ANSWER if timed_out else SECONDS_TO_END


def _connect(launch: Launch, timeout: float) -> dist.Store:
    address, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT")
    try:
        store, _, _ = next(
            dist.rendezvous("env://", launch.rank, launch.size, timeout=timedelta(seconds=timeout))  # type: ignore[attr-defined]
        )
    except (RuntimeError, ValueError, OSError) as error:
        if not address or not port:
            raise UserError("MASTER_ADDR and MASTER_PORT are not both set: start charlm with torchrun") from error
        raise UserError(f"cannot meet the other processes at {address}:{port} within {timeout:g} s") from error
    # torchrun keeps its store over restarts, which must not read what the processes before them have written.
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
