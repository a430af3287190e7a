"""Bitwise repeatable for any number of threads; from several Python threads, without the GIL, after fork."""

from __future__ import annotations

import os
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from charlm import functional

SIZES = [(33, 27), (257, 65), (4099, 27), (4096, 256), (33, 4099), (20_001, 7)]


def _cross_entropy(n: int, n_classes: int, **options: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, n_classes, generator=generator).requires_grad_()
    y = torch.randint(n_classes, (n,), generator=generator)
    loss = functional.cross_entropy(x, y, torch.rand(n_classes, generator=generator), **options)
    loss.backward()
    return [loss.detach(), x.grad]


def _probabilities(n: int, n_classes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, n_classes, generator=generator).requires_grad_()
    p = torch.rand(n, n_classes, generator=generator).softmax(1).requires_grad_()
    w = torch.rand(n_classes, generator=generator).requires_grad_()
    loss = functional.cross_entropy(x, p, w)
    loss.backward()
    return [loss.detach(), x.grad, p.grad, w.grad]


def _embedding(n: int, n_rows: int, **options: object) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(n_rows, 10, generator=generator).requires_grad_()
    index = torch.randint(n_rows, (n,), generator=generator)
    output = functional.embedding(index, weight, **options)
    output.backward(torch.randn(output.shape, generator=generator))
    return [output.detach(), weight.grad]


def _information(n: int, n_classes: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(n, n_classes, generator=generator).requires_grad_() for _ in range(2))
    target = torch.randint(n_classes, (n,), generator=generator)
    # Leaves of their own: torch's softmax, whose bits depend on the threads, has no part in it.
    probs, log_probs = (torch.rand(n, n_classes, generator=generator) for _ in range(2))
    log_probs, probs = log_probs.sub(5).requires_grad_(), probs.requires_grad_()
    results = [
        functional.entropy(p),
        functional.kl_divergence(p, q),
        functional.surprisal(p, target),
        functional.kl_divergence(probs, log_probs, p_kind="probs", q_kind="log_probs"),
    ]
    cotangents = [torch.randn(n, generator=generator) for _ in results]
    return [*(r.detach() for r in results), *torch.autograd.grad(results, (p, q, probs, log_probs), cotangents)]


CALLS = {
    "cross_entropy": lambda n, v: _cross_entropy(n, v, label_smoothing=0.1, lse_square_scale=0.01),
    "cross_entropy_probabilities": _probabilities,
    "embedding": _embedding,
    "embedding_scale_grad_by_freq": lambda n, v: _embedding(n, v, scale_grad_by_freq=True),
    "information": _information,
    "embedding_max_norm": lambda n, v: _embedding(n, v, max_norm=1.0),
}


@cache
def _on_one_thread(name: str, isa: str, n: int, n_classes: int) -> list[Tensor]:
    found = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return CALLS[name](n, n_classes)
    finally:
        torch.set_num_threads(found)


def _bitwise_equal(actual: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.covering(2)
@pytest.mark.parametrize("name", CALLS)
def test_results_are_bitwise_equal_for_any_number_of_threads_and_from_run_to_run(
    name: str, n_threads: int, isa: str
) -> None:
    for n, n_classes in SIZES:
        expected = _on_one_thread(name, isa, n, n_classes)
        for _ in range(2):
            assert _bitwise_equal(CALLS[name](n, n_classes), expected), (n, n_classes)


def test_several_python_threads_get_the_results_of_one() -> None:
    jobs = [(name, *size) for name in CALLS for size in SIZES] * 3
    expected = {job: CALLS[job[0]](*job[1:]) for job in set(jobs)}
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda job: CALLS[job[0]](*job[1:]), jobs))
    for job, result in zip(jobs, results, strict=True):
        assert _bitwise_equal(result, expected[job]), job


def test_a_bad_target_in_one_python_thread_does_not_disturb_the_others() -> None:
    x, y, bad = torch.randn(33, 27), torch.randint(27, (33,)), torch.full((33,), 27)
    expected = functional.cross_entropy(x, y)

    def call(i: int) -> bool:
        if i % 2:
            with pytest.raises(IndexError):
                functional.cross_entropy(x, bad)
            return True
        return torch.equal(functional.cross_entropy(x, y), expected)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(call, range(200)))


