"""The kernels of csrc/cuda without a GPU: the emulator runs them on the CPU under the tests of the ops.

Each run is a pytest process in which the emulated kernels replace the CPU's; two run at a time. No run covers the GPU's
memory model, its speed, or nvcc's output (tests/test_cuda_build.py). `make test` has the samples that cover the ops and
a mutant of each kind; `make test-all` has all tests, sanitizers and mutants; the runs that repeat them in another
order, or with more samples under ThreadSanitizer, take minutes each: `make test-on-demand`.
"""

from __future__ import annotations

import functools
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.cuda_emulator.build import ROOT, SANITIZER_EXIT_STATUS
from tests.cuda_emulator.mutants import MUTANTS, Mutant
from tests.cuda_emulator.ops import CSRC, build_ops, copy_csrc, pytest_command, pytest_environment

KERNEL_TESTS = (
    *sorted(f"tests/{path.name}" for path in (ROOT / "tests").glob("test_cross_entropy*.py")),
    "tests/test_differentiable_metrics.py",
    "tests/test_embedding.py",
    "tests/test_embedding_linear.py",
    "tests/test_entropy.py",
    "tests/test_kl_div.py",
    "tests/test_kl_divergence.py",
    "tests/test_large_offsets.py",
    "tests/test_surprisal.py",
)
# A kernel may find another of several bad targets first, as on a GPU.
FIRST_BAD_TARGET = "first_of_several_bad_targets"
OPS_TESTS = (
    *KERNEL_TESTS,
    "tests/test_few_classes.py",
    "tests/test_linear_cross_entropy.py",
    "tests/test_linear_cross_entropy_budget.py",
    "tests/test_linear_cross_entropy_calls.py",
    "tests/test_linear_cross_entropy_shift.py",
    "tests/test_loss_dtype.py",
    "tests/test_many_rows.py",
    "tests/test_modules.py",
    "tests/test_torch_citizenship_compile.py",
    "tests/test_torch_citizenship_dispatch.py",
    "tests/test_torch_citizenship_functorch.py",
    *("-k", f"not {FIRST_BAD_TARGET}"),
)
# Millions of rows, or torch.compile's time.
SLOW = ("float16_gradients_survive", "first_of_equal_largest", "float16_waits", "loss_scale", "grad_scaler", "compile")
FEW_TESTS = (*KERNEL_TESTS, "-k", " and ".join(f"not {name}" for name in (*SLOW, FIRST_BAD_TARGET)))
EVERY_CASE = ("-m", "")
DEVICE_TESTS = ("tests/test_cuda.py",)
DISTRIBUTED_TESTS = (
    "tests/test_vocab_parallel.py",
    "tests/test_distributed_calls.py",
    "tests/test_distributed_sharding.py",
    *("-k", "not compiles and not all_samples and not 4"),  # of four processes the kernels are the same
    *("-m", ""),
)
SAMPLE_TESTS = tuple(
    f"tests/test_{op}.py"
    for op in ("cross_entropy", "embedding", "embedding_linear", "entropy", "kl_div", "kl_divergence")
)
FEW_SAMPLES = (*SAMPLE_TESTS, "-k", "as_close_to_float64")
SAMPLES = (*FEW_SAMPLES, *EVERY_CASE)
FLOAT_SAMPLES = (*SAMPLE_TESTS, "-k", "as_close_to_float64 and float32", *EVERY_CASE)
# Two bfloat16 numbers share a word, as two float16 numbers do.
FEW_FLOAT_AND_HALF_SAMPLES = (*SAMPLE_TESTS, "-k", "as_close_to_float64 and (float32 or bfloat16)")
FLOAT_AND_HALF_SAMPLES = (*FEW_FLOAT_AND_HALF_SAMPLES, *EVERY_CASE)
ROWS_OF_A_CLUSTER = (
    "tests/test_cross_entropy_rows.py",
    "-k",
    "(few_rows_and_many or without_a_gradient) and (float32 or bfloat16)",
    *EVERY_CASE,
)
TESTS_FAILED = 1  # pytest's exit status


@dataclass(frozen=True)
class Run:
    """A pytest on emulated ops."""

    name: str
    flavour: str
    schedule: str
    arguments: tuple[str, ...]
    seed: int = 0
    exhaustive: bool = False
    on_demand: bool = False
    capability: int = 90  # of the GPU: 10 * major + minor
    few_blocks: bool = False

    def start(self) -> subprocess.CompletedProcess[str]:
        with tempfile.TemporaryDirectory() as folder:
            csrc = copy_csrc(Path(folder), few_blocks=True) if self.few_blocks else CSRC
            library = build_ops(self.flavour, csrc)
        environment = pytest_environment(self.flavour, library, self.schedule, self.seed, self.capability)
        return run(self.flavour, environment, self.arguments)


