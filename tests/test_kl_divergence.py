"""kl_divergence on every sample, dtype and instruction set, against torch and float64; identities; bad input."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from charlm import functional, reference
from charlm.testing import FLOAT_DTYPES, SampleInput, assert_matches_reference, sample_inputs_kl_divergence

SAMPLES = [
    pytest.param(sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_kl_divergence(dtype)
]
KINDS = ("logits", "log_probs", "probs")
PAIRS = [pytest.param(p, q, id=f"{p}-{q}") for p, q in itertools.product(KINDS, KINDS)]
FROM_PROBS = {"logits": torch.log, "log_probs": torch.log, "probs": torch.clone}
FROM_LOGITS = {"logits": torch.clone, "log_probs": lambda x: x.log_softmax(-1), "probs": lambda x: x.softmax(-1)}


def _with_gradients(
    p: Tensor, q: Tensor, op: Any = functional.kl_divergence, **kinds: str
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = p.detach().requires_grad_(), q.detach().clone().requires_grad_()
    result = op(*leaves, **kinds)
    return result.detach(), *torch.autograd.grad(result.sum(), leaves)


@pytest.mark.covering
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(sample: SampleInput, isa: str) -> None:
    assert_matches_reference(functional.kl_divergence, reference.kl_divergence, sample)


def test_the_gradient_of_peaked_rows_is_within_16_ulps_of_long_double(isa: str) -> None:
    """Where float64's own oracle is further off than that, the largest element being the measure."""
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.randn(33, 129, generator=generator, dtype=torch.float64) * 20 for _ in "pq")
    _, p_grad, _ = _with_gradients(p, q)
    x, y = (side.numpy().astype(np.longdouble) for side in (p, q))
    log_p, log_q = (z - z.max(-1, keepdims=True) for z in (x, y))
    log_p, log_q = (z - np.log(np.exp(z).sum(-1, keepdims=True)) for z in (log_p, log_q))
    kl = (np.exp(log_p) * (log_p - log_q)).sum(-1, keepdims=True)
    exact = np.exp(log_p) * (log_p - log_q - kl)
    assert np.abs(p_grad.numpy() - exact).max() <= 16 * np.spacing(float(np.abs(exact).max()))


def test_it_is_torchs_kl_div_of_the_same_distributions() -> None:
    p, q = torch.randn(33, 27), torch.randn(33, 27)
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="none").sum(-1)
    torch.testing.assert_close(functional.kl_divergence(p, q), expected)


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("n_classes", [1, 27, 4099])
def test_identical_distributions_diverge_by_exactly_zero(
    kind: str, dtype: torch.dtype, n_classes: int, isa: str
) -> None:
    logits = torch.randn(33, n_classes) * 5
    logits[:, 1::3] = -torch.inf
    x = FROM_LOGITS[kind](logits).to(dtype)
    result, p_gradient, q_gradient = _with_gradients(x, x, p_kind=kind, q_kind=kind)
    assert torch.equal(result, torch.zeros(33, dtype=dtype))
    if kind == "logits":
        assert not p_gradient.any()
        assert not q_gradient.any()
    assert p_gradient.isfinite().all()
    assert q_gradient.isfinite().all()


