"""Every public name as a type checker sees it: `make lint` runs mypy and pyright over this file; nothing runs it.

`assert_type` states a type. A line that ends in an ignore comment is a wrong use: both checkers have to find it, since
both report an ignore comment that is not needed. tests/test_typing_sample.py holds that no public name is missing.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import assert_type

import charlm
import charlm.functional as F
import charlm.nn.functional
from charlm import information, ngrams, nn, reference
from charlm.lm import CharacterModel
from charlm.nn import functional, init
from charlm.nn.functional import cross_entropy as cross_entropy_of_nn
from charlm.reference.cross_entropy import LossAndMetrics

x, w, t = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
flag = bool(x.any())


def functions() -> None:
    assert_type(F.embedding(t, w, padding_idx=0, max_norm=1.0), Tensor)
    assert_type(F.embedding_linear(t, w, w, activation="tanh", plan="folded"), Tensor)
    assert_type(F.entropy(x), Tensor)
    assert_type(F.kl_div(x, x), Tensor)
    assert_type(F.kl_divergence(x, x, p_kind="probs"), Tensor)
    assert_type(F.surprisal(x, t, ignore_index=-1), Tensor)
    assert_type(F.linear_cross_entropy(x, w, t, linear_bias=None, all_ignored="zero"), Tensor)
    assert_type(F.linear_cross_entropy(x, w, t, memory_budget=1 << 30), Tensor)
    assert_type(F.cross_entropy(x, t), Tensor)
    assert_type(F.cross_entropy(x, t, None, None, -1, None, "sum", 0.1, inplace="forward", return_lse=False), Tensor)

    reduction = str(flag)  # torch's functions take any str, and so do ours
    assert_type(F.cross_entropy(x, t, reduction=reduction), Tensor)

    F.cross_entropy(x, t, all_ignored="none")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    F.cross_entropy(x, t, inplace="both")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]
    F.cross_entropy(x, t, lse_scale=0.1)  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    F.linear_cross_entropy(x, w, t, inplace="forward")  # type: ignore[call-overload]  # pyright: ignore[reportCallIssue]
    F.embedding_linear(t, w, w, activation="swish")  # type: ignore[call-overload]  # pyright: ignore[reportArgumentType, reportCallIssue]


def outputs() -> None:
    output = F.cross_entropy(x, t, return_entropy=True)
    assert isinstance(output, F.CrossEntropyOutput)
    assert_type(output.loss, Tensor)
    assert_type(output.predicted_tokens, Tensor | None)
    F.cross_entropy(x, t, return_lse=True).loss.backward()
    F.cross_entropy(x, t, return_lse=True).perplexity  # type: ignore[union-attr]  # noqa: B018  # pyright: ignore[reportAttributeAccessIssue]
    F.linear_cross_entropy(x, w, t, return_token_accuracy=True).backward()  # type: ignore[union-attr]  # pyright: ignore[reportAttributeAccessIssue]

    either = F.cross_entropy(x, t, return_lse=flag)
    if isinstance(either, Tensor):
        either.sum()

    planned = F.embedding_linear(t, w, w, return_plan=True)
    assert isinstance(planned, F.EmbeddingLinearOutput)
    assert_type(planned.backward_plan, str)


def torchs_names() -> None:
    assert_type(F.relu(x), Tensor)
    assert_type(F.softmax(x, dim=1), Tensor)
    assert_type(nn.Linear(3, 4), torch.nn.Linear)
    assert_type(nn.Parameter(x), torch.nn.Parameter)
    assert_type(nn.utils.clip_grad_norm_([x], 1.0), Tensor)
    assert_type(init.zeros_(x), Tensor)
    F.relou(x)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]
    nn.Linera(3, 4)  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]

    assert_type(functional.relu(x), Tensor)
    for loss in (
        cross_entropy_of_nn(x, t, logit_scale=2.0),
        functional.cross_entropy(x, t, logit_scale=2.0),
        nn.functional.cross_entropy(x, t, logit_scale=2.0),
        charlm.nn.functional.cross_entropy(x, t, logit_scale=2.0),
    ):
        assert_type(loss, Tensor)


def modules() -> None:
    model = nn.Sequential(nn.Embedding(27, 10, padding_idx=0), nn.Flatten(), torch.nn.Linear(30, 27))
    assert_type(charlm.patch_model(model), torch.nn.Sequential)
    table: torch.nn.Embedding = nn.Embedding(27, 10)
    assert_type(table.weight, Tensor)
    assert_type(nn.EmbeddingLinear(27, 10, 3, 200, activation="gelu", plan="auto").linear, torch.nn.Linear)
    loss = nn.CrossEntropyLoss(
        label_smoothing=0.1, lse_square_scale=1e-4, softcap=30.0, inplace="backward", return_lse=True
    )
    assert_type(loss.logit_scale, float)
    assert_type(nn.KLDivLoss(reduction="batchmean", log_target=True).log_target, bool)
    nn.LinearCrossEntropyLoss(3, 4, bias=True, all_ignored="zero", return_token_accuracy=True)

    nn.CrossEntropyLoss(lse_scale=0.1)  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    nn.CrossEntropyLoss(inplace="both")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    nn.LinearCrossEntropyLoss(3, 4, inplace="forward")  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    nn.EmbeddingLinear(27, 10, 3, 200, plan="fold")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


def library() -> None:
    assert_type(charlm.__version__, str)
    assert_type(charlm.build_info()["threads"], int)
    error: ValueError = charlm.UserError("no such file")
    assert_type(str(error), str)
    charlm.synchronize("cpu")
    with charlm.patch_torch() as patch:
        patch.undo()
    run = charlm.train(iter(["ada", "bea", "cleo"]), "trained", type="gpt", max_steps=10)
    assert_type(run.finished, bool)
    assert_type(run.history[-1]["nats"], Any)
    assert_type(run.model, CharacterModel)
    model = charlm.load("out", device="cpu")
    assert_type(model.log_prob("emma", unit="bits"), float)
    assert_type(model.surprisal("emma"), Tensor)


def information_and_ngrams() -> None:
    entropies: list[Any] = [
        information.entropy([2, 1, 1], base=2),
        information.cross_entropy([1, 1], [1, 3]),
        information.kl_divergence(x, x),
        information.js_divergence([5, 0], [0, 1]),
        information.mutual_information([[1, 0], [0, 1]]),
        information.perplexity([1, 1]),
    ]
    assert_type(information.conditional_entropy("abab", 1), float)
    assert_type(information.conditional_entropies("abab", 2), np.ndarray)
    assert_type(ngrams.as_tokens("abab"), np.ndarray)
    assert_type(ngrams.count_ngrams("abab", 2), list[ngrams.NgramLevel])
    assert_type(ngrams.count_spectra("abab", 2), tuple[list[ngrams.Spectrum], list[ngrams.Spectrum]])
    print(entropies)


def references() -> None:
    assert torch.uint8 in reference.INDEX_DTYPES
    assert_type(reference.embedding(t, w), Tensor)
    assert_type(reference.entropy(x), Tensor)
    assert_type(reference.kl_div(x, x), Tensor)
    assert_type(reference.kl_divergence(x, x), Tensor)
    assert_type(reference.surprisal(x, t), Tensor)
    assert_type(reference.cross_entropy(x, t), Tensor | LossAndMetrics)
    assert_type(reference.linear_cross_entropy(x, w, t), Tensor | LossAndMetrics)
    assert_type(reference.embedding_linear(t, w, w), Tensor | tuple[Tensor, str, str])
