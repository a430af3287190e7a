"""embedding on every sample, dtype and instruction set, and its options, against torch and float64."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from charlm import functional, reference
from charlm.reference import INDEX_DTYPES
from charlm.testing import (
    FLOAT_DTYPES,
    SampleInput,
    assert_close_to_reference,
    assert_matches_reference,
    evaluate,
    sample_inputs_embedding,
)

SAMPLES = [
    pytest.param(sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_embedding(dtype)
]


@pytest.mark.covering
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(sample: SampleInput, isa: str) -> None:
    assert_matches_reference(functional.embedding, reference.embedding, sample)


@pytest.mark.covering
@pytest.mark.parametrize("sample", [p for p in SAMPLES if "max_norm" not in p.values[0].arguments])
def test_rows_are_copied_bit_by_bit(sample: SampleInput, isa: str) -> None:
    actual, expected = evaluate(functional.embedding, sample), evaluate(reference.embedding, sample)
    assert torch.equal(actual["output"], expected["output"])


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_every_integer_dtype_of_indices_gives_the_int64_result(dtype: torch.dtype, isa: str) -> None:
    index = torch.randint(27, (3, 11))
    gradients = []
    for indices in (index, index.to(dtype)):
        weight = torch.arange(270.0).view(27, 10).requires_grad_()
        output = functional.embedding(indices, weight)
        assert torch.equal(output, weight[index])
        output.square().sum().backward()
        gradients.append(weight.grad)
    assert torch.equal(*gradients)


def test_bfloat16_gradients_of_a_hot_row_do_not_stall_at_256(isa: str) -> None:
    # Summed in bfloat16 one by one, 256 + 1 is 256 again.
    weight = torch.zeros(27, 10, dtype=torch.bfloat16, requires_grad=True)
    functional.embedding(torch.zeros(4096, dtype=torch.int64), weight).sum().backward()
    assert weight.grad[0].tolist() == [4096.0] * 10


def test_output_at_padding_idx_is_the_row_and_its_gradient_is_zero() -> None:
    weight = torch.ones(7, 3, requires_grad=True)
    output = functional.embedding(torch.tensor([2, 5, 2]), weight, padding_idx=-5)
    output.sum().backward()
    assert output.tolist() == [[1.0] * 3] * 3
    assert weight.grad.sum(1).tolist() == [0, 0, 0, 0, 0, 3.0, 0]


@pytest.mark.covering(2)
@pytest.mark.parametrize("index_dtype", [torch.int64, torch.uint8], ids=str)
@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.5, torch.inf, 0.0, -1.0])
def test_max_norm_scales_the_rows_that_are_looked_up_in_place_like_torch(
    norm_type: float, index_dtype: torch.dtype, isa: str
) -> None:
    ours, theirs = (torch.arange(-35.0, 35).view(7, 10) / 10 for _ in range(2))
    index = torch.tensor([[2, 5, 2], [0, 5, 5]])
    output = functional.embedding(index.to(index_dtype), ours, max_norm=1.0, norm_type=norm_type)
    expected = F.embedding(index, theirs, max_norm=1.0, norm_type=norm_type)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(output, expected)
    assert torch.equal(ours[1], torch.arange(-25.0, -15) / 10)  # not looked up


def test_max_norm_counts_its_write_and_works_on_a_parameter() -> None:
    weight = torch.nn.Parameter(torch.ones(7, 10))
    functional.embedding(torch.tensor([1]), weight, max_norm=1.0).sum().backward()
    assert weight._version == 1
    torch.testing.assert_close(weight.detach().norm(dim=1)[:2], torch.tensor([10**0.5, 1.0]))
    assert weight.grad.sum(1).tolist() == [0, 10.0, 0, 0, 0, 0, 0]


def test_max_norm_writes_nothing_where_an_index_is_bad(isa: str) -> None:
    weight = torch.ones(7, 10)
    with pytest.raises(IndexError, match=r"index 7 at position \(1, 1\) is out of range for 7 embeddings"):
        functional.embedding(torch.tensor([[0, 1], [2, 7]]), weight, max_norm=1.0)
    assert torch.equal(weight, torch.ones(7, 10))


def test_a_changed_weight_is_no_obstacle_to_backward() -> None:
    # Like torch's, the backward needs indices only: an optimizer may step before it.
    weight = torch.ones(7, 3, requires_grad=True)
    output = functional.embedding(torch.tensor([2]), weight)
    with torch.no_grad():
        weight.mul_(2)
    output.sum().backward()
    assert weight.grad.sum().item() == 3


def test_changing_the_indices_between_forward_and_backward_raises() -> None:
    weight, index = torch.ones(7, 3, requires_grad=True), torch.tensor([2, 3])
    output = functional.embedding(index, weight)
    index.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("options", [{}, {"padding_idx": 2}], ids=str)
def test_sparse_gradients_equal_torchs(options: dict[str, Any]) -> None:
    index, gradients = torch.tensor([[0, 2], [2, 5]]), []
    for embedding in (functional.embedding, F.embedding):
        weight = torch.ones(7, 3, requires_grad=True)
        (embedding(index, weight, sparse=True, **options) * torch.arange(3.0)).sum().backward()
        gradients.append(weight.grad)
    ours, theirs = gradients
    assert ours.layout == torch.sparse_coo
    assert ours.is_coalesced() == theirs.is_coalesced()
    assert torch.equal(ours._indices(), theirs._indices())
    assert torch.equal(ours._values(), theirs._values())


def test_a_sparse_adam_step_equals_the_one_with_torchs_embedding() -> None:
    weights = []
    for embedding in (functional.embedding, F.embedding):
        weight = torch.ones(7, 3, requires_grad=True)
        optimizer = torch.optim.SparseAdam([weight])
        embedding(torch.tensor([1, 1, 4]), weight, sparse=True).square().sum().backward()
        optimizer.step()
        weights.append(weight.detach())
    torch.testing.assert_close(*weights)


def test_first_derivatives_of_every_kind_equal_finite_differences(isa: str) -> None:
    weight, index = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([[0, 2], [2, 3]])
    assert gradcheck(lambda w: functional.embedding(index, w), weight, check_forward_ad=True, check_batched_grad=True)


# With scale_grad_by_freq the gradient is by rule not that of the function: only its own derivative, by the
# incoming gradient, can be checked, and a function that is linear in the weight has no other.
@pytest.mark.parametrize(
    ("options", "outer"),
    [
        ({}, torch.sin),
        ({"padding_idx": 1}, torch.sin),
        ({"padding_idx": -1}, torch.sin),
        ({"scale_grad_by_freq": True}, torch.clone),
        ({"scale_grad_by_freq": True, "padding_idx": 2}, torch.clone),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_second_derivatives_equal_finite_differences(
    options: dict[str, Any], outer: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    weight, index = torch.randn(5, 3, dtype=torch.float64, requires_grad=True), torch.tensor([[0, 2], [2, 3]])
    assert gradgradcheck(lambda w: outer(functional.embedding(index, w, **options)), weight)


def test_a_double_backward_equals_torchs_with_padding() -> None:
    index, second = torch.tensor([0, 2, 2, 3]), []
    for embedding in (functional.embedding, F.embedding):
        weight = torch.arange(15.0, dtype=torch.float64).view(5, 3).requires_grad_()
        output = embedding(index, weight, padding_idx=3).sin()
        (gradient,) = torch.autograd.grad(output.sum(), weight, create_graph=True)
        gradient.square().sum().backward()
        second.append(weight.grad)
    torch.testing.assert_close(*second)


# (N, V, D) on both sides of each choice of kernel for the gradient on a GPU (csrc/cuda/embedding.cu): narrow rows,
# whole packs of 16 bytes or not, V of one, two and three digits of 8 bits, one or more chunks and batches.
GRADIENTS = [
    *((700, 27, d) for d in (1, 7, 8, 15, 16, 31, 32, 64, 65, 128, 200, 260)),
    *((700, v, d) for v in (1, 2, 255, 256, 257, 1000) for d in (15, 36, 64, 520)),
    *((300, v, d) for v in (65536, 65537) for d in (3, 8)),
    *((n, v, 20) for n in (1, 2, 31, 32, 33, 64, 127, 128, 129, 2047, 2048, 2049, 4100) for v in (5, 300)),
]


def indices_of(n: int, v: int, skew: str) -> torch.Tensor:
    index = torch.randint(v, (n,))
    if skew == "one index":
        index[:] = v // 2
    elif skew == "half of one index":
        index[torch.rand(n) < 0.5] = v - 1
    return index


def assert_gradient_is_summed(grad: torch.Tensor, index: torch.Tensor, v: int, padding_idx: int, scale: bool) -> None:
    op = torch.ops.charlm._embedding_backward
    actual = op(grad, index, v, padding_idx, scale)
    assert torch.equal(actual, op(grad, index, v, padding_idx, scale))  # the same bits every time
    exact = torch.zeros(v, grad.size(1), dtype=torch.float64).index_add_(0, index, grad.double())
    size = torch.zeros_like(exact).index_add_(0, index, grad.double().abs())
    if scale:
        count = index.bincount(minlength=v).clamp(min=1)[:, None]
        exact, size = exact / count, size / count
    if padding_idx >= 0:
        exact[padding_idx] = 0
    compute = torch.float64 if grad.dtype == torch.float64 else torch.float32
    rounding = 0 if grad.dtype == compute else torch.finfo(grad.dtype).eps / 2
    limit = exact.abs() * rounding + size * 16 * torch.finfo(compute).eps + 1e-7 * (compute != grad.dtype)
    assert ((actual.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("skew", ["even", "one index", "half of one index"])
@pytest.mark.parametrize(("n", "v", "d"), GRADIENTS, ids=str)
def test_the_gradient_of_every_size_is_the_sum_of_its_rows(n: int, v: int, d: int, skew: str) -> None:
    index, grad = indices_of(n, v, skew), torch.randn(n, d)
    assert_gradient_is_summed(grad, index, v, -1, scale=False)
    assert_gradient_is_summed(grad, index, v, v // 2, scale=True)


SIZES = [(900, 27, 10), (900, 27, 80), (900, 256, 64), (900, 256, 65), (900, 300, 64), (900, 300, 33), (99, 70000, 8)]


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v", "d"), SIZES)
def test_the_gradient_of_every_dtype_and_alignment_is_the_sum_of_its_rows(
    n: int, v: int, d: int, dtype: torch.dtype
) -> None:
    index, memory = indices_of(n, v, "half of one index"), torch.randn(n * d + 1).to(dtype)
    for offset in (0, 1):
        grad = memory[offset : offset + n * d].view(n, d)
        for scale in (False, True):
            assert_gradient_is_summed(grad, index, v, 0, scale)


@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(200, 127, 10), (200, 127, 64), (200, 300, 10)])
def test_gradients_for_every_integer_dtype_have_the_same_bits(n: int, v: int, d: int, dtype: torch.dtype) -> None:
    index, grad = torch.randint(127, (n,)), torch.randn(n, d)
    for scale in (False, True):
        expected, actual = (
            torch.ops.charlm._embedding_backward(grad, i, v, -1, scale) for i in (index, index.to(dtype))
        )
        assert torch.equal(actual, expected)


@pytest.mark.parametrize(("n", "v", "d"), SIZES)
def test_nan_and_infinity_reach_the_rows_of_their_indices_only(n: int, v: int, d: int) -> None:
    index, grad = indices_of(n, v, "even"), torch.randn(n, d)
    grad[3, 1], grad[5, 2], grad[7, 0] = torch.nan, torch.inf, -torch.inf
    for scale in (False, True):
        actual = torch.ops.charlm._embedding_backward(grad, index, v, -1, scale)
        finite = torch.ones(v, d, dtype=torch.bool)
        finite[index[3], 1] = finite[index[5], 2] = finite[index[7], 0] = False
        assert torch.equal(actual.isfinite(), finite)
        assert actual[index[3], 1].isnan()
        assert actual[index[5], 2] == torch.inf


@pytest.mark.parametrize("bad", [-1, 0])
@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize(("n", "v", "d"), SIZES)
def test_a_gradient_for_an_index_out_of_range_raises(n: int, v: int, d: int, scale: bool, bad: int) -> None:
    index = torch.randint(v, (n,))
    index[n - 3] = bad or v
    with pytest.raises(
        IndexError, match=rf"index {bad or v} at position \({n - 3},\) is out of range for {v} embeddings"
    ):
        torch.ops.charlm._embedding_backward(torch.randn(n, d), index, v, -1, scale)


def test_a_segment_over_hundreds_of_chunks_is_joined() -> None:
    index = torch.full((10000,), 7)
    index[:50] = torch.arange(50)
    assert_gradient_is_summed(torch.randn(10000, 8), index, 300, -1, scale=True)


TABLE, INDEX = torch.arange(15.0).view(5, 3), torch.tensor([0, 1, 4])

REFUSED: dict[str, Callable[[ModuleType], torch.Tensor]] = {
    "index_too_large": lambda f: f.embedding(torch.tensor([[0, 1, 5]]), TABLE),
    "index_negative": lambda f: f.embedding(torch.tensor([-1]), TABLE),
    "index_too_large_max_norm": lambda f: f.embedding(torch.tensor([7]), TABLE.clone(), max_norm=1.0),
    "bool_index": lambda f: f.embedding(INDEX.bool(), TABLE),
    "float_index": lambda f: f.embedding(INDEX.float(), TABLE),
    "weight_1d": lambda f: f.embedding(INDEX, TABLE[0]),
    "weight_3d": lambda f: f.embedding(INDEX, TABLE[None]),
    "padding_idx_too_large": lambda f: f.embedding(INDEX, TABLE, padding_idx=5),
    "padding_idx_too_small": lambda f: f.embedding(INDEX, TABLE, padding_idx=-6),
    "list_as_index": lambda f: f.embedding([1], TABLE),
    "list_as_weight": lambda f: f.embedding(INDEX, [[1.0]]),
    "sparse_with_scale_grad_by_freq": lambda f: (
        f.embedding(INDEX, TABLE.clone().requires_grad_(), sparse=True, scale_grad_by_freq=True).sum().backward()
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_refused_call_raises_torchs_exception(name: str) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011  torch says which one
        REFUSED[name](F)
    with pytest.raises(theirs.type) as ours:
        REFUSED[name](functional)
    assert ours.type is theirs.type


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.bool, torch.complex64], ids=str)
def test_tables_that_are_not_floating_are_looked_up_like_torchs(dtype: torch.dtype) -> None:
    weight = (TABLE % 2).to(dtype)
    assert torch.equal(functional.embedding(INDEX, weight), F.embedding(INDEX, weight))


@pytest.mark.parametrize(("value", "dtype"), [(27, torch.int64), (-1, torch.int8), (255, torch.uint8)])
def test_an_out_of_range_index_is_named_with_position_and_limit(value: int, dtype: torch.dtype, isa: str) -> None:
    index = torch.zeros(2, 3, dtype=dtype)
    index[0, 2] = value
    with pytest.raises(IndexError, match=rf"index {value} at position \(0, 2\) is out of range for 27 embeddings"):
        functional.embedding(index, torch.randn(27, 10))


def test_any_index_into_an_empty_table_is_out_of_range_and_none_is_fine() -> None:
    assert functional.embedding(INDEX[:0], TABLE[:0]).shape == (0, 3)
    with pytest.raises((IndexError, RuntimeError)):
        functional.embedding(INDEX, TABLE[:0])


# A few ulps of numbers of size 1, the size of the terms whose difference a gradient is.
TOLERANCES = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (4e-6, 1e-6),
    torch.bfloat16: (2**-7, 2**-8),
    torch.float16: (2**-10, 2**-11),
    torch.int64: (0, 0),
}


@st.composite
def calls(draw: st.DrawFn) -> SampleInput:
    n_rows = draw(st.sampled_from([1, 2, 7, 27, 65, 256, 1000]))
    n_columns = draw(st.sampled_from([0, 1, 3, 8, 10, 16, 17, 33, 129]))
    index_shape = draw(st.lists(st.sampled_from([0, 1, 2, 3, 7, 19]), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    index = torch.randint(n_rows, index_shape, generator=generator)
    if len(index_shape) > 1 and draw(st.booleans()):
        index = index.transpose(0, 1)
    if n_rows <= 128 and draw(st.booleans()):
        index = index.to(draw(st.sampled_from([torch.int8, torch.uint8, torch.int16])))
    weight = torch.randn(n_rows, n_columns, generator=generator)
    if draw(st.booleans()):
        weight = weight.t().contiguous().t()
    options = draw(
        st.fixed_dictionaries(
            {},
            optional={
                "padding_idx": st.integers(-n_rows, n_rows - 1),
                "scale_grad_by_freq": st.just(True),
                "max_norm": st.just(2.0),
                "norm_type": st.sampled_from([1.0, 2.0, 3.0]),
            },
        )
    )
    dtype = draw(st.sampled_from(FLOAT_DTYPES))
    return SampleInput("hypothesis", {"input": index, "weight": weight.to(dtype), **options}, ("weight",))


@given(sample=calls())
def test_any_call_is_close_to_the_reference_in_float64(sample: SampleInput, isa: str) -> None:
    actual = evaluate(functional.embedding, sample)
    exact = evaluate(reference.embedding, sample, torch.float64)
    for name, value in actual.items():
        rtol, atol = TOLERANCES[value.dtype]
        if torch.isclose(value.double(), exact[name].double(), rtol, atol, equal_nan=True).all():
            continue
        assert name == "weight.grad", f"{name}: {value} is not {exact[name]}"
        # Thousands of terms that cancel: as close as torch's own sum in this dtype.
        assert_close_to_reference(value, evaluate(reference.embedding, sample)[name], exact[name], name)


def test_a_sparse_weight_gives_torchs_result() -> None:
    weight, index = torch.eye(4).to_sparse(), torch.tensor([2, 0])
    actual = functional.embedding(index, weight)
    assert torch.equal(actual.to_dense(), torch.nn.functional.embedding(index, weight).to_dense())