@given(st.integers(0, 10**6), st.sampled_from([1, 2, 7, 33]), st.sampled_from([0.0, 1e-6, 1e-3, 10.0]))
def test_it_is_never_negative(seed: int, n_classes: int, distance: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(16, n_classes, generator=generator)
    q = p + distance * torch.randn(16, n_classes, generator=generator)
    for p_kind, q_kind in itertools.product(KINDS, KINDS):
        result = functional.kl_divergence(FROM_LOGITS[p_kind](p), FROM_LOGITS[q_kind](q), p_kind=p_kind, q_kind=q_kind)
        assert (result >= 0).all()


@pytest.mark.parametrize(("p_offset", "q_offset"), [(1000.0, 1000.0), (-1000.0, 1000.0), (0.0, -1000.0)])
@pytest.mark.parametrize("n_classes", [27, 4099])
def test_a_common_offset_of_logits_changes_nothing(p_offset: float, q_offset: float, n_classes: int, isa: str) -> None:
    # Multiples of 1/8: the addition of the offset is exact.
    p, q = (torch.randint(-32, 32, (33, n_classes)) / 8 for _ in range(2))
    expected = _with_gradients(p, q)
    for ours, at_zero in zip(_with_gradients(p + p_offset, q + q_offset), expected, strict=True):
        assert torch.equal(ours, at_zero)


@pytest.mark.covering(2)
@pytest.mark.parametrize(("p_kind", "q_kind"), PAIRS)
@pytest.mark.parametrize("n_classes", [3, 4101])
def test_a_class_that_q_rules_out_gives_infinity_and_finite_gradients(
    p_kind: str, q_kind: str, n_classes: int, isa: str
) -> None:
    p, q = (torch.rand(4, n_classes).softmax(-1) for _ in range(2))
    p[0, 1], q[0, 1] = 0, 0  # neither has it: nothing
    p[1, 1] = 0  # p has it not: 0 log 0 = 0
    q[2, 1] = 0  # q has it not
    q[3, :2] = 0
    arguments = FROM_PROBS[p_kind](p), FROM_PROBS[q_kind](q)
    kinds = {"p_kind": p_kind, "q_kind": q_kind}
    ours, theirs = _with_gradients(*arguments, **kinds), _with_gradients(*arguments, reference.kl_divergence, **kinds)
    assert ours[0].isinf().tolist() == [False, False, True, True]
    torch.testing.assert_close(ours, theirs)
    assert all(gradient.isfinite().all() for gradient in ours[1:])
    assert ours[1][0, 1] == ours[1][1, 1] == 0
    for row in (2, 3):
        expected = (
            torch.zeros(n_classes) if p_kind == "logits" else ours[1][row].clone().index_fill_(0, torch.tensor([1]), 0)
        )
        assert torch.equal(ours[1][row], expected)
    if q_kind == "probs":
        assert ours[2][2, 1] == 0


def test_a_probability_too_small_for_its_dtype_still_meets_the_support_of_q(isa: str) -> None:
    p = torch.tensor([[0.0, -200.0]])  # exp(-200) is 0 in float32
    for op in (functional.kl_divergence, reference.kl_divergence):
        result, *gradients = _with_gradients(p, torch.tensor([[0.0, -torch.inf]]), op)
        assert result.item() == torch.inf
        assert all(gradient.isfinite().all() for gradient in gradients)
        assert op(p, torch.tensor([[0.0, -1000.0]])).item() == 0


@pytest.mark.covering(2)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("side", ["p", "q"])
@pytest.mark.parametrize("place", [0, 26])
def test_nan_gives_nan_in_its_row_alone(kind: str, side: str, place: int, isa: str) -> None:
    pair = {name: FROM_LOGITS[kind](torch.randn(3, 27)) for name in "pq"}
    pair[side][1, place] = torch.nan
    result = functional.kl_divergence(**pair, p_kind=kind, q_kind=kind)
    assert result.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
@pytest.mark.parametrize("side", ["p", "q"])
def test_logits_without_a_softmax_give_nan(bad: float, side: str, isa: str) -> None:
    pair = {name: torch.randn(3, 27) for name in "pq"}
    pair[side][1] = bad
    assert functional.kl_divergence(**pair).isnan().tolist() == [False, True, False]


def test_subnormal_probabilities_have_their_logarithm(isa: str) -> None:
    p = torch.tensor([[0.5, 0.5]])
    for smallest in (1e-40, 1.4e-45):
        q = torch.tensor([[1.0, smallest]])
        expected = reference.kl_divergence(p.double(), q.double(), p_kind="probs", q_kind="probs")
        result = functional.kl_divergence(p, q, p_kind="probs", q_kind="probs")
        torch.testing.assert_close(result.double(), expected, rtol=1e-6, atol=0)


# Around the numbers of classes from which on the GPU gives a row more lanes, a block, and larger blocks.
BORDERS = [n + off for n in (8, 16, 32, 64, 128, 256, 512, 1024, 4096) for off in (-1, 0, 1, 8)]
BORDER_CASES = [
    *(("logits", "logits", dtype, n) for dtype in FLOAT_DTYPES for n in BORDERS),
    *((p, q, dtype, n) for p, q in itertools.product(KINDS, KINDS) for dtype in FLOAT_DTYPES for n in (40, 135, 520)),
]


@pytest.mark.parametrize(("p_kind", "q_kind", "dtype", "n_classes"), BORDER_CASES, ids=str)
def test_rows_of_any_length_and_alignment(
    n_classes: int, p_kind: str, q_kind: str, dtype: torch.dtype, isa: str
) -> None:
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype in (torch.float32, torch.float64) else {"rtol": 2e-2, "atol": 2e-3}
    )
    kinds = {"p_kind": p_kind, "q_kind": q_kind}
    p, q = (FROM_LOGITS[kind](torch.randn(3, n_classes) * 2).to(dtype) for kind in (p_kind, q_kind))
    p[:, 3::7] = 0 if p_kind == "probs" else -torch.inf
    expected = _with_gradients(p.double(), q.double(), reference.kl_divergence, **kinds)
    # (stride - n_classes, offset) of p and of q: both aligned, both equally far from it, and neither.
    for layouts in (((0, 0), (0, 0)), ((0, 1), (0, 1)), ((16, 16), (0, 0)), ((1, 0), (1, 0)), ((0, 0), (0, 1))):
        pair = []
        for x, (gap, offset) in zip((p, q), layouts, strict=True):
            stride = n_classes + gap
            memory = torch.empty(3 * stride + offset, dtype=dtype)
            pair.append(memory.as_strided((3, n_classes), (stride, 1), offset).copy_(x))
        for ours, theirs in zip(_with_gradients(*pair, **kinds), expected, strict=True):
            torch.testing.assert_close(ours, theirs.to(dtype), **tolerance)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("distance", [0, 1000, -1030, 30000])
