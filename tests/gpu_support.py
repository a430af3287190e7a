"""What the tests on a GPU share: the device, a skip where there is none, and whole calls to repeat in many ways.

The files that import this run without conftest.py and without a plugin, so that any pytest runs them. With
CHARLM_TEST_DEVICE=cpu, a dry run of the files themselves, the tests that need no GPU run on the CPU, in small sizes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import charlm
from charlm import functional

DEVICE = os.environ.get("CHARLM_TEST_DEVICE", "cuda")
ON_GPU = DEVICE != "cpu"
if ON_GPU and not torch.cuda.is_available():
    pytest.skip("needs a GPU, and torch.cuda.is_available() is false", allow_module_level=True)
if ON_GPU and not charlm.build_info()["cuda_architectures"]:
    pytest.skip(f"charlm was built without CUDA: {charlm.build_info()['why_no_cuda']}", allow_module_level=True)

ABOUT_10_MS = 20_000_000  # cycles

Results = list[Tensor]


def loss_and_gradient(logits: Tensor, target: Tensor) -> Results:
    loss = functional.cross_entropy(logits, target)
    return [loss.detach(), *torch.autograd.grad(loss, logits)]


def embedding_and_gradient(weight: Tensor, index: Tensor, **options: bool) -> Results:
    output = functional.embedding(index, weight, **options)
    return [output.detach(), *torch.autograd.grad(output, weight, output.detach())]


def embedding_linear_and_gradients(weight: Tensor, index: Tensor, plan: str) -> Results:
    """Of contexts of three tokens; the layer's weight is made of the embedding's numbers."""
    layer = weight.detach()[:20].repeat(1, 3).requires_grad_()
    output = functional.embedding_linear(index.view(-1, 3), weight, layer, activation="tanh", plan=plan)
    return [output.detach(), *torch.autograd.grad(output, (weight, layer), output.detach())]


def entropy_and_gradient(logits: Tensor, index: Tensor) -> Results:
    result = functional.entropy(logits)
    return [result.detach(), *torch.autograd.grad(result.sum(), logits)]


def kl_div_and_gradients(p: Tensor, index: Tensor, p_kind: str = "logits") -> Results:
    """Of rows of P and the rows of the same numbers that `index` puts in their place, as logits of Q."""
    q = p.detach()[index].requires_grad_()
    given = p if p_kind == "logits" else p.softmax(-1)
    result = functional.kl_divergence(given, q, p_kind=p_kind)
    return [result.detach(), *torch.autograd.grad(result.sum(), (p, q))]


def linear_loss_and_gradients(hidden: Tensor, target: Tensor) -> Results:
    """Of a head whose weight is made of the hidden states' numbers."""
    weight = hidden.detach()[:4099].clone().requires_grad_()
    loss = functional.linear_cross_entropy(hidden, weight, target)
    return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight))]


# One for each path through the kernels: the call, the shape of its floating tensor, how many indices, their limit.
CALLS: dict[str, tuple[Callable[..., Results], tuple[int, int], int, int]] = {
    "tiny_vocabulary": (loss_and_gradient, (65_537, 27), 65_537, 27),
    "bytes": (loss_and_gradient, (4099, 256), 4099, 256),
    "large_vocabulary": (loss_and_gradient, (257, 32_000), 257, 32_000),
    "past_64k_classes": (loss_and_gradient, (33, 128_256), 33, 128_256),
    "small_table": (embedding_and_gradient, (27, 10), 262_147, 27),
    "table_of_bytes": (embedding_and_gradient, (256, 65), 16_411, 256),
    "large_table": (embedding_and_gradient, (50_257, 64), 16_411, 50_257),
    "folded_layer": (functools.partial(embedding_linear_and_gradients, plan="folded"), (27, 10), 49_152, 27),
    "gathered_layer": (functools.partial(embedding_linear_and_gradients, plan="gathered"), (27, 10), 49_152, 27),
    "folded_layer_of_many_tokens": (
        functools.partial(embedding_linear_and_gradients, plan="folded"),
        (4099, 10),
        16_410,
        4099,
    ),
    "entropy_of_bytes": (entropy_and_gradient, (4099, 256), 1, 256),
    "entropy_of_a_large_vocabulary": (entropy_and_gradient, (257, 32_000), 1, 257),
    "kl_div_of_bytes": (kl_div_and_gradients, (4099, 256), 4099, 4099),
    "kl_div_of_a_large_vocabulary": (functools.partial(kl_div_and_gradients, p_kind="probs"), (257, 32_000), 257, 257),
    "linear_loss": (linear_loss_and_gradients, (4099, 64), 4099, 4099),
    "by_frequency": (functools.partial(embedding_and_gradient, scale_grad_by_freq=True), (4099, 64), 16_411, 4099),
}
every_call = pytest.mark.parametrize("name", CALLS)


def call_and_inputs(name: str, device: str = DEVICE) -> tuple[Callable[..., Results], Tensor, Tensor]:
    """The call, its floating tensor, its indices."""
    call, shape, n, limit = CALLS[name]
    values = torch.randn(shape, device=device, requires_grad=True)
    return call, values, torch.randint(limit, (n,), device=device)


def assert_equal(actual: Results, expected: Results) -> None:
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