@pytest.mark.parametrize("mode", ["backward", "forward"])
def test_of_two_threads_that_go_backward_through_overwritten_logits_one_is_refused(mode: str) -> None:
    x, y = torch.randn(64, 65), torch.randint(65, (64,))
    plain = x.clone().requires_grad_()
    functional.cross_entropy(plain * 2, y).backward()
    for _ in range(50):
        leaf, start = x.clone().requires_grad_(), threading.Barrier(2)
        loss = functional.cross_entropy(leaf * 2, y, inplace=mode)

        def backward(_: int, loss: torch.Tensor = loss, start: threading.Barrier = start) -> str:
            start.wait()
            try:
                loss.backward(retain_graph=True)
            except RuntimeError as error:
                return str(error)
            return ""

        with ThreadPoolExecutor(2) as pool:
            errors = sorted(pool.map(backward, range(2)))
        assert errors[0] == ""
        assert "only once" in errors[1]
        torch.testing.assert_close(leaf.grad, plain.grad)


def test_two_threads_go_backward_through_one_embedding() -> None:
    weight, tokens = torch.randn(27, 10, requires_grad=True), torch.randint(27, (64,))
    output = functional.embedding(tokens, weight).sum()
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda _: output.backward(retain_graph=True), range(20)))
    assert torch.equal(weight.grad, 20.0 * torch.bincount(tokens, minlength=27)[:, None].expand(27, 10))


def test_every_autograd_node_is_a_kernel_node() -> None:
    sources = (Path(__file__).parent.parent / "csrc").rglob("*.cpp")
    own = re.compile(r"struct (\w+) final\s*:\s*(?:public )?Node\b")
    nodes = [node for source in sources for node in own.findall(source.read_text())]
    assert nodes == ["OverwrittenLogitsBackward"]  # which only raises


def test_the_gil_is_released_during_a_call() -> None:
    # A second Python thread moves on while a long call is inside the kernel; were the lock held, it could
    # not.
    x, y = torch.randn(4096, 8192), torch.randint(8192, (4096,))
    functional.cross_entropy(x, y)
    moments: list[float] = []
    done = threading.Event()

    def tick() -> None:
        while not done.is_set():
            moments.append(time.perf_counter())
            time.sleep(0.0005)

    ticker = threading.Thread(target=tick)
    ticker.start()
    inside = 0
    for _ in range(5):
        start = time.perf_counter()
        functional.cross_entropy(x, y)
        end = time.perf_counter()
        margin = (end - start) / 4
        inside += sum(start + margin < moment < end - margin for moment in list(moments))
    done.set()
    ticker.join()
    assert inside > 0


class _Losses(Dataset):
    """Each item is computed in the worker that loads it."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, i: int) -> Tensor:
        weight = torch.eye(27).requires_grad_()
        logits = functional.embedding(torch.arange(i + 1), weight)
        loss = functional.cross_entropy(logits, torch.arange(i + 1))
        loss.backward()
        return torch.stack([loss.detach(), weight.grad.abs().sum()])


def test_forked_data_loader_workers_run_both_ops() -> None:
    CALLS["cross_entropy"](4099, 27)  # the parent has used its own threads before
    expected = torch.stack([_Losses()[i] for i in range(8)])
    loader = DataLoader(_Losses(), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=60)
    torch.testing.assert_close(torch.cat(list(loader)), expected)


def test_a_forked_child_of_one_thread_runs_both_ops() -> None:
    expected = CALLS["cross_entropy"](4099, 27), CALLS["embedding"](4099, 27)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        actual = CALLS["cross_entropy"](4099, 27), CALLS["embedding"](4099, 27)
        os._exit(0 if all(map(_bitwise_equal, actual, expected)) else 1)
    deadline = time.monotonic() + 60
    while (status := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, 9)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert os.waitstatus_to_exitcode(status[1]) == 0
