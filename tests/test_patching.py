"""patch_torch and patch_model: what they change, what they keep, and that everything comes back."""

from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import parametrizations, parametrize

import charlm

ORIGINALS = (F.embedding, F.cross_entropy)
OURS = (charlm.functional.embedding, charlm.functional.cross_entropy)


def _current() -> tuple[Any, Any]:
    return F.embedding, F.cross_entropy


@pytest.fixture(autouse=True)
def _nothing_is_left_patched() -> Any:
    yield
    assert _current() == ORIGINALS


def test_the_block_swaps_both_functions_and_puts_the_very_same_ones_back() -> None:
    with charlm.patch_torch():
        assert _current() == OURS
    assert _current() == ORIGINALS


def test_the_function_form_lasts_until_undo_and_undo_may_be_repeated() -> None:
    patch = charlm.patch_torch()
    assert _current() == OURS
    patch.undo()
    assert _current() == ORIGINALS
    patch.undo()
    assert _current() == ORIGINALS


def test_an_exception_ends_the_block_and_passes_through() -> None:
    with pytest.raises(ZeroDivisionError), charlm.patch_torch():
        1 / 0  # noqa: B018
    assert _current() == ORIGINALS


def test_blocks_nest() -> None:
    with charlm.patch_torch():
        with charlm.patch_torch():
            assert _current() == OURS
        assert _current() == OURS
    assert _current() == ORIGINALS


def test_patches_may_end_in_any_order() -> None:
    first, second = charlm.patch_torch(), charlm.patch_torch()
    first.undo()
    assert _current() == OURS
    second.undo()
    assert _current() == ORIGINALS


def test_one_patch_may_be_entered_again_inside_and_afterwards() -> None:
    patch = charlm.patch_torch()
    with patch:
        with patch:
            assert _current() == OURS
        assert _current() == OURS
    assert _current() == ORIGINALS
    with patch:
        assert _current() == OURS
    assert _current() == ORIGINALS


def test_undo_inside_the_block_leaves_nothing_for_its_end() -> None:
    with charlm.patch_torch() as outer:
        with charlm.patch_torch() as inner:
            inner.undo()
            assert _current() == OURS
        outer.undo()
        assert _current() == ORIGINALS
    assert _current() == ORIGINALS


def test_patches_of_several_threads_restore_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    barrier = threading.Barrier(4)
    seen: list[bool] = []

    def work() -> None:
        barrier.wait()
        for _ in range(200):
            with charlm.patch_torch():
                seen.append(_current() == OURS)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 800
    assert all(seen)


def test_what_another_library_had_put_there_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(*args: Any, **kwargs: Any) -> Any:
        return ORIGINALS[1](*args, **kwargs)

    with monkeypatch.context() as context:
        context.setattr(F, "cross_entropy", other)
        with charlm.patch_torch():
            assert F.cross_entropy is OURS[1]
        assert F.cross_entropy is other


def test_torchs_modules_and_their_subclasses_run_our_kernels_while_patched() -> None:
    class Table(torch.nn.Embedding):
        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return super().forward(index) * 2

    table, loss = Table(27, 27), torch.nn.CrossEntropyLoss(label_smoothing=0.1)
    tokens = torch.randint(27, (33,))
    expected = loss(table(tokens), tokens)
    # Indices that torch refuses show whose kernel runs.
    with charlm.patch_torch():
        actual = loss(table(tokens.to(torch.int16)), tokens.to(torch.int16))
    torch.testing.assert_close(actual, expected)
    with pytest.raises(RuntimeError):
        table(tokens.to(torch.int16))


def test_the_reference_calls_torch_itself_while_patched() -> None:
    logits, target = torch.randn(3, 5), torch.tensor([0, 1, 4])
    with charlm.patch_torch():
        actual = charlm.reference.cross_entropy(logits, target)
    assert torch.equal(actual, F.cross_entropy(logits, target))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Embedding(27, 10, padding_idx=0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(10, 10), torch.nn.Embedding(3, 10, sparse=True)])
        self.head = torch.nn.Linear(10, 27, bias=False)
        self.head.weight = self.table.weight
        self.loss = torch.nn.CrossEntropyLoss(weight=torch.rand(27), reduction="sum", label_smoothing=0.1)

    def forward(self, tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        h = self.layers[0](self.table(tokens)) + self.layers[1](tokens % 3)
        return self.loss(self.head(h), target)


def test_a_patched_model_keeps_its_parameters_names_buffers_and_results() -> None:
    model = Model().eval()
    tokens, target = torch.randint(27, (33,)), torch.randint(27, (33,))
    names, parameters = list(model.state_dict()), list(model.parameters())
    text, expected = repr(model), model(tokens, target)
    assert charlm.patch_model(model) is model
    assert type(model.table) is type(model.layers[1]) is charlm.nn.Embedding
    assert type(model.loss) is charlm.nn.CrossEntropyLoss
    assert list(model.state_dict()) == names
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert model.head.weight is model.table.weight
    assert not any(module.training for module in model.modules())
    assert repr(model) == text
    torch.testing.assert_close(model(tokens, target), expected)
    # Indices that torch refuses show whose kernel runs.
    torch.testing.assert_close(model(tokens.to(torch.int16), target.to(torch.int16)), expected)


def test_patching_twice_changes_nothing_more() -> None:
    model = charlm.patch_model(Model())
    modules = list(model.modules())
    classes = [type(module) for module in modules]
    charlm.patch_model(model)
    assert [type(module) for module in model.modules()] == classes
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))


