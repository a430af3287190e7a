"""Scalar options: a tensor given for one never loses its gradient in silence, and numbers keep their value."""

import math
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch

import charlm.functional as F
from charlm import _ext, reference

X = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0], [1.0, 0.0, 3.0, 0.0, 0.5]])
TARGET = torch.tensor([2, 0])
LINEAR_WEIGHT = torch.linspace(-1, 1, 20).reshape(4, 5)
TOKENS = torch.tensor([[0, 1], [3, 2]])
TABLE = torch.linspace(0, 1, 8).reshape(4, 2)

CALLS = {
    "cross_entropy": lambda **options: F.cross_entropy(X, TARGET, **options),
    "cross_entropy with outputs": lambda **options: F.cross_entropy(X, TARGET, return_lse=True, **options).loss,
    "linear_cross_entropy": lambda **options: F.linear_cross_entropy(X, LINEAR_WEIGHT, TARGET, **options),
    "linear_cross_entropy with outputs": lambda **options: (
        F.linear_cross_entropy(X, LINEAR_WEIGHT, TARGET, return_lse=True, **options).loss
    ),
    "embedding": lambda **options: F.embedding(TOKENS, TABLE.clone(), **options),
    "embedding_linear": lambda **options: F.embedding_linear(TOKENS, TABLE, torch.eye(4), **options),
    "surprisal": lambda **options: F.surprisal(X, TARGET, **options),
}
LOSS_OPTIONS = {"label_smoothing": 0.25, "lse_square_scale": 0.5, "softcap": 2.0, "logit_scale": 0.5, "ignore_index": 0}
OPTIONS = {
    **{name: LOSS_OPTIONS for name in CALLS if "cross_entropy" in name},
    "embedding": {"padding_idx": 1, "max_norm": 0.5, "norm_type": 1.0},
    "embedding_linear": {"padding_idx": 1},
    "surprisal": {"ignore_index": 2},
}
CASES = [(call, option) for call, options in OPTIONS.items() for option in options]


REFERENCE = """
import pytest, torch, charlm.functional as F
x, t = torch.randn(3, 5), torch.tensor([0, 1, 2])
assert torch.equal(F.cross_entropy(x, t, logit_scale=torch.tensor(2.0)), F.cross_entropy(x, t, logit_scale=2.0))
for s in (torch.nn.Parameter(torch.tensor(2.0)), torch.tensor([2.0]), "2", None):
    with pytest.raises(TypeError, match="argument 'logit_scale' must be float"):
        F.cross_entropy(x, t, logit_scale=s)
with pytest.raises(TypeError, match="argument 'input' must be Tensor, not list"):
    F.cross_entropy([[0.0]], t)
with pytest.raises(ValueError, match="64 bits"):
    F.surprisal(x, t, ignore_index=2**63)
with pytest.raises(ValueError, match="logit_scale must be finite"):
    F.cross_entropy(x, t, logit_scale=1e39)
"""


def value_of(call, option):
    return OPTIONS[call][option]


@pytest.mark.parametrize(("call", "option"), CASES)
def test_a_plain_0d_tensor_is_its_value(call, option):
    value = value_of(call, option)
    expected = CALLS[call](**{option: value})
    assert torch.equal(CALLS[call](**{option: torch.tensor(value)}), expected)
    scalar = np.int64(value) if isinstance(value, int) else np.float32(value)
    assert torch.equal(CALLS[call](**{option: scalar}), expected)
    compiled = torch.compile(lambda s: CALLS[call](**{option: s}), backend="eager")
    assert torch.equal(compiled(torch.tensor(value)), expected)


