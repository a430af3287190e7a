"""torch's own ModuleInfo and criterion tests of the modules that charlm replaces."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db
from torch.testing._internal.common_nn import CriterionTest, NNTestCase, criterion_tests
from torch.utils._pytree import tree_leaves, tree_map

import charlm
from tests.thirdparty.support import CountCharlmOps, Results, assert_same, fresh, outputs_and_gradients, raised

NAMES = ["Embedding", "CrossEntropyLoss", "KLDivLoss", "LinearCrossEntropyLoss"]
INFOS = [info for info in module_db if info.module_cls.__name__ in NAMES]
CASES = [
    pytest.param(info, dtype, training, id=f"{info.name}-{str(dtype).removeprefix('torch.')}-{mode}")
    for info in INFOS
    for dtype in info.dtypes
    for training, mode in [(True, "train"), (False, "eval")]
]
CRITERIA = [test for test in criterion_tests if test["fullname"].split("_")[0] in NAMES]


def inputs_of(function, info, dtype, training):
    torch.manual_seed(0)
    return function(info, device="cpu", dtype=dtype, requires_grad=True, training=training)


def run(module: torch.nn.Module, forward, dtype: torch.dtype, converted_to: torch.dtype | None = None) -> Results:
    args, kwargs = tree_map(lambda value: fresh(value, converted_to), (forward.args, forward.kwargs))
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)] + list(module.parameters())
    return outputs_and_gradients(module(*args, **kwargs), [t for t in inputs if t.requires_grad], dtype)


@pytest.mark.parametrize(("info", "dtype", "training"), CASES)
def test_each_module_input_gives_the_results_and_gradients_of_torch_by_charlms_kernels(info, dtype, training) -> None:
    module_inputs = inputs_of(info.module_inputs_func, info, dtype, training)
    assert module_inputs
    for number, case in enumerate(module_inputs):
        build, forward = case.constructor_input, case.forward_input
        where = f"module input {number} {case.desc!r}: {build.kwargs}"

        def new(cls: type[torch.nn.Module], build=build) -> torch.nn.Module:
            return cls(*build.args, **build.kwargs).to(dtype).train(training)

        torchs = new(info.module_cls)
        expected = run(torchs, forward, dtype)

        def exact(torchs=torchs, forward=forward) -> Results:
            return run(deepcopy(torchs).double(), forward, dtype, torch.float64)

        for module in (new(getattr(charlm.nn, info.module_cls.__name__)), charlm.patch_model(new(info.module_cls))):
            module.load_state_dict(torchs.state_dict())
            with CountCharlmOps() as ops:
                found = run(module, forward, dtype)
            assert ops.counts, where
            assert_same(found, expected, where, exact)
            if case.reference_fn is not None and dtype.itemsize >= 4:
                args, kwargs = tree_map(fresh, (forward.args, forward.kwargs))
                with torch.no_grad():
                    assert_same([module(*args, **kwargs)], [case.reference_fn(module, *args, **kwargs)], where, exact)


ERRORS = [
    pytest.param(info, case, id=f"{info.name}-{number}")
    for info in INFOS
    if info.module_error_inputs_func is not None
    for number, case in enumerate(inputs_of(info.module_error_inputs_func, info, torch.float32, True))
]


@pytest.mark.parametrize(("info", "case"), ERRORS)
def test_each_module_error_input_raises_the_type_of_torch(info, case) -> None:
    build, forward = case.module_error_input.constructor_input, case.module_error_input.forward_input

    def error(cls):
        if case.error_on is ModuleErrorEnum.CONSTRUCTION_ERROR:
            return raised(lambda: cls(*build.args, **build.kwargs))
        module = cls(*build.args, **build.kwargs)
        return raised(lambda: module(*forward.args, **forward.kwargs))

    expected = error(info.module_cls)
    assert issubclass(expected, case.error_type)
    assert error(getattr(charlm.nn, info.module_cls.__name__)) is expected


class Criteria(NNTestCase):
    def _forward_criterion(self, criterion, input, target, extra_args):
        return criterion(input, target, *extra_args)


@pytest.mark.parametrize("test", CRITERIA, ids=lambda test: test["fullname"])
def test_the_criterion_tests_of_torch_pass_under_patch_torch(test) -> None:
    with charlm.patch_torch(), CountCharlmOps() as ops:
        CriterionTest(**test)(Criteria())
    assert ops.counts


@pytest.mark.parametrize("test", CRITERIA, ids=lambda test: test["fullname"])
def test_the_criterion_tests_of_torch_pass_with_a_patched_model(test) -> None:
    with CountCharlmOps() as ops:
        CriterionTest(**{**test, "constructor": lambda: charlm.patch_model(test["constructor"]())})(Criteria())
    assert ops.counts