def test_an_embedding_or_a_loss_by_itself_is_a_model_too() -> None:
    embedding, loss = torch.nn.Embedding(27, 10), torch.nn.CrossEntropyLoss()
    assert charlm.patch_model(embedding) is embedding
    assert type(embedding) is charlm.nn.Embedding
    assert type(charlm.patch_model(loss)) is charlm.nn.CrossEntropyLoss
    assert loss(torch.zeros(1, 4), torch.tensor([2])).item() == pytest.approx(1.3863, abs=1e-4)
    loss.return_lse = True
    assert loss(torch.zeros(1, 4), torch.tensor([2])).lse.item() == pytest.approx(1.3863, abs=1e-4)


def test_something_else_than_a_module_is_refused() -> None:
    with pytest.raises(TypeError, match="Tensor"):
        charlm.patch_model(torch.ones(3))


def test_hooks_of_every_kind_still_run() -> None:
    embedding = torch.nn.Embedding(27, 10)
    calls: list[str] = []
    embedding.register_forward_pre_hook(lambda *_: calls.append("forward_pre"))
    embedding.register_forward_hook(lambda *_: calls.append("forward"))
    embedding.register_full_backward_pre_hook(lambda *_: calls.append("backward_pre"))
    embedding.register_full_backward_hook(lambda *_: calls.append("backward"))
    embedding.register_state_dict_pre_hook(lambda *_: calls.append("state_dict_pre"))
    embedding.register_state_dict_post_hook(lambda *_: calls.append("state_dict"))
    embedding.register_load_state_dict_pre_hook(lambda *_: calls.append("load_pre"))
    embedding.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    embedding.weight.register_hook(lambda _: calls.append("parameter"))
    charlm.patch_model(embedding)
    embedding(torch.tensor([1])).sum().backward()
    embedding.load_state_dict(embedding.state_dict())
    assert set(calls) == {
        "forward_pre",
        "forward",
        "backward_pre",
        "backward",
        "state_dict_pre",
        "state_dict",
        "load_pre",
        "load",
        "parameter",
    }


def test_subclasses_with_their_own_forward_are_left_alone() -> None:
    class Doubled(torch.nn.Embedding):
        def forward(self, index: torch.Tensor) -> torch.Tensor:
            return super().forward(index) * 2

    model = torch.nn.Sequential(Doubled(27, 10))
    charlm.patch_model(model)
    assert type(model[0]) is Doubled


def test_a_forward_set_on_the_module_itself_stays() -> None:
    embedding = torch.nn.Embedding(27, 10)
    embedding.forward = lambda index: index
    charlm.patch_model(embedding)
    assert embedding(torch.tensor([1])).tolist() == [1]


def test_a_parametrized_embedding_keeps_its_parametrization_and_comes_out_as_ours() -> None:
    embedding = parametrizations.weight_norm(torch.nn.Embedding(27, 10))
    other = copy.deepcopy(embedding)
    expected = embedding(torch.tensor([3, 4]))
    names = list(embedding.state_dict())
    charlm.patch_model(embedding)
    assert isinstance(embedding, charlm.nn.Embedding)
    assert parametrize.is_parametrized(embedding, "weight")
    assert list(embedding.state_dict()) == names
    torch.testing.assert_close(embedding(torch.tensor([3, 4], dtype=torch.int16)), expected)
    assert not isinstance(other, charlm.nn.Embedding)
    charlm.patch_model(embedding)
    parametrize.remove_parametrizations(embedding, "weight")
    assert type(embedding) is charlm.nn.Embedding
    torch.testing.assert_close(embedding(torch.tensor([3, 4])), expected)


def test_an_optimizer_made_before_patching_trains_the_model() -> None:
    losses = []
    tokens, target = torch.randint(27, (33,)), torch.randint(27, (33,))
    for patch in (False, True):
        torch.manual_seed(0)
        model = Model()
        model.layers[1].sparse = False
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        if patch:
            charlm.patch_model(model)
        for _ in range(5):
            optimizer.zero_grad()
            loss = model(tokens, target)
            loss.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_patched_model_survives_deepcopy() -> None:
    model = copy.deepcopy(charlm.patch_model(Model()))
    assert type(model.table) is charlm.nn.Embedding
    assert model.head.weight is model.table.weight