@pytest.mark.parametrize(("call", "option"), [case for case in CASES if isinstance(value_of(*case), float)])
def test_a_tensor_that_could_carry_a_gradient_is_refused(call, option):
    run = CALLS[call]
    name = f"{call.split()[0]}\\(\\): argument '{option}'"
    value = torch.tensor(float(value_of(call, option)))
    with pytest.raises(TypeError, match=f"{name} must be float, not a Tensor that requires grad.*item"):
        run(**{option: torch.nn.Parameter(value)})
    with pytest.raises(TypeError, match=f"{name} .*requires grad"):
        torch.compile(lambda s: run(**{option: s}), backend="eager")(torch.nn.Parameter(value))
    with pytest.raises(TypeError, match=name):
        torch.func.grad(lambda s: run(**{option: s}).sum())(value)
    with pytest.raises(TypeError, match=name):
        torch.func.jvp(lambda s: run(**{option: s}), (value,), (value,))
    with pytest.raises(TypeError, match=name):
        torch.func.vmap(lambda s: run(**{option: s}))(value[None])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(value, value)
        with pytest.raises(TypeError, match=f"{name} .*forward-mode"):
            run(**{option: dual})


@pytest.mark.covering
@pytest.mark.parametrize(("call", "option"), CASES)
@pytest.mark.parametrize("shape", [(1,), (1, 1), (2,), (0,)])
def test_a_tensor_of_any_other_shape_is_refused(call, option, shape):
    value = torch.full(shape, value_of(call, option))
    with pytest.raises(TypeError, match=f"argument '{option}' must be (float|int), not Tensor of shape"):
        CALLS[call](**{option: value})


@pytest.mark.covering
@pytest.mark.parametrize(("call", "option"), CASES)
@pytest.mark.parametrize("value", ["a", [1.0], object(), 1j])
def test_what_is_no_number_is_refused_by_name(call, option, value):
    with pytest.raises(TypeError, match=f"argument '{option}' must be (float|int), not {type(value).__name__}"):
        CALLS[call](**{option: value})


@pytest.mark.covering
@pytest.mark.parametrize(("call", "option"), [case for case in CASES if isinstance(value_of(*case), int)])
@pytest.mark.parametrize(
    ("value", "error", "text"),
    [
        (1.0, TypeError, "must be int, not float"),
        (True, TypeError, "must be int, not bool"),
        (torch.tensor(1.0), TypeError, "must be int, not Tensor of dtype torch.float32"),
        (2**63, ValueError, "must fit into 64 bits, got 9223372036854775808"),
        (-(2**63) - 1, ValueError, "must fit into 64 bits"),
    ],
)
def test_integer_options_take_integers_of_64_bits(call, option, value, error, text):
    with pytest.raises(error, match=text):
        CALLS[call](**{option: value})


@pytest.mark.parametrize("option", ["label_smoothing", "logit_scale", "lse_square_scale"])
def test_none_is_no_number(option):
    with pytest.raises(TypeError, match=f"argument '{option}' must be float, not NoneType"):
        F.cross_entropy(X, TARGET, **{option: None})


@pytest.mark.parametrize("option", ["scale_grad_by_freq", "sparse"])
@pytest.mark.parametrize("value", [1, None, torch.tensor(True), "yes"])
def test_switches_take_bool_only_like_torch(option, value):
    for embedding in (torch.nn.functional.embedding, F.embedding):
        with pytest.raises(TypeError, match="must be bool"):
            embedding(TOKENS, TABLE, **{option: value})


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda: F.cross_entropy([[0.0, 1.0]], TARGET), "input"),
        (lambda: F.cross_entropy(X, [1, 2]), "target"),
        (lambda: F.cross_entropy(X, TARGET, weight=[1.0]), "weight"),
        (lambda: F.cross_entropy(X, TARGET, token_weight=1.0), "token_weight"),
        (lambda: F.cross_entropy(None, TARGET), "input"),
        (lambda: F.linear_cross_entropy(X, [1.0], TARGET), "linear_weight"),
        (lambda: F.linear_cross_entropy(X, LINEAR_WEIGHT, TARGET, linear_bias=1), "linear_bias"),
        (lambda: F.embedding(2, TABLE), "input"),
        (lambda: F.embedding(TOKENS, [2]), "weight"),
        (lambda: F.embedding(TOKENS, [2], max_norm=1.0), "weight"),
        (lambda: F.embedding_linear(TOKENS, TABLE, np.eye(4)), "linear_weight"),
        (lambda: F.embedding_linear(TOKENS, TABLE, torch.eye(4), 0), "linear_bias"),
        (lambda: F.entropy([0.5, 0.5]), "logits"),
        (lambda: F.kl_divergence(X, [1, 2]), "q"),
        (lambda: F.kl_divergence(None, X), "p"),
        (lambda: F.surprisal(X, 2), "target"),
    ],
)
def test_what_is_no_tensor_is_refused_by_name(call, name):
    with pytest.raises(TypeError, match=f"argument '{name}' must be Tensor, not "):
        call()


