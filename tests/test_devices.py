"""Tensors on two devices, devices without kernels, and `charlm.synchronize`: what can be said of them without a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import charlm
from charlm import functional

LOGITS, TARGET = torch.randn(3, 5), torch.tensor([0, 1, 4])

TWO_DEVICES: dict[str, Callable[[], torch.Tensor]] = {
    "weight is on cpu and indices is on meta": lambda: functional.embedding(TARGET.to("meta"), LOGITS),
    "weight is on meta and indices is on cpu": lambda: functional.embedding(TARGET, LOGITS.to("meta")),
    "input is on cpu and target is on meta": lambda: functional.cross_entropy(LOGITS, TARGET.to("meta")),
    "input is on meta and target is on cpu": lambda: functional.cross_entropy(LOGITS.to("meta"), TARGET),
    "input is on cpu and weight is on meta": lambda: functional.cross_entropy(
        LOGITS, TARGET, weight=torch.ones(5, device="meta")
    ),
    "input is on cpu and token_weight is on meta": lambda: functional.cross_entropy(
        LOGITS, TARGET, token_weight=torch.ones(3, device="meta")
    ),
}


@pytest.mark.parametrize("sentence", TWO_DEVICES)
def test_tensors_on_two_devices_are_a_runtime_error_that_names_both(sentence: str) -> None:
    with pytest.raises(RuntimeError, match=f"Expected all tensors to be on the same device, but {sentence}"):
        TWO_DEVICES[sentence]()


def test_nothing_is_to_be_waited_for_on_the_cpu() -> None:
    assert charlm.synchronize("cpu") is None


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch is built with CUDA")
@pytest.mark.parametrize("device", [None, "cuda", 0])
def test_a_torch_without_cuda_says_so_in_its_own_words(device: str | int | None) -> None:
    with pytest.raises(AssertionError, match="Torch not compiled with CUDA enabled"):
        charlm.synchronize(device)


def test_the_build_says_which_architectures_it_has_or_why_none() -> None:
    info = charlm.build_info()
    assert bool(info["cuda_architectures"]) == charlm._C.has_cuda_kernels()
    assert (info["why_no_cuda"] is None) == charlm._C.has_cuda_kernels()
