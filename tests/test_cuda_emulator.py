"""The CUDA emulator tested on itself: every seeded defect is reported by the checker that should, whatever the order in
which threads run, and correct kernels are not. The kernels are in cuda_emulator/defects.h."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.cuda_emulator import build

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the CUDA emulator needs x86-64 Linux"
)

DEFECTS = [build.EMULATOR / "defects.cpp"]
INCLUDE_DIRS = [build.ROOT / "csrc"]
SCHEDULES = [("forward", 0), ("reverse", 0), ("random", 1), ("random", 2), ("random", 3)]

# Reported by the emulator itself, in every flavour.
REPORTED_BY_EMULATOR = {
    "barrier_in_branch": r"__syncthreads at defects\.h:\d+ in block \(0,0,0\): 32 of 64 threads have exited",
    "different_barriers": r"divergent barrier: .* at defects\.h:\d+ but .* waits in __syncthreads at defects\.h",
    "exit_before_barrier": r"14 of 64 threads have exited without reaching it",
    "barrier_in_loop_of_thread_length": r"63 of 64 threads have exited without reaching it",
    "barriers_of_warp_and_block": r"deadlock in block \(0,0,0\): .* waits in __syncthreads .* waits in __syncwarp mask",
    "shuffle_in_branch": r"names lanes that have exited|exited while .* waits for it in __shfl_xor_sync mask 0xffff",
    "shuffle_from_lane_outside_mask": r"reads lane \d+, which mask 0x0000ffff does not name: the value is undefined",
    "shuffle_without_own_lane": r"mask 0x7fffffff of .* does not name its own lane",
    "shuffle_in_partial_warp": r"names lanes that do not exist: the warp has 16",
    "shuffle_past_its_width": r"__shfl_xor_sync at .* with distance 16 and width 16",
    "different_masks": r"divergent warp collective: .* mask 0x0000ffff|names lanes that have exited|exited while",
    "too_much_static_shared": r"more than 48 KiB of static shared memory",
    "static_beside_dynamic_shared": r"more than 48 KiB of static and dynamic shared memory, and none was requested",
    "too_much_dynamic_shared": r"invalid launch configuration: 232449 bytes of dynamic shared memory",
    "block_of_1025_threads": r"invalid launch configuration: a block of \(1025,1,1\) threads",
    "grid_of_no_blocks": r"invalid launch configuration: a grid of \(0,1,1\) blocks",
    "grid_of_65536_in_y": r"invalid launch configuration: a grid of \(1,65536,1\) blocks",
    "argument_of_64_bits": r"a kernel's argument, 4294967296, does not fit the type of its parameter",
    "transfer_barrier_not_initialised": r"(expect_bytes|wait_barrier) at defects\.h:\d+: .*: the barrier is not init",
    "transfer_barrier_not_published": r"load_bulk at .*: no publish_barriers\(\) after init_barrier\(\) at defects\.h",
    "too_few_bytes_expected": r"load_bulk at .*: more bytes than expected for phase 0 of the barrier of defects\.h:\d+"
    r", which misses 0 of 1 arrivals, and -16 of 112 bytes",
    "too_many_bytes_expected": r"deadlock in block \(0,0,0\): .* waits in wait_barrier at defects\.h:\d+ for phase 0 "
    r"of the barrier of defects\.h:\d+, which misses 0 of 1 arrivals, and 16 of 144 bytes",
    "load_never_awaited": r"load_bulk at defects\.h:\d+ of .* ended without waiting for it|one arrival too many",
    "wrong_parity": r"expect_bytes at .* one arrival too many: .* misses 0 of 1 arrivals, and 0 of 128 bytes",
    "exit_before_stores_have_read": r"store_bulk at defects\.h:\d+ of .* without waiting until shared memory was read",
    "arrival_too_many": r"expect_bytes at .* one arrival too many: .* misses 0 of 63 arrivals, and 1008 of 1008 bytes",
    "bulk_of_20_bytes": r"load_bulk at .* the number of bytes, 20, must be multiples of 16",
    "message_before_meeting": r"store_in_cluster at .* no wait_for_cluster\(\) before: block \d may not run yet",
    "exit_before_message": r"store_in_cluster at .* block \(\d,0,0\) ended without waiting for it",
    "grid_of_no_whole_clusters": r"invalid launch configuration: a grid of \(6,1,1\) blocks in clusters of 4",
    "previous_kernel_not_awaited": r"of a dependent kernel exited without wait_for_previous_kernel\(\)",
}

# Seen as a wrong result, in every flavour.
SEEN_IN_RESULT = [
    "shared_never_written",
    "missing_tail",
    "load_awaited_by_some_threads",
    "stage_loaded_before_it_is_stored",
]


# Reported by AddressSanitizer or UndefinedBehaviorSanitizer, which end the process.
REPORTED_BY_ADDRESS = {
    "write_past_end": r"heap-buffer-overflow.*\nWRITE of size 4",
    "vector_load_past_end": r"heap-buffer-overflow.*\nREAD of size",
    "vector_store_past_end": r"heap-buffer-overflow.*\nWRITE of size",
    "vector_load_misaligned": r"runtime error: .* misaligned address",
    "vector_store_misaligned": r"runtime error: .* misaligned address",
    "vector_load_from_scalar_shared": r"runtime error: .* misaligned address",
    "shared_past_end": r"runtime error: index 64 out of bounds for type 'float \[64\]'",
    "shared_past_end_by_pointer": r"use-after-poison.*\nWRITE of size 4",
    "dynamic_shared_past_end": r"use-after-poison.*\nWRITE of size 4",
    "local_array_past_end": r"runtime error: index 4 out of bounds for type 'float \[4\]'",
    "bulk_load_past_end": r"heap-buffer-overflow.*\nREAD of size 8",
    "bulk_store_past_end": r"heap-buffer-overflow.*\nWRITE of size 4",
    "offset_of_32_bits": r"runtime error: signed integer overflow: 2 \* 2000000000",
}

# Reported by ThreadSanitizer; in the other flavours as above, if at all.
REPORTED_BY_THREAD = [
    "missing_barrier",
    "reduction_buffer_reused",
    "implicit_warp_synchrony",
    "warp_barrier_for_block",
    "warps_race_in_global_memory",
    "plain_add_in_block",
    "plain_add_between_blocks",
    "plain_store_beside_atomic",
    "overlapping_vector_stores",
    "last_block_without_fence",
    "stores_not_fenced",
    "load_never_awaited",
    "load_awaited_by_some_threads",
    "stage_loaded_before_it_is_stored",
    "exit_before_message",
    "previous_kernel_read_too_early",
    "previous_kernel_not_awaited",
]

CORRECT, WRONG_RESULT, ERROR = 0, 1, 3  # statuses of charlm_run_defect()


@pytest.fixture(scope="session")
def executables() -> dict[str, Path]:
    def make(flavour: str) -> Path:
        return build.build(DEFECTS, flavour, executable=True, flags=["-Werror"], include_dirs=INCLUDE_DIRS)

    with ThreadPoolExecutor(len(build.FLAVOURS)) as pool:
        return dict(zip(build.FLAVOURS, pool.map(make, build.FLAVOURS), strict=True))


@pytest.fixture(scope="session")
def correct_kernels(executables: dict[str, Path]) -> list[str]:
    listed = subprocess.run([executables["plain"]], capture_output=True, text=True, check=True, timeout=60).stdout
    names = listed.split()
    correct = [name for name in names if name.startswith("correct_")]
    assert len(correct) >= 4
    assert {*names} == {*REPORTED_BY_EMULATOR, *SEEN_IN_RESULT, *REPORTED_BY_ADDRESS, *REPORTED_BY_THREAD, *correct}
    return correct


def run(executable: Path, flavour: str, schedule: tuple[str, int], names: Sequence[str], **options: str) -> str:
    """What a process that runs those kernels one after another writes to its standard error."""
    order, seed = schedule
    environment = build.environment(
        flavour, CHARLM_CUDA_EMULATOR_SCHEDULE=order, CHARLM_CUDA_EMULATOR_SEED=str(seed), **options
    )
    command = [*build.command_prefix(flavour), str(executable), *names]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120).stderr


def reports(stderr: str) -> dict[str, tuple[str, int]]:
    """For each kernel that came to its end: what was reported, and its status."""
    found = re.findall(r"^begin (\w+)\n(.*?)^end \1 (\d)$", stderr, re.MULTILINE | re.DOTALL)
    return {name: (report, int(status)) for name, report, status in found}


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("flavour", build.FLAVOURS)
def test_broken_rules_are_reported_and_correct_kernels_are_not(executables, correct_kernels, flavour, schedule):
    names = [*REPORTED_BY_EMULATOR, *SEEN_IN_RESULT, *correct_kernels]  # a failure leaves nothing behind for the next
    if flavour == "thread":
        names = [name for name in names if name not in REPORTED_BY_THREAD]
    found = reports(run(executables[flavour], flavour, schedule, names))
    for name in names:
        report, status = found[name]
        if name in REPORTED_BY_EMULATOR:
            assert status == ERROR, (name, report)
            assert re.search(REPORTED_BY_EMULATOR[name], report), (name, report)
            assert report.count("\n") == 1, (name, report)
        elif name in SEEN_IN_RESULT:
            assert status == WRONG_RESULT, (name, report)
        else:
            assert (report, status) == ("", CORRECT), (name, report)


@pytest.mark.parametrize("name", REPORTED_BY_ADDRESS)
def test_address_and_undefined_behaviour_are_reported(executables, name):
    with ThreadPoolExecutor(2) as pool:
        stderrs = pool.map(lambda schedule: run(executables["address"], "address", schedule, [name]), SCHEDULES)
    for schedule, stderr in zip(SCHEDULES, stderrs, strict=True):
        assert re.search(REPORTED_BY_ADDRESS[name], stderr), (schedule, stderr)
        assert not reports(stderr)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_data_races_are_reported(executables, schedule):
    options = build.environment("thread")["TSAN_OPTIONS"] + ":halt_on_error=0:suppress_equal_addresses=0"
    found = reports(run(executables["thread"], "thread", schedule, REPORTED_BY_THREAD, TSAN_OPTIONS=options))
    for name in REPORTED_BY_THREAD:
        report, _ = found[name]
        assert "WARNING: ThreadSanitizer: data race" in report, name
        assert re.search(rf"#\d .*\b{name.removesuffix('_without_fence')}", report), report  # the kernel is named


def test_an_older_gpu_has_no_transfers_clusters_and_dependent_kernels(executables):
    names = ["correct_transfers", "correct_cluster", "correct_dependent_kernel", "correct_functions"]
    stderr = run(executables["plain"], "plain", SCHEDULES[0], names, CHARLM_CUDA_EMULATOR_CAPABILITY="80")
    transfers, cluster, dependent, functions = reports(stderr).values()
    assert re.search(r"init_barrier at defects\.h:\d+ needs sm_90; the GPU has compute capability 80", transfers[0])
    for report, _ in (cluster, dependent):
        assert "invalid launch configuration: LaunchOptions on a GPU of compute capability 80" in report
    assert functions == ("", CORRECT)


def test_a_random_schedule_is_repeated_by_its_seed_and_changed_by_another(executables):
    outputs = [run(executables["plain"], "plain", ("random", seed), ["different_barriers"]) for seed in (1, 1, 2)]
    assert outputs[0] == outputs[1] != outputs[2]


def test_an_unknown_schedule_is_refused(executables):
    stderr = run(executables["plain"], "plain", ("backward", 0), ["correct_atomics"])
    assert 'CHARLM_CUDA_EMULATOR_SCHEDULE is forward, reverse or random, not "backward"' in stderr


PYTHON_PROCESS = """
import ctypes, sys, threading, torch