RUNS = (
    Run("few_samples_forward", "plain", "forward", FEW_SAMPLES),
    Run("kernels_forward", "plain", "forward", FEW_TESTS, exhaustive=True),
    Run("ops_forward", "plain", "forward", (*OPS_TESTS, *EVERY_CASE), exhaustive=True),
    Run("kernels_of_few_blocks", "plain", "reverse", FEW_TESTS, exhaustive=True, few_blocks=True),
    Run("ops_random", "plain", "random", OPS_TESTS, 6, on_demand=True),
    Run("distributed_forward", "plain", "forward", DISTRIBUTED_TESTS, exhaustive=True),
    Run("device_tests_forward", "plain", "forward", DEVICE_TESTS, exhaustive=True),
    Run("kernels_of_sm_80", "plain", "forward", FEW_TESTS, exhaustive=True, capability=80),
    *(
        Run(f"samples_of_sm_80_{flavour}", flavour, "random", FLOAT_SAMPLES, 10, exhaustive=True, capability=80)
        for flavour in ("address", "thread")
    ),
    Run("samples_reverse", "plain", "reverse", SAMPLES, exhaustive=True),
    Run("samples_random_1", "plain", "random", SAMPLES, 1, exhaustive=True),
    *(Run(f"samples_random_{seed}", "plain", "random", SAMPLES, seed, on_demand=True) for seed in (2, 3)),
    *(
        Run(f"samples_address_{schedule}", "address", schedule, SAMPLES, 7, exhaustive=True)
        for schedule in ("forward", "random")
    ),
    # ThreadSanitizer finds accesses that nothing orders, in whatever order they happen.
    Run("few_samples_thread_forward", "thread", "forward", FEW_FLOAT_AND_HALF_SAMPLES, exhaustive=True),
    Run("samples_thread_forward", "thread", "forward", FLOAT_AND_HALF_SAMPLES, on_demand=True),
    Run("samples_thread_random", "thread", "random", FLOAT_SAMPLES, 7, exhaustive=True),
    Run("rows_of_few_blocks_thread", "thread", "forward", ROWS_OF_A_CLUSTER, exhaustive=True, few_blocks=True),
)
ON_DEMAND_LIMIT = 3600  # seconds; 900 were too few for the whole of the ops' tests on a busy machine
# Mutants that stand for their kind in `make test`; `make test-all` runs all of them.
FEW_MUTANTS = {"missing_wait_for_a_chunk", "wrong_shuffle_width", "missing_tail", "offset_of_32_bits"}


def run(flavour: str, environment: dict[str, str], arguments: tuple[str, ...]) -> subprocess.CompletedProcess[str]:
    captured = [] if flavour == "plain" else ["-s"]  # a sanitizer's report must reach us
    return subprocess.run(
        pytest_command(flavour, *captured, *arguments),
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=ON_DEMAND_LIMIT,
    )


def run_mutant(mutant: Mutant) -> subprocess.CompletedProcess[str]:
    with tempfile.TemporaryDirectory() as folder:
        library = build_ops(mutant.flavour, mutant.write(Path(folder)))
        environment = pytest_environment(mutant.flavour, library, mutant.schedule)
        return run(mutant.flavour, environment, ("-x", *EVERY_CASE, *mutant.arguments))


JOBS: dict[str, Callable[[], subprocess.CompletedProcess[str]]] = {
    **{job.name: job.start for job in RUNS},
    **{mutant.name: functools.partial(run_mutant, mutant) for mutant in MUTANTS},
}


def parameters(items: tuple[Run, ...] | tuple[Mutant, ...], exhaustive: set[str], on_demand: set[str]) -> list[object]:
    marks = {
        **{name: [pytest.mark.exhaustive] for name in exhaustive},
        **{name: [pytest.mark.on_demand, pytest.mark.timeout(ON_DEMAND_LIMIT)] for name in on_demand},
    }
    return [pytest.param(item, id=item.name, marks=marks.get(item.name, [])) for item in items]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """By name, the selected jobs: all submitted at once, run two at a time, in the order of the tests."""
    here = [item for item in request.session.items if item.path == request.path and hasattr(item, "callspec")]
    names = [item.callspec.params["job"].name for item in here if "job" in item.callspec.params]
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(JOBS[name]) for name in names}
        pool.shutdown(cancel_futures=True)