@pytest.mark.parametrize("op", [F.cross_entropy, reference.cross_entropy])
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"label_smoothing": math.nan}, "label_smoothing must be between 0.0 and 1.0. Got: nan"),
        ({"token_weight": torch.ones(len(TARGET), dtype=torch.int32)}, "token_weight must be of a floating dtype"),
    ],
)
def test_what_torch_does_not_check_is_refused_by_both(op, options, text):
    with pytest.raises(RuntimeError, match=re.escape(text)):
        op(X, TARGET, **options)


@pytest.mark.parametrize("op", [F.embedding_linear, reference.embedding_linear])
def test_an_activation_that_has_no_hash_is_refused_like_any_other(op):
    with pytest.raises(ValueError, match="activation must be one of"):
        op(torch.zeros(2, 1, dtype=torch.int64), torch.ones(3, 4), torch.ones(5, 4), activation=[])


def test_the_reference_backend_accepts_and_refuses_the_same():
    subprocess.run([sys.executable, "-c", REFERENCE], env=os.environ | {"CHARLM_BACKEND": "reference"}, check=True)


@pytest.mark.covering
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("softcap", [1e-50, 1e-39, 1e-30, 3.0, 1e30, 1e38, 1e39, 1e300, math.inf])
def test_any_positive_softcap_caps_at_its_value(dtype, softcap):
    wide = X.double().requires_grad_()
    z = wide if math.isinf(softcap) else softcap * torch.tanh(wide / softcap)
    expected = torch.nn.functional.cross_entropy(z, TARGET)
    expected.backward()
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if dtype is torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-6}
    x = X.to(dtype, copy=True).requires_grad_()
    loss = F.cross_entropy(x, TARGET, softcap=softcap)
    loss.backward()
    torch.testing.assert_close(loss.double(), expected, **tolerance)
    torch.testing.assert_close(x.grad.double(), wide.grad, **tolerance)
    by_formula = torch.func.grad(lambda x: F.cross_entropy(x, TARGET, softcap=softcap))(x.detach())
    torch.testing.assert_close(by_formula.double(), wide.grad, **tolerance)
    of_reference = x.detach().requires_grad_()
    reference.cross_entropy(of_reference, TARGET, softcap=softcap).backward()
    torch.testing.assert_close(of_reference.grad.double(), wide.grad, **tolerance)


@pytest.mark.parametrize("option", ["logit_scale", "lse_square_scale"])
def test_a_factor_beyond_float32_is_refused_not_turned_into_infinity(option):
    for function in (F.cross_entropy, torch.func.vmap(lambda x, t, **o: F.cross_entropy(x[None], t[None], **o))):
        with pytest.raises(ValueError, match=f"{option} must be finite in torch.float32, .* got 1e\\+39"):
            function(X, TARGET, **{option: 1e39})
    assert F.cross_entropy(X.double(), TARGET, **{option: 1e39}).isfinite()


@pytest.mark.skipif(_ext._C is None, reason="no compiled module")
def test_options_are_read_in_the_compiled_module():
    calls = []
    original = F.cross_entropy.__globals__["_checks"].number
    F.cross_entropy.__globals__["_checks"].number = lambda *a: calls.append(a) or original(*a)
    try:
        F.cross_entropy(X, TARGET, label_smoothing=0.1, logit_scale=2.0)
        assert calls == []  # plain floats never reach Python
        F.cross_entropy(X, TARGET, logit_scale=2)
        assert len(calls) == 1
    finally:
        F.cross_entropy.__globals__["_checks"].number = original
