"""Building for CUDA without a GPU: with which toolkit, for which GPUs, and what is registered then.

Finding and choosing is tested on a toolkit of a few lines of shell. What is registered for CUDA, and what a call with
fake CUDA tensors gives, is tested where charlm was built with CUDA (`make cuda-check`).
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from setup_module import build
from torch._subclasses.fake_tensor import FakeTensorMode

import charlm
from charlm import functional
from charlm.testing import (
    FLOAT_DTYPES,
    sample_inputs_cross_entropy,
    sample_inputs_embedding,
    sample_inputs_embedding_linear,
    sample_inputs_linear_cross_entropy,
)

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))

import cuda_toolkit  # noqa: E402

needs_cuda_build = pytest.mark.skipif(
    not charlm.build_info()["cuda_architectures"], reason="charlm is built without CUDA here"
)


def executable(path, script):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def toolkit(tmp_path):
    """A folder that looks like a toolkit, whose nvcc answers the questions of a build as that of CUDA 12.6 does."""
    folder = tmp_path / "cuda-12.6"
    header = folder / "include" / "cuda_runtime.h"
    header.parent.mkdir(parents=True)
    header.touch()
    executable(
        folder / "bin" / "nvcc",
        f"""case "$1" in
--version) echo 'Cuda compilation tools, release 12.6, V12.6.85' ;;
--list-gpu-arch) printf 'compute_50\\ncompute_80\\ncompute_86\\ncompute_89\\ncompute_90\\n' ;;
--dryrun) printf '#$ _HERE_={folder}/bin\\n#$ TOP={folder}/bin/..\\n' >&2 ;;
esac""",
    )
    return folder


def fake_torch(cuda):
    """A torch with nothing but its versions: it has no GPU."""
    return SimpleNamespace(__version__=f"2.14.1+{cuda}", version=SimpleNamespace(cuda=cuda))


# --- the toolkit --------------------------------------------------------------------------------------------


def test_the_toolkit_is_the_folder_that_the_environment_names(toolkit):
    assert cuda_toolkit.find_toolkit({"CUDA_HOME": str(toolkit), "PATH": ""}) == toolkit
    assert cuda_toolkit.find_toolkit({"CUDA_PATH": str(toolkit), "PATH": ""}) == toolkit


def test_a_named_folder_that_holds_no_toolkit_is_not_replaced_by_another(toolkit, tmp_path):
    assert cuda_toolkit.find_toolkit({"CUDA_HOME": str(tmp_path), "PATH": str(toolkit / "bin")}) is None


def test_the_toolkit_is_that_of_the_nvcc_on_path(toolkit):
    assert cuda_toolkit.find_toolkit({"PATH": str(toolkit / "bin")}) == toolkit


def test_an_nvcc_that_calls_another_leads_to_the_toolkit_of_that_one(toolkit, tmp_path):
    script = executable(tmp_path / "local" / "bin" / "nvcc", f'exec {toolkit}/bin/nvcc "$@"')
    assert cuda_toolkit.find_toolkit({"PATH": str(script.parent)}) == toolkit
    assert cuda_toolkit.find_toolkit({"CUDA_HOME": str(script.parent.parent)}) == toolkit


def test_without_an_nvcc_the_usual_folder_is_the_toolkit(toolkit, tmp_path, monkeypatch):
    monkeypatch.setattr(cuda_toolkit, "USUAL_HOME", toolkit)
    assert cuda_toolkit.find_toolkit({"PATH": str(tmp_path)}) == toolkit
    monkeypatch.setattr(cuda_toolkit, "USUAL_HOME", tmp_path)
    assert cuda_toolkit.find_toolkit({"PATH": str(tmp_path)}) is None


def test_the_release_is_read_from_nvcc(toolkit):
    assert cuda_toolkit.nvcc_release(toolkit) == "12.6"
    assert cuda_toolkit.nvcc_release(None) is None


# --- what is built ------------------------------------------------------------------------------------------


def test_an_nvcc_that_knows_all_builds_all_six_and_the_newest_ones_ptx():
    known = {"7.5", "8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "10.3", "12.0", "12.1"}
    assert cuda_toolkit.default_architectures(known) == ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]


def test_an_older_nvcc_builds_those_that_it_knows_and_the_newest_ones_ptx(toolkit):
    known = cuda_toolkit.known_architectures(toolkit)
    assert known == {"5.0", "8.0", "8.6", "8.9", "9.0"}
    assert cuda_toolkit.default_architectures(known) == ["8.0", "8.6", "8.9", "9.0+PTX"]


def test_cuda_is_built_wherever_torch_and_a_toolkit_have_it(toolkit):
    cuda = build.choose_cuda({"CUDA_HOME": str(toolkit)}, fake_torch("12.8"))
    assert cuda == (toolkit, "12.6", ["8.0", "8.6", "8.9", "9.0+PTX"], None)


@pytest.mark.parametrize("text", ["8.6;9.0+PTX", "8.6 9.0+PTX"])
def test_the_architectures_of_the_environment_win(toolkit, text):
    env = {"CUDA_HOME": str(toolkit), "TORCH_CUDA_ARCH_LIST": text}
    assert build.choose_cuda(env, fake_torch("12.6")).architectures == ["8.6", "9.0+PTX"]


MISSING = [
    (None, "13.0", r"torch 2\.14\.1 is a CPU build", r"Install a CUDA build of torch"),
    ("13.0", None, r"there is no CUDA toolkit in /opt/cuda", r"Install a CUDA 13 toolkit and set CUDA_HOME"),
    (
        "13.0",
        "12.6",
        r"nvcc is of CUDA 12\.6, but torch 2\.14\.1 was built with CUDA 13\.0",
        r"Point CUDA_HOME at a CUDA 13 toolkit, or install a torch built with CUDA 12",
    ),
]


@pytest.mark.parametrize(("torch_cuda", "nvcc", "problem", "cure"), MISSING)
def test_cuda_that_cannot_be_built_is_left_out_with_the_reason(torch_cuda, nvcc, problem, cure):
    assert re.match(problem, build.why_no_cuda({"CUDA_HOME": "/opt/cuda"}, "2.14.1", torch_cuda, nvcc))


@pytest.mark.parametrize(("torch_cuda", "nvcc", "problem", "cure"), MISSING)
def test_forced_cuda_that_cannot_be_built_is_an_error_with_its_cure(torch_cuda, nvcc, problem, cure):
    env = {"CUDA_HOME": "/opt/cuda", "FORCE_CUDA": "1"}
    with pytest.raises(build.BuildError, match=rf"FORCE_CUDA=1, but {problem}.*\n.*{cure}.*unset FORCE_CUDA"):
        build.why_no_cuda(env, "2.14.1", torch_cuda, nvcc)


def test_another_minor_release_of_the_toolkit_is_taken():
    assert build.why_no_cuda({"FORCE_CUDA": "1"}, "2.14.1", "13.0", "13.2") is None


def test_cuda_is_left_out_where_it_is_not_wanted(toolkit):
    env = {"CUDA_HOME": str(toolkit), "FORCE_CUDA": "0"}
    assert build.choose_cuda(env, fake_torch("12.6")) == (None, None, [], "FORCE_CUDA=0")


def test_force_cuda_is_0_or_1():
    with pytest.raises(build.BuildError, match=r"FORCE_CUDA='yes' is neither 0 nor 1"):
        build.why_no_cuda({"FORCE_CUDA": "yes"}, "2.14.1", "13.0", "13.0")


def test_a_build_for_the_cpu_compiles_nothing_for_cuda():
    built = build.extension({"baseline": []}, build.Cuda(None, None, [], "FORCE_CUDA=0"))
    assert [source for source in built.sources if "cuda" in source] == []


@needs_cuda_build
def test_a_build_for_cuda_compiles_the_runtime_and_the_kernels(toolkit, monkeypatch):
    monkeypatch.setenv("CUDA_HOME", "")
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    built = build.extension({"baseline": []}, build.Cuda(toolkit, "12.6", ["9.0"], None))
    assert {"csrc/cuda/runtime.cpp", "csrc/cuda/embedding.cu", "csrc/ops/embedding.cpp"} <= set(built.sources)


def test_no_flag_of_nvcc_makes_torch_drop_its_architectures():
    assert not any("arch" in flag or flag.startswith("-std") for flag in build.NVCC_FLAGS)


def test_what_takes_longest_is_compiled_first():
    sources = ["csrc/core/a.cpp", "csrc/cuda/b.cu", "csrc/module.cpp", "csrc/z.cpp"]
    assert build.longest_first(sources) == [
        "csrc/cuda/b.cu",
        "csrc/module.cpp",
        "csrc/core/a.cpp",
        "csrc/z.cpp",
    ]


# --- the ops of a build for CUDA ----------------------------------------------------------------------------


@needs_cuda_build
def test_every_op_with_a_cpu_kernel_has_a_cuda_kernel():
    def has(op, key):
        return torch._C._dispatch_has_kernel_for_dispatch_key(op, key)

    ops = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("charlm::") and has(name, "CPU")]
    assert {"charlm::embedding", "charlm::embedding_linear", "charlm::cross_entropy"} <= set(ops)
    assert [op for op in ops if not has(op, "CUDA")] == []


def fake_calls():
    for function, samples in (
        (functional.embedding, sample_inputs_embedding(torch.float32)),
        (functional.embedding_linear, sample_inputs_embedding_linear(torch.float32)),
        (functional.cross_entropy, sample_inputs_cross_entropy(torch.float32)),
        (functional.linear_cross_entropy, sample_inputs_linear_cross_entropy(torch.float32)),
    ):
        for sample in samples:
            yield pytest.param(function, sample.arguments, id=f"{function.__name__}-{sample.name}")


@needs_cuda_build
@pytest.mark.parametrize(("function", "arguments"), list(fake_calls()))
def test_fake_cuda_tensors_give_what_fake_cpu_tensors_give(function, arguments):
    def outputs(device):
        moved = {
            name: mode.from_tensor(value).to(device) if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        result = function(**moved)
        return [value for value in result if value is not None] if isinstance(result, tuple) else [result]

    with FakeTensorMode() as mode:
        on_cuda, on_cpu = outputs("cuda"), outputs("cpu")
    assert {output.device.type for output in on_cuda} == {"cuda"}
    assert [(o.shape, o.dtype, o.stride()) for o in on_cuda] == [(o.shape, o.dtype, o.stride()) for o in on_cpu]


# torch's autograd engine needs a device before it runs a backward: the node is called without it.


@needs_cuda_build
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_the_gradient_of_a_fake_cuda_embedding_has_the_tables_shape(dtype):
    with FakeTensorMode():
        weight = torch.empty(27, 8, dtype=dtype, device="cuda", requires_grad=True)
        output = functional.embedding(torch.empty(33, 5, dtype=torch.uint8, device="cuda"), weight)
        assert output.grad_fn.name() == "EmbeddingBackward"
        with torch.no_grad():
            grad = output.grad_fn(torch.empty_like(output))
    assert (grad.shape, grad.dtype, grad.device) == (weight.shape, dtype, weight.device)


@needs_cuda_build
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_the_gradients_of_a_fake_cuda_embedding_linear_have_the_weights_shapes(dtype, activation):
    with FakeTensorMode():
        shapes = ((27, 8), (33, 40), (33,))
        weights = [torch.empty(shape, dtype=dtype, device="cuda", requires_grad=True) for shape in shapes]
        index = torch.empty(7, 5, dtype=torch.uint8, device="cuda")
        output = functional.embedding_linear(index, *weights, activation=activation)
        assert output.grad_fn.name() == "EmbeddingLinearBackward"
        with torch.no_grad():
            grads = output.grad_fn(torch.empty_like(output))
    assert [(g.shape, g.dtype, g.device) for g in grads] == [(w.shape, dtype, w.device) for w in weights]


@needs_cuda_build
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_the_gradient_of_a_fake_cuda_cross_entropy_has_the_logits_shape(dtype, reduction):
    with FakeTensorMode():
        logits = torch.empty(33, 27, dtype=dtype, device="cuda", requires_grad=True)
        target = torch.empty(33, dtype=torch.int64, device="cuda")
        loss = functional.cross_entropy(logits, target, reduction=reduction)
        assert loss.grad_fn.name() == "CrossEntropyBackward"
        with torch.no_grad():
            grad, *others = loss.grad_fn(torch.empty_like(loss))
    assert (grad.shape, grad.dtype, grad.device) == (logits.shape, dtype, logits.device)
    assert others == [None, None]