@pytest.mark.parametrize(
    "job",
    parameters(RUNS, {job.name for job in RUNS if job.exhaustive}, {job.name for job in RUNS if job.on_demand}),
)
def test_the_tests_of_the_ops_pass_on_emulated_cuda_kernels(
    job: Run, results: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = results[job.name].result()
    assert done.returncode == 0, f"{done.stdout[-6000:]}\n{done.stderr[-6000:]}"
    assert " passed" in done.stdout


BAD_ROWS = """
import sys
import torch
from tests.cuda_emulator.ops import run_cpu_ops_on_emulator

run_cpu_ops_on_emulator(sys.argv[1])
ops = torch.ops.charlm
options = (-100, 0.0, 0.0, 0.0, 1.0, False)


def then_raises(results):
    try:
        ops._synchronize(torch.zeros(1))
    except IndexError:
        return results
    raise AssertionError("no IndexError")


target = torch.tensor([1, 700000, -1, 2])
kept = [0, 3]
for n_classes in (27, 1000, 70001):
    logits = torch.randn(4, n_classes)
    leaf = logits[kept].requires_grad_()
    (right,) = torch.autograd.grad(ops.cross_entropy(leaf, target[kept], None, None, 2, *options)[0], leaf)
    leaf = logits.clone().requires_grad_()
    loss, state = then_raises(ops.cross_entropy(leaf, target, None, None, 2, *options))
    (grad,) = torch.autograd.grad(loss, leaf)
    ops._synchronize(torch.zeros(1))  # raises nothing: the forward has computed the gradient
    assert not grad[1:3].any() and torch.allclose(grad[kept], right), grad
    losses, _ = then_raises(ops.cross_entropy(logits, target, None, None, 0, *options))
    assert not losses[1:3].any() and losses[kept].all(), losses
    of_loss = torch.tensor(1.0), logits, target, None, None, state
    later, _ = then_raises(ops._cross_entropy_backward(*of_loss, None, None, None, [True, False], 2, *options))
    assert torch.equal(later, grad)
    given = logits.requires_grad_() * 1
    then_raises(ops.cross_entropy_inplace_forward(given, target, None, None, 2, *options))
    assert torch.equal(given[1:3], logits[1:3]) and torch.equal(given[kept], grad[kept])
for width in (1, 10, 300):
    table, index = torch.randn(27, width), torch.tensor([3, 27, 4, -1, 5])
    rows = then_raises(ops.embedding(table, index, -1, False, False))
    assert not rows[1::2].any() and torch.equal(rows[::2], table[3:6])
    index, weight, grad = torch.stack([index, index.flip(0)], 1), torch.randn(9, 2 * width), torch.randn(5, 9)
    good, bad = [0, 2, 4], (index, table, weight)
    for plan in (1, 2):
        right, _ = ops.embedding_linear(index[good], table, weight, None, -1, 0, plan)
        rows, _ = then_raises(ops.embedding_linear(*bad, None, -1, 0, plan))
        assert torch.allclose(rows[good], right, atol=1e-4)
    needs = [True, True, False]
    right = ops._embedding_linear_backward(grad[good], index[good], table, weight, grad[good], -1, 0, 1, needs)
    grads = then_raises(ops._embedding_linear_backward(grad, *bad, grad, -1, 0, 1, needs))
    assert all(torch.allclose(ours, expected, atol=1e-4) for ours, expected in zip(grads[:2], right[:2], strict=True))
"""


def test_a_bad_index_gets_zeros_and_leaves_logits_in_place_as_they_are() -> None:
    environment = pytest_environment("plain", build_ops("plain"), "random", 8) | {"CHARLM_CUDA_CHECK": "0"}
    command = [sys.executable, "-c", BAD_ROWS, build_ops("plain")]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_the_place_of_every_defect_is_in_our_kernels(mutant: Mutant, tmp_path: Path) -> None:
    mutant.write(tmp_path)


@pytest.mark.parametrize("job", parameters(MUTANTS, {mutant.name for mutant in MUTANTS} - FEW_MUTANTS, set()))
def test_a_defect_in_a_kernel_is_caught(
    job: Mutant, results: dict[str, Future[subprocess.CompletedProcess[str]]]
) -> None:
    done = results[job.name].result()
    caught = {TESTS_FAILED, -signal.SIGSEGV} if job.flavour == "plain" else {TESTS_FAILED, SANITIZER_EXIT_STATUS}
    assert done.returncode in caught, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    if job.flavour == "thread":
        assert "data race" in done.stdout + done.stderr
