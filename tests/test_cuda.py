"""The kernels' results on a GPU: every sample, alignments, lengths, sizes past 2^31, and the same bits every time.

`make gpu` runs this file, test_cuda_indices.py and test_cuda_runtime.py.
"""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F
from gpu_support import (
    DEVICE,
    ON_GPU,
    assert_equal,
    call_and_inputs,
    embedding_and_gradient,
    every_call,
    loss_and_gradient,
)
from torch import Tensor

from charlm import functional, reference
from charlm.reference import INDEX_DTYPES
from charlm.testing import (
    FLOAT_DTYPES,
    SampleInput,
    assert_matches_reference,
    sample_inputs_cross_entropy,
    sample_inputs_embedding,
    sample_inputs_embedding_linear,
    sample_inputs_entropy,
    sample_inputs_kl_div,
    sample_inputs_kl_divergence,
    sample_inputs_linear_cross_entropy,
    sample_inputs_surprisal,
)

GIB = 2**30

SAMPLES = {
    "cross_entropy": sample_inputs_cross_entropy,
    "embedding": sample_inputs_embedding,
    "embedding_linear": sample_inputs_embedding_linear,
    "entropy": sample_inputs_entropy,
    "kl_div": sample_inputs_kl_div,
    "kl_divergence": sample_inputs_kl_divergence,
    "linear_cross_entropy": sample_inputs_linear_cross_entropy,
    "surprisal": sample_inputs_surprisal,
}
EVERY_SAMPLE = [(op, sample.name) for op, make in SAMPLES.items() for sample in make(torch.float32)]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def on_gpu_or_dry(size: int, dry: int) -> int:
    return size if ON_GPU else dry


def requires_memory(count: int) -> None:
    if ON_GPU:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < count:
            pytest.skip(f"needs {count / GIB:.0f} GiB of the GPU's memory, {free / GIB:.0f} are free")


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def randint(high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, device=DEVICE)


@functools.cache
def samples(op: str, dtype: torch.dtype) -> dict[str, SampleInput]:
    return {sample.name: sample for sample in SAMPLES[op](dtype, DEVICE)}


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("op", "name"), EVERY_SAMPLE)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(op: str, name: str, dtype: torch.dtype) -> None:
    assert_matches_reference(getattr(functional, op), getattr(reference, op), samples(op, dtype)[name])


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 2, 3, 5, 7])
def test_storage_offsets_that_no_vector_load_is_aligned_to_are_fine(offset: int, dtype: torch.dtype) -> None:
    for n_classes in (2, 27, 64, 1000, 4099):
        logits = randn(33 * n_classes + offset, dtype=dtype)[offset:].view(33, n_classes)
        sample = SampleInput("misaligned", {"input": logits, "target": randint(n_classes, 33)}, ("input",))
        assert_matches_reference(functional.cross_entropy, reference.cross_entropy, sample)
    for width in (1, 10, 64):
        weight = randn(27 * width + offset, dtype=dtype)[offset:].view(27, width)
        sample = SampleInput("misaligned", {"input": randint(27, 257), "weight": weight}, ("weight",))
        assert_matches_reference(functional.embedding, reference.embedding, sample)


@pytest.mark.parametrize("n_classes", [1000, 8192, 32000, 50257, 65537, 128256])
def test_long_rows_are_as_close_to_float64_as_torchs(n_classes: int) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        arguments = {"input": randn(5, n_classes, dtype=dtype), "target": randint(n_classes, 5)}
        for options in ({}, {"reduction": "none"}, {"label_smoothing": 0.1, "lse_square_scale": 0.1}):
            sample = SampleInput("long_rows", {**arguments, **options}, ("input",))
            assert_matches_reference(functional.cross_entropy, reference.cross_entropy, sample)
        p, q = arguments["input"], randn(5, n_classes, dtype=dtype)
        sample = SampleInput("long_rows", {"logits": p}, ("logits",))
        assert_matches_reference(functional.entropy, reference.entropy, sample)
        sample = SampleInput("long_rows", {"p": p, "q": q}, ("p", "q"))
        assert_matches_reference(functional.kl_divergence, reference.kl_divergence, sample)


# 48 KiB of shared memory are granted without an attribute, to static and dynamic memory together.
@pytest.mark.parametrize(
    ("n_classes", "dtype"), [(6144, torch.float64), (12288, torch.float32), (24576, torch.bfloat16)]
)
def test_rows_that_fill_48_kib_of_shared_memory(n_classes: int, dtype: torch.dtype) -> None:
    n = on_gpu_or_dry(300, 3)
    logits, target = randn(n, n_classes, dtype=dtype).requires_grad_(), randint(n_classes, n)
    loss, grad = loss_and_gradient(logits, target)
    expected = F.cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(grad, *torch.autograd.grad(expected, logits))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("num_embeddings", [23, 46, 47, 48, 191, 383])