@pytest.mark.parametrize("n_classes", [48, 4100])
def test_the_most_probable_class_of_p_may_be_far_from_that_of_q(
    distance: float, n_classes: int, dtype: torch.dtype, isa: str
) -> None:
    is_half = dtype in (torch.float16, torch.bfloat16)
    tolerance = {"rtol": 2e-2, "atol": 2e-3} if is_half else {"rtol": 1e-5, "atol": 1e-5 + abs(distance) * 2**-24}
    p, q = (torch.randn(3, n_classes).to(dtype) for _ in "pq")
    p[:, 5], q[:, 5] = 3, distance
    p[0, 5], p[0, 6] = 2, 4
    expected = _with_gradients(p.double(), q.double(), reference.kl_divergence)
    for ours, theirs in zip(_with_gradients(p, q), expected, strict=True):
        torch.testing.assert_close(ours, theirs.to(dtype), **tolerance)


@pytest.mark.parametrize(("p_kind", "q_kind"), PAIRS)
def test_derivatives_of_first_and_second_order(p_kind: str, q_kind: str) -> None:
    p, q = (FROM_LOGITS[k](torch.randn(3, 5, dtype=torch.float64)).requires_grad_() for k in (p_kind, q_kind))

    def op(p: Tensor, q: Tensor) -> Tensor:
        return functional.kl_divergence(p, q, p_kind=p_kind, q_kind=q_kind)

    assert gradcheck(op, (p, q))
    assert gradgradcheck(op, (p, q))
    assert gradcheck(op, (p, q[0].detach().requires_grad_()))


@pytest.mark.parametrize(("p_kind", "q_kind"), PAIRS)
@pytest.mark.parametrize("needed", [0, 1])
def test_one_gradient_alone_is_the_one_among_both(p_kind: str, q_kind: str, needed: int) -> None:
    pair = [FROM_LOGITS[kind](torch.randn(33, 65)).requires_grad_() for kind in (p_kind, q_kind)]
    kinds = {"p_kind": p_kind, "q_kind": q_kind}
    both = torch.autograd.grad(functional.kl_divergence(*pair, **kinds).sum(), pair)
    alone = [x if i == needed else x.detach() for i, x in enumerate(pair)]
    (gradient,) = torch.autograd.grad(functional.kl_divergence(*alone, **kinds).sum(), alone[needed])
    assert torch.equal(gradient, both[needed])


