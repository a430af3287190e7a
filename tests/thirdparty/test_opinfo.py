"""torch's own OpInfo samples of the functions that charlm replaces: results, gradients and errors are torch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_leaves

import charlm
from tests.thirdparty.support import CountCharlmOps, Results, assert_same, fresh, outputs_and_gradients, raised

NAMES = ["embedding", "cross_entropy", "kl_div", "linear_cross_entropy"]
INFOS = [info for info in op_db if info.name.removeprefix("nn.functional.") in NAMES]
CASES = [
    pytest.param(info, dtype, id=f"{info.formatted_name}-{str(dtype).removeprefix('torch.')}")
    for info in INFOS
    for dtype in sorted(info.dtypes, key=str)
]


def function(info, namespace) -> Callable[..., object]:
    """The function of `namespace` that is called as the samples are; those of embedding begin with the weight."""
    name = info.name.removeprefix("nn.functional.")
    found = getattr(namespace, name)
    if name == "embedding":
        return lambda weight, index, **options: found(index, weight, **options)
    return found


def run(call: Callable[..., torch.Tensor], sample, dtype: torch.dtype, converted_to: torch.dtype | None) -> Results:
    sample = sample.transform(lambda value: fresh(value, converted_to))
    if (
        converted_to is not None
    ):  # linear_cross_entropy's options choose how torch computes, and may name a 16-bit dtype
        sample.kwargs.pop("options", None)
    inputs = [t for t in tree_leaves((sample.input, sample.args, sample.kwargs)) if isinstance(t, torch.Tensor)]
    out = call(sample.input, *sample.args, **sample.kwargs)
    # The inputs are compared too: max_norm changes the weight.
    return outputs_and_gradients(out, [t for t in inputs if t.requires_grad], dtype) + [t.detach() for t in inputs]


@pytest.mark.parametrize(("info", "dtype"), CASES)
def test_each_sample_gives_the_results_and_gradients_of_torch_by_charlms_kernels(info, dtype) -> None:
    samples = list(info.sample_inputs("cpu", dtype, requires_grad=True))
    assert samples
    for number, sample in enumerate(samples):

        def torchs(converted_to: torch.dtype | None, sample=sample) -> Results:
            return run(function(info, torch.nn.functional), sample, dtype, converted_to)

        expected = torchs(None)
        with CountCharlmOps() as ops:
            found = run(function(info, charlm.functional), sample, dtype, None)
        with charlm.patch_torch(), CountCharlmOps() as patched_ops:
            patched = torchs(None)
        where = f"sample {number}: {sample}"
        assert ops.counts, where
        assert patched_ops.counts == ops.counts, where
        for results in (found, patched):
            assert_same(results, expected, where, exact=partial(torchs, torch.float64))


ERRORS = [
    pytest.param(info, error, id=f"{info.formatted_name}-{number}")
    for info in INFOS
    if info.error_inputs_func is not None
    for number, error in enumerate(info.error_inputs("cpu"))
]


@pytest.mark.parametrize(("info", "error"), ERRORS)
def test_each_error_input_raises_the_type_of_torch(info, error) -> None:
    sample = error.sample_input

    def call(namespace):
        return raised(lambda: function(info, namespace)(sample.input, *sample.args, **sample.kwargs))

    expected = call(torch.nn.functional)
    assert issubclass(expected, error.error_type)
    assert call(charlm.functional) is expected