library = ctypes.CDLL(sys.argv[1])
out = torch.empty(130)
def run(name):
    status = library.charlm_run_defect(name.encode(), ctypes.c_void_p(out.data_ptr()))
    print(name, status, flush=True)

class Backward(torch.autograd.Function):  # autograd calls it on a thread of its own
    @staticmethod
    def forward(ctx, x):
        return x.sum()
    @staticmethod
    def backward(ctx, grad):
        run("correct_functions")
        return grad.expand(4)

for name in ("correct_block_reduction", "exit_before_barrier", "correct_dynamic_shared"):
    run(name)
    thread = threading.Thread(target=run, args=(name,))
    thread.start()
    thread.join()
Backward.apply(torch.ones(4, requires_grad=True)).backward()
print(torch.isnan(torch.empty(1000)).all().item(), flush=True)
run(sys.argv[2])
"""
CLEAN_OUTPUT = [
    *("correct_block_reduction 0", "correct_block_reduction 0", "exit_before_barrier 3", "exit_before_barrier 3"),
    *("correct_dynamic_shared 0", "correct_dynamic_shared 0", "correct_functions 0"),
]


def run_python(flavour: str, defect: str) -> tuple[list[str], str]:
    library = build.build(DEFECTS, flavour, flags=["-Werror"], include_dirs=INCLUDE_DIRS)
    done = subprocess.run(
        build.command(flavour, sys.executable, "-c", PYTHON_PROCESS, library, defect),
        env=build.environment(flavour),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    expected_status = 0 if flavour == "plain" else build.SANITIZER_EXIT_STATUS
    assert done.returncode == expected_status, done.stderr
    return done.stdout.splitlines(), done.stderr


@pytest.mark.exhaustive
def test_kernels_on_tensors_are_watched_in_a_python_process_and_on_any_of_its_threads(executables):
    cases = {"plain": "missing_tail", "address": "write_past_end", "thread": "plain_add_between_blocks"}
    with ThreadPoolExecutor(min(3, os.cpu_count() or 1)) as pool:
        outcomes = dict(zip(cases, pool.map(run_python, cases, cases.values()), strict=True))
    for stdout, _ in outcomes.values():
        assert stdout[: len(CLEAN_OUTPUT)] == CLEAN_OUTPUT

    assert outcomes["plain"][0][-1] == "missing_tail 1"

    stdout, stderr = outcomes["address"]
    assert stdout[-1] == "True"  # memory that was not written is NaN
    assert re.search(r"heap-buffer-overflow.*\nWRITE of size 4 .*\n +#0 .* write_past_end .*defects\.h:\d+", stderr)
    assert "0 bytes to the right of 520-byte region" in stderr

    stdout, stderr = outcomes["thread"]
    assert re.search(r"data race.*\n +Read of size 4 .*\n +#0 .*plain_add_between_blocks.*defects\.h:\d+", stderr)