def test_dtypes_are_promoted_as_torchs_are() -> None:
    p, q = torch.randn(33, 27), torch.randn(33, 27)
    for first, second in (
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16),
        (torch.float64, torch.float16),
    ):
        result = functional.kl_divergence(p.to(first), q.to(second))
        assert result.dtype == torch.promote_types(first, second)
        torch.testing.assert_close(result, reference.kl_divergence(p.to(first), q.to(second)))


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
def test_arguments_that_do_not_fit_are_refused(module: Any) -> None:
    x = torch.zeros(3, 5)
    with pytest.raises(ValueError, match='q_kind must be "logits", "log_probs" or "probs", got \'odds\''):
        module.kl_divergence(x, x, q_kind="odds")
    with pytest.raises(RuntimeError, match=r"the same number of classes V, got \[3, 5\] and \[3, 1\]"):
        module.kl_divergence(x, x[:, :1])
    with pytest.raises(RuntimeError, match=r"p and q of shapes \[3, 5\] and \[2, 5\] cannot be broadcast"):
        module.kl_divergence(x, x[:2])
    with pytest.raises(RuntimeError, match=r"\(..., V\)"):
        module.kl_divergence(torch.tensor(1.0), torch.tensor(1.0))
    with pytest.raises(NotImplementedError, match='"kl_divergence" not implemented for'):
        module.kl_divergence(x.long(), x.long())
    with pytest.raises(NotImplementedError, match='"kl_divergence" not implemented for'):
        module.kl_divergence(x, x.long())


def test_tensors_on_two_devices_are_refused() -> None:
    with pytest.raises(RuntimeError, match="but p is on cpu and q is on meta"):
        functional.kl_divergence(torch.zeros(3, 5), torch.zeros(3, 5, device="meta"))


def test_backward_refuses_a_state_of_another_call() -> None:
    p, other = torch.randn(3, 5), torch.randn(4, 5)
    result, _ = torch.ops.charlm.kl_div(p, p, 0, 0)
    with pytest.raises(RuntimeError, match="state must be the one that kl_divergence returned"):
        torch.ops.charlm._kl_div_backward(
            result, p, p, torch.ops.charlm.kl_div(other, other, 0, 0)[1], 0, 0, [True, True]
        )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_autocast_computes_in_float32_like_torchs_kl_div(dtype: torch.dtype) -> None:
    p, q = (torch.randn(3, 5).to(dtype).requires_grad_() for _ in range(2))
    for arguments in ((p, q), (p, q[0])):
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = functional.kl_divergence(*arguments), reference.kl_divergence(*arguments)
        assert ours.dtype == theirs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(ours, theirs)
    ours.sum().backward()
    assert {p.grad.dtype, q.grad.dtype} == {dtype}


@pytest.mark.parametrize("q", [[0.5, torch.nan], [0.5, -0.5]])
@pytest.mark.parametrize("kind", ["log_probs", "probs"])
def test_what_q_cannot_hold_gives_nan_even_where_p_is_0(q: list[float], kind: str) -> None:
    pair = torch.tensor([[1.0, 0.0]]), torch.tensor([q])
    if kind == "log_probs":
        pair = pair[0].log(), pair[1].log()

    def call(p: Tensor, q: Tensor) -> Tensor:
        return functional.kl_divergence(p, q, p_kind=kind, q_kind=kind)

    results = torch.vmap(call)(*pair), torch.compile(call, backend="aot_eager")(*pair)
    assert all(result.isnan().all() for result in results)
    if kind == "log_probs" or q[1] != -0.5:
        assert call(*pair).isnan().all()
        assert reference.kl_divergence(*pair, p_kind=kind, q_kind=kind).isnan().all()


@pytest.mark.parametrize("module", [functional, reference])
@pytest.mark.parametrize("name", ["p", "q"])
def test_a_negative_probability_is_refused_with_its_place(name: str, module: Any, isa: str) -> None:
    pair = {"p": torch.tensor([0.25, 0.75, 0.0, 0.0]).repeat(3, 1), "q": torch.full((3, 4), 0.25)}
    pair[name][1, 2] = -0.5
    with pytest.raises(ValueError, match=f"{name} must hold probabilities, but is -0.5 at position \\(1, 2\\)"):
        module.kl_divergence(**pair, p_kind="probs", q_kind="probs")
    pair[name][1, 2] = torch.nan  # a NaN is no negative number
    result = module.kl_divergence(**pair, p_kind="probs", q_kind="probs")
    assert result.isnan().tolist() == [False, True, False]
