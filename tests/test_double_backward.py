"""Backward with create_graph=True: the gradients of an op's inputs, each once, however they depend on each other."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import charlm.functional as F
from charlm import reference

INDEX = torch.tensor([0, 2, 1, 2])

# Losses of one leaf (3, 3) that reaches the op by two ways.
DEPENDENT: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": lambda f, x: f.cross_entropy(x, (2 * x).softmax(1)),
    "cross_entropy of weights": lambda f, x: f.cross_entropy(x, x.softmax(1), weight=x[0].square()),
    "linear_cross_entropy": lambda f, x: f.linear_cross_entropy(f.embedding(INDEX, x), x, INDEX.flip(0)),
    "linear_cross_entropy of itself": lambda f, x: f.linear_cross_entropy(x, x, INDEX[:3], linear_bias=x[0]),
    "embedding_linear": lambda f, x: f.embedding_linear(INDEX[:, None], x, x.sin(), x[1], activation="tanh").sum(),
    "entropy": lambda f, x: f.entropy(x).square().sum(),
    "kl_div": lambda f, x: f.kl_div(x.log_softmax(1), x.softmax(1).square(), reduction="sum"),
    "kl_divergence": lambda f, x: f.kl_divergence(x, x * x).sum(),
    "kl_divergence of itself": lambda f, x: f.kl_divergence(x.softmax(1), x, p_kind="probs").sum(),
}


def leaf() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 3, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("name", DEPENDENT)
def test_inputs_that_depend_on_each_other_are_differentiated_once(name: str) -> None:
    def gradients(functions: object, create_graph: bool) -> list[Tensor]:
        x = leaf()
        (gradient,) = torch.autograd.grad(DEPENDENT[name](functions, x), x, create_graph=create_graph)
        return [gradient, *(torch.autograd.grad(gradient.square().sum(), x) if create_graph else ())]

    first, second = gradients(reference, True)
    torch.testing.assert_close(gradients(F, False)[0], first)
    torch.testing.assert_close(gradients(F, True), [first, second])


@pytest.mark.parametrize("name", DEPENDENT)
def test_hooks_of_the_inputs_run_once(name: str) -> None:
    def gradient(functions: object, create_graph: bool) -> tuple[Tensor, Tensor]:
        x = leaf()
        h = x * 1
        h.register_hook(lambda g: 10 * g)
        h.retain_grad()
        x.register_hook(lambda g: 3 * g)
        DEPENDENT[name](functions, h).backward(create_graph=create_graph)
        assert h.grad is not None
        assert x.grad is not None
        return h.grad.detach(), x.grad.detach()

    for create_graph in (False, True):
        torch.testing.assert_close(gradient(F, create_graph), gradient(reference, create_graph))


def test_a_hook_of_the_inputs_may_go_backward_itself() -> None:
    h = leaf() * 1
    loss = F.cross_entropy(h, INDEX[:3])
    inner: list[Tensor] = []

    def differentiate(_: Tensor) -> None:
        if not inner:
            inner.append(torch.zeros(()))  # a gradient of h calls this hook too
            inner.extend(torch.autograd.grad(loss, h, retain_graph=True))

    h.register_hook(differentiate)
    thread = threading.Thread(target=lambda: loss.backward(create_graph=True), daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive(), "the node holds its mutex while the hook runs"
    torch.testing.assert_close(inner[1], torch.autograd.grad(reference.cross_entropy(h, INDEX[:3]), h)[0])