def test_tables_that_fill_48_kib_of_shared_memory(num_embeddings: int, dtype: torch.dtype) -> None:
    weight = randn(num_embeddings, 32, dtype=dtype).requires_grad_()
    _, grad = embedding_and_gradient(weight, torch.arange(num_embeddings, device=DEVICE).repeat(20))
    torch.testing.assert_close(grad, 20 * weight.detach())


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_every_integer_dtype_of_indices_gives_the_int64_result(dtype: torch.dtype) -> None:
    index, weight, logits = randint(27, 257), randn(27, 10), randn(257, 27)
    for run, values in ((embedding_and_gradient, weight), (loss_and_gradient, logits)):
        assert_equal(run(values.requires_grad_(), index.to(dtype)), run(values, index))


def test_a_row_of_minus_infinity_is_nan_like_torch_and_no_other_is() -> None:
    for n_classes in (2, 27, 1000, 70_001):
        logits = randn(5, n_classes)
        logits[1] = -torch.inf
        logits[2, 1:] = -torch.inf
        loss = functional.cross_entropy(logits.requires_grad_(), torch.zeros_like(randint(2, 5)), reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert loss.isnan().tolist() == gradient.isnan().any(1).tolist() == [False, True, False, False, False]
        assert loss[2].item() == 0


@pytest.mark.parametrize("mode", ["forward", "backward"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("n_classes", [27, 1000, 70_001])
def test_in_place_loss_and_gradient_are_those_out_of_place(mode: str, dtype: torch.dtype, n_classes: int) -> None:
    leaf, target = randn(33, n_classes, dtype=dtype).requires_grad_(), randint(n_classes, 33)
    results = []
    for options in ({"inplace": mode}, {}):
        loss = functional.cross_entropy(leaf * 2, target, **options)
        results.append([loss, *torch.autograd.grad(loss, leaf)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize(("n_rows", "n_classes"), [(20_000_003, 2), (2_097_169, 27), (140_003, 300)])
def test_more_rows_than_65535_blocks_hold(n_rows: int, n_classes: int) -> None:
    n_rows = on_gpu_or_dry(n_rows, 1003)
    logits, target = randn(n_rows, n_classes).requires_grad_(), randint(n_classes, n_rows)
    exact = logits.detach().double().requires_grad_()
    loss, expected = (
        op(x, target, reduction="sum") for op, x in ((functional.cross_entropy, logits), (F.cross_entropy, exact))
    )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)
    loss.backward()
    expected.backward()
    torch.testing.assert_close(logits.grad.double(), exact.grad, rtol=1e-4, atol=1e-6)


def test_logits_beyond_two_to_the_31_elements() -> None:
    n_rows, n_classes = on_gpu_or_dry(33_003, 103), on_gpu_or_dry(65_537, 101)
    requires_memory(16 * GIB)
    logits = torch.randn(n_rows, n_classes, device=DEVICE, dtype=torch.bfloat16).requires_grad_()
    target = randint(n_classes, n_rows)
    loss = functional.cross_entropy(logits, target, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    for rows in (slice(0, 3), slice(-3, None)):
        few = logits[rows].detach().float().requires_grad_()
        expected = F.cross_entropy(few, target[rows], reduction="none")
        expected.sum().backward()
        torch.testing.assert_close(loss[rows].float(), expected, rtol=2**-7, atol=0)
        torch.testing.assert_close(gradient[rows].float(), few.grad, rtol=2**-7, atol=1e-6)


def test_an_embedding_beyond_two_to_the_31_elements_and_its_gradient() -> None:
    n, width = on_gpu_or_dry(4_194_319, 1009), on_gpu_or_dry(520, 24)
    requires_memory(16 * GIB)
    index = randint(27, n)
    weight = randn(27, width, dtype=torch.bfloat16).requires_grad_()
    output = functional.embedding(index, weight)
    for rows in (slice(0, 3), slice(-3, None)):
        assert torch.equal(output[rows], weight[index[rows]])
    (gradient,) = torch.autograd.grad(output, weight, torch.ones_like(output))
    counts = torch.bincount(index, minlength=27).bfloat16()  # exact in float, and rounded once
    assert torch.equal(gradient, counts[:, None].expand_as(gradient))


@every_call
def test_repeated_calls_give_the_same_bits(name: str) -> None:
    call, values, index = call_and_inputs(name)
    first = call(values, index)
    for _ in range(5):
        assert_equal(call(values, index), first)


@every_call
def test_deterministic_algorithms_can_be_demanded(name: str) -> None:
    call, values, index = call_and_inputs(name)
    expected = call(values, index)
    torch.use_deterministic_algorithms(True)
    try:
        assert_equal(call(values, index), expected)
    finally:
        torch.use_deterministic_algorithms(False)
