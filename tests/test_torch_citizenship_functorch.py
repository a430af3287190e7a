"""torch.func and forward-mode AD give what they give for torch's own ops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from charlm import functional, reference

x = torch.randn(4, 7, dtype=torch.float64)
y = torch.tensor([0, 3, -100, 6])
p = torch.rand(4, 7, dtype=torch.float64).softmax(1)
w = torch.rand(7, dtype=torch.float64) + 0.5
tangent = torch.randn(4, 7, dtype=torch.float64)
batch = torch.randn(3, 4, 7, dtype=torch.float64)
table = torch.randn(7, 5, dtype=torch.float64)
index = torch.tensor([[0, 3], [6, 3]])


def _dual(f: Any) -> torch.Tensor:
    with forward_ad.dual_level():
        loss = f.cross_entropy(forward_ad.make_dual(x, tangent), y)
        return forward_ad.unpack_dual(loss).tangent


def _dual_embedding(f: Any) -> torch.Tensor:
    with forward_ad.dual_level():
        output = f.embedding(index, forward_ad.make_dual(table, table.cos()), padding_idx=3)
        return forward_ad.unpack_dual(output).tangent


TRANSFORMS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f: torch.func.grad(f.cross_entropy)(x, y),
    "grad_smoothing_weight": lambda f: torch.func.grad(
        lambda x: f.cross_entropy(x, y, w, label_smoothing=0.1, reduction="sum")
    )(x),
    "grad_of_probabilities": lambda f: torch.func.grad(f.cross_entropy, argnums=(0, 1, 2))(x, p, w),
    "grad_of_a_float32_loss": lambda f: torch.func.grad(f.cross_entropy)(x.float(), y),
    "grad_of_grad": lambda f: torch.func.grad(lambda x: torch.func.grad(f.cross_entropy)(x, y).square().sum())(x),
    "vmap": lambda f: torch.func.vmap(f.cross_entropy, in_dims=(0, None))(batch, y),
    "vmap_out_of_targets": lambda f: torch.func.vmap(f.cross_entropy, in_dims=(None, 0))(
        x, y.clamp(min=0)[:, None].expand(4, 4)
    ),
    "vmap_none": lambda f: torch.func.vmap(lambda x: f.cross_entropy(x, y, reduction="none"))(batch),
    "vmap_last_dimension": lambda f: torch.func.vmap(f.cross_entropy, in_dims=(2, None))(
        batch.permute(1, 2, 0).contiguous(), y
    ),
    "vmap_single_rows": lambda f: torch.func.vmap(f.cross_entropy)(x, y.clamp(min=0)),
    "vmap_without_wrapped_logits": lambda f: torch.func.vmap(lambda i: f.cross_entropy(x, y) + i)(torch.arange(3)),
    "per_sample_gradients": lambda f: torch.func.vmap(torch.func.grad(f.cross_entropy))(x, y.clamp(min=0)),
    "jvp": lambda f: torch.func.jvp(lambda x: f.cross_entropy(x, y), (x,), (tangent,)),
    "vjp": lambda f: torch.func.vjp(lambda x: f.cross_entropy(x, y, reduction="none"), x)[1](
        torch.arange(4.0, dtype=torch.float64)
    ),
    "jacrev": lambda f: torch.func.jacrev(lambda x: f.cross_entropy(x, y, reduction="none"))(x),
    "jacfwd": lambda f: torch.func.jacfwd(lambda x: f.cross_entropy(x, y, reduction="none"))(x),
    "hessian": lambda f: torch.func.hessian(lambda x: f.cross_entropy(x, y))(x),
    "autograd_hessian": lambda f: torch.autograd.functional.hessian(lambda x: f.cross_entropy(x, y), x),
    "forward_ad": _dual,
    "embedding_grad": lambda f: torch.func.grad(lambda t: f.embedding(index, t, padding_idx=3).sin().sum())(table),
    "embedding_vmap_tables": lambda f: torch.func.vmap(f.embedding, in_dims=(None, 0))(
        index, torch.stack([table, table * 2])
    ),
    "embedding_vmap_indices": lambda f: torch.func.vmap(f.embedding, in_dims=(0, None))(index, table),
    "embedding_vmap_both": lambda f: torch.func.vmap(f.embedding)(index, torch.stack([table, table * 2])),
    "embedding_per_sample_gradients": lambda f: torch.func.vmap(
        torch.func.grad(lambda t, i: f.embedding(i, t).square().sum()), in_dims=(None, 0)
    )(table, index),
    "embedding_jvp": lambda f: torch.func.jvp(lambda t: f.embedding(index, t), (table,), (table.cos(),)),
    "embedding_hessian": lambda f: torch.func.hessian(lambda t: f.embedding(index, t).sin().sum())(table),
    "embedding_forward_ad": _dual_embedding,
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_transform_gives_torchs_result(name: str) -> None:
    torch.testing.assert_close(TRANSFORMS[name](functional), TRANSFORMS[name](F))


EXTRAS: dict[str, Callable[[Any], Any]] = {
    "grad": lambda f, **o: torch.func.grad(lambda x: f.cross_entropy(x, y, **o))(x),
    "vmap": lambda f, **o: torch.func.vmap(lambda x: f.cross_entropy(x, y, **o))(batch),
    "hessian": lambda f, **o: torch.func.hessian(lambda x: f.cross_entropy(x, y, **o))(x),
    "jvp": lambda f, **o: torch.func.jvp(lambda x: f.cross_entropy(x, y, **o), (x,), (tangent,)),
}


@pytest.mark.parametrize("name", EXTRAS)
def test_a_transform_of_a_call_with_every_extra_gives_the_references_result(name: str) -> None:
    options = {
        "label_smoothing": 0.1,
        "lse_square_scale": 0.2,
        "softcap": 3.0,
        "logit_scale": 0.7,
        "token_weight": torch.tensor([0.5, 1.0, 2.0, 3.0], dtype=torch.float64),
        "all_ignored": "zero",
    }
    actual, expected = EXTRAS[name](functional, **options), EXTRAS[name](reference, **options)
    torch.testing.assert_close(actual, expected)


KINDS = {"p_kind": "probs", "q_kind": "log_probs"}
INFORMATION: dict[str, Callable[[Any], Any]] = {
    "entropy_vmap": lambda f: torch.func.vmap(f.entropy, in_dims=2)(batch),
    "entropy_per_sample_gradients": lambda f: torch.func.vmap(torch.func.grad(f.entropy))(x),
    "entropy_hessian": lambda f: torch.func.hessian(lambda x: f.entropy(x).sum())(x),
    "entropy_jvp": lambda f: torch.func.jvp(f.entropy, (x,), (tangent,)),
    "kl_div_vmap": lambda f: torch.func.vmap(f.kl_divergence, in_dims=(0, None))(batch, x),
    "kl_div_gradients": lambda f: torch.func.grad(lambda *pq: f.kl_divergence(*pq).sum(), argnums=(0, 1))(x, tangent),
    "kl_div_jacrev_of_other_kinds": lambda f: torch.func.jacrev(
        lambda p: f.kl_divergence(p, x.log_softmax(1), **KINDS)
    )(p),
    "kl_div_hessian": lambda f: torch.func.hessian(lambda q: f.kl_divergence(x[0], q).sum())(tangent),
    "kl_div_jvp": lambda f: torch.func.jvp(f.kl_divergence, (x, tangent), (tangent, x)),
    "surprisal_vmap": lambda f: torch.func.vmap(f.surprisal, in_dims=(0, None))(batch, y),
    "surprisal_per_sample_gradients": lambda f: torch.func.vmap(torch.func.grad(f.surprisal))(x, y.clamp(min=0)),
    "surprisal_hessian": lambda f: torch.func.hessian(lambda x: f.surprisal(x, y).sum())(x),
    "surprisal_jvp": lambda f: torch.func.jvp(lambda x: f.surprisal(x, y), (x,), (tangent,)),
}


@pytest.mark.parametrize("name", INFORMATION)
def test_a_transform_of_what_torch_has_no_op_for_gives_the_references_result(name: str) -> None:
    torch.testing.assert_close(INFORMATION[name](functional), INFORMATION[name](reference))


def test_a_model_ensemble_by_functional_call_and_vmap_equals_one_by_one() -> None:
    import charlm

    models = [charlm.nn.Embedding(27, 27) for _ in range(3)]
    weights = torch.stack([model.weight.detach() for model in models])
    tokens, target = torch.randint(27, (33,)), torch.randint(27, (33,))

    def loss(weight: torch.Tensor) -> torch.Tensor:
        logits = torch.func.functional_call(models[0], {"weight": weight}, (tokens,))
        return functional.cross_entropy(logits, target)

    together = torch.func.vmap(torch.func.grad(loss))(weights)
    one_by_one = torch.stack([torch.func.grad(loss)(weight) for weight in weights])
    torch.testing.assert_close(together, one_by_one)
