"""charlm.nn beside torch.nn: the same objects to everything around them."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch

import charlm
from charlm.functional import CrossEntropyOutput

PAIRS = [(charlm.nn.Embedding, torch.nn.Embedding), (charlm.nn.CrossEntropyLoss, torch.nn.CrossEntropyLoss)]
EMBEDDING_OPTIONS = [
    {},
    {"padding_idx": 2},
    {"padding_idx": -1},
    {"max_norm": 1.0, "norm_type": 1.0},
    {"scale_grad_by_freq": True},
    {"sparse": True},
    {"dtype": torch.bfloat16},
]
LOSS_OPTIONS = [
    {},
    {"weight": torch.rand(10) + 0.5},
    {"ignore_index": 3, "reduction": "none"},
    {"label_smoothing": 0.1, "reduction": "sum"},
]


@pytest.mark.parametrize(("ours", "theirs"), PAIRS)
def test_the_class_is_a_subclass_of_torchs_and_starts_with_its_arguments(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    parameters = list(inspect.signature(theirs).parameters.values())
    own = list(inspect.signature(ours).parameters.values())[: len(parameters)]
    assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in parameters]


@pytest.mark.parametrize("options", EMBEDDING_OPTIONS, ids=str)
def test_an_embedding_of_the_same_seed_trains_like_torchs(options: dict[str, Any]) -> None:
    index, results = torch.randint(27, (33, 3), generator=torch.Generator().manual_seed(0)), []
    for class_ in PAIRS[0]:
        torch.manual_seed(0)
        module = class_(27, 10, **options)
        output = module(index)
        output.float().square().sum().backward()
        results.append((repr(module), output.detach(), module.weight.grad.to_dense().float()))
    (our_repr, ours, our_grad), (their_repr, theirs, their_grad) = results
    assert our_repr == their_repr
    torch.testing.assert_close(ours, theirs)
    if options.get("dtype") is torch.bfloat16:  # torch rounds the sum of a row after each term, we once
        their_grad = torch.zeros(27, 10).index_add_(0, index.flatten(), 2 * ours.float().flatten(0, 1))
        torch.testing.assert_close(our_grad, their_grad, rtol=2**-8, atol=0)
    else:
        torch.testing.assert_close(our_grad, their_grad)


@pytest.mark.parametrize("options", LOSS_OPTIONS, ids="+".join)
def test_a_loss_module_gives_torchs_result(options: dict[str, Any]) -> None:
    x, y = torch.randn(33, 10), torch.randint(10, (33,))
    ours, theirs = (class_(**options) for class_ in PAIRS[1])
    torch.testing.assert_close(ours(x, y), theirs(x, y))
    if "ignore_index" not in options:  # torch refuses it beside probabilities
        torch.testing.assert_close(ours(x, x.softmax(1)), theirs(x, x.softmax(1)))
    assert repr(ours) == repr(theirs)
    assert list(ours.state_dict()) == list(theirs.state_dict())


def test_the_deprecated_arguments_of_the_loss_set_its_reduction() -> None:
    with pytest.warns(UserWarning, match="deprecated"):
        assert charlm.nn.CrossEntropyLoss(None, False).reduction == "sum"
    with pytest.warns(UserWarning, match="deprecated"):
        assert charlm.nn.CrossEntropyLoss(reduce=False).reduction == "none"


def test_state_dicts_load_both_ways() -> None:
    ours, theirs = charlm.nn.Embedding(27, 10), torch.nn.Embedding(27, 10)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.weight, theirs.weight)
    ours.reset_parameters()
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.weight, theirs.weight)


def test_from_pretrained_makes_our_class_and_freezes_like_torch() -> None:
    table = torch.randn(27, 10)
    module = charlm.nn.Embedding.from_pretrained(table, padding_idx=2)
    assert type(module) is charlm.nn.Embedding
    assert not module.weight.requires_grad
    assert module.padding_idx == 2
    assert torch.equal(module(torch.tensor([2, 3])), table[2:4])
    assert charlm.nn.Embedding.from_pretrained(table, freeze=False).weight.requires_grad


def test_padding_row_starts_at_zero_and_stays_there_in_training() -> None:
    module = charlm.nn.Embedding(27, 10, padding_idx=2)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    module(torch.tensor([1, 2, 2])).exp().sum().backward()
    optimizer.step()
    assert module.weight[2].tolist() == [0.0] * 10
    assert module.weight[1].abs().sum() > 0


def test_tied_weights_share_their_gradient() -> None:
    embedding, head = charlm.nn.Embedding(27, 10), torch.nn.Linear(10, 27, bias=False)
    head.weight = embedding.weight
    tokens = torch.randint(27, (33,))
    charlm.nn.CrossEntropyLoss()(head(embedding(tokens)), tokens).backward()
    reference = embedding.weight.detach().clone().requires_grad_()
    logits = torch.nn.functional.embedding(tokens, reference) @ reference.t()
    torch.nn.functional.cross_entropy(logits, tokens).backward()
    torch.testing.assert_close(embedding.weight.grad, reference.grad)


EXTRAS = {
    "lse_square_scale": 0.1,
    "softcap": 5.0,
    "logit_scale": 0.5,
    "all_ignored": "zero",
    "inplace": "backward",
    "return_lse": True,
    "return_entropy": True,
    "return_predicted_tokens": True,
    "return_token_accuracy": True,
}


def test_every_extra_of_the_module_reaches_the_function() -> None:
    x, y, t = torch.randn(33, 10), torch.randint(10, (33,)), torch.rand(33)
    output = charlm.nn.CrossEntropyLoss(label_smoothing=0.1, **EXTRAS)(x, y, token_weight=t)
    expected = charlm.functional.cross_entropy(x, y, label_smoothing=0.1, token_weight=t, **EXTRAS)
    assert isinstance(output, CrossEntropyOutput)
    for actual, value in zip(output, expected, strict=True):
        assert torch.equal(actual, value)


def test_extras_are_keyword_only_and_unknown_ones_are_refused() -> None:
    with pytest.raises(TypeError):
        charlm.nn.CrossEntropyLoss(None, None, -100, None, "mean", 0.0, 0.1)
    with pytest.raises(TypeError, match="lse_scale"):
        charlm.nn.CrossEntropyLoss(lse_scale=0.1)


def test_extras_stand_in_the_repr_if_set() -> None:
    assert "lse_square_scale=0.1" in repr(charlm.nn.CrossEntropyLoss(lse_square_scale=0.1))
    assert repr(charlm.nn.CrossEntropyLoss()) == "CrossEntropyLoss()"


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_modules_survive_deepcopy_and_pickle(duplicate: Any) -> None:
    embedding = duplicate(charlm.nn.Embedding(27, 10, padding_idx=2))
    assert type(embedding) is charlm.nn.Embedding
    assert embedding.padding_idx == 2
    loss = duplicate(charlm.nn.CrossEntropyLoss(torch.ones(10), **EXTRAS))
    assert {name: getattr(loss, name) for name in EXTRAS} == EXTRAS


def test_a_checkpoint_file_moves_between_torchs_module_and_ours() -> None:
    file = io.BytesIO()
    source = torch.nn.Embedding(27, 10)
    torch.save(source.state_dict(), file)
    file.seek(0)
    ours = charlm.nn.Embedding(27, 10)
    ours.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(ours.weight, source.weight)


def test_modules_move_to_another_dtype_and_to_meta() -> None:
    assert charlm.nn.Embedding(27, 10).half()(torch.tensor([1])).dtype == torch.float16
    assert charlm.nn.Embedding(27, 10, device="meta").weight.device.type == "meta"
    assert charlm.nn.CrossEntropyLoss(torch.ones(10)).double().weight.dtype == torch.float64
