"""inplace="backward" and inplace="forward": the right gradient, in the logits' own memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from charlm.functional import cross_entropy

in_both_modes = pytest.mark.parametrize("mode", ["backward", "forward"])


class _Spy(torch.autograd.Function):
    """The identity; remembers the tensor that arrives as its gradient, and passes it on or not."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, seen: list[torch.Tensor], passes_on: bool) -> torch.Tensor:
        ctx.seen, ctx.passes_on = seen, passes_on
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, None, None]:
        ctx.seen.append(gradient)
        return gradient if ctx.passes_on else None, None, None


@pytest.fixture
def leaf() -> torch.Tensor:
    return torch.randn(33, 27, requires_grad=True)


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randint(27, (33,)).masked_fill(torch.rand(33) < 0.2, -100)


def _expected_gradient(leaf: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
    x = leaf.detach().clone().requires_grad_()
    cross_entropy(x * 2, *args, **options).backward()
    return x.grad


@in_both_modes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradient_equal_those_out_of_place(
    mode: str, dtype: torch.dtype, reduction: str, target: torch.Tensor, isa: str
) -> None:
    leaf = torch.randn(33, 27).to(dtype).requires_grad_()
    loss = cross_entropy(leaf * 2, target, reduction=reduction, inplace=mode)
    torch.testing.assert_close(loss, cross_entropy(leaf * 2, target, reduction=reduction))
    loss.backward()
    torch.testing.assert_close(leaf.grad, _expected_gradient(leaf, target, reduction=reduction))


def test_inplace_backward_takes_a_gradient_for_each_target_of_reduction_none(
    leaf: torch.Tensor, target: torch.Tensor, isa: str
) -> None:
    cotangent = torch.randn(33)
    cross_entropy(leaf * 2, target, reduction="none", inplace="backward").backward(cotangent)
    expected = leaf.detach().clone().requires_grad_()
    cross_entropy(expected * 2, target, reduction="none").backward(cotangent)
    torch.testing.assert_close(leaf.grad, expected.grad)


@in_both_modes
@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"weight": torch.rand(27) + 0.5},
        {"lse_square_scale": 0.1},
        {"softcap": 3.0, "logit_scale": 0.5},
        {"token_weight": torch.rand(33)},
        {"all_ignored": "zero"},
    ],
    ids="+".join,
)
def test_every_option_gives_the_same_gradient_in_place(
    mode: str, options: dict[str, Any], leaf: torch.Tensor, target: torch.Tensor, isa: str
) -> None:
    cross_entropy(leaf * 2, target, inplace=mode, **options).backward()
    torch.testing.assert_close(leaf.grad, _expected_gradient(leaf, target, **options))


@in_both_modes
@pytest.mark.parametrize("layout", ["positions", "transposed", "sliced"])
def test_logits_of_any_strides_are_overwritten_where_they_lie(mode: str, layout: str, isa: str) -> None:
    view = {
        "positions": lambda h: h.view(3, 11, 27).permute(0, 2, 1),
        "transposed": lambda h: h.view(27, 33).t(),
        "sliced": lambda h: h[:, 2:-3],
    }[layout]
    leaf = torch.randn(33, 27, requires_grad=True)
    other = leaf.detach().clone().requires_grad_()
    shape = view(leaf).shape
    target = torch.randint(shape[1], shape[:1] + shape[2:])
    cross_entropy(view(leaf * 2), target, inplace=mode).backward()
    cross_entropy(view(other * 2), target).backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@in_both_modes
def test_probability_targets_work_in_place(mode: str, leaf: torch.Tensor) -> None:
    probabilities = torch.rand(33, 27).softmax(1)
    cross_entropy(leaf * 2, probabilities, inplace=mode).backward()
    torch.testing.assert_close(leaf.grad, _expected_gradient(leaf, probabilities))


@in_both_modes
def test_probability_targets_that_require_grad_get_their_gradient_or_are_refused(mode: str) -> None:
    for logits_require_grad in (False, True):
        leaf = torch.randn(33, 27, requires_grad=logits_require_grad)
        p, q = (torch.rand(33, 27).softmax(1) for _ in range(2))
        q = p.clone().requires_grad_()
        p.requires_grad_()
        F.cross_entropy(leaf.detach() * 2, q).backward()
        try:
            cross_entropy(leaf * 2, p, inplace=mode).backward()
        except RuntimeError:
            assert p.grad is None
        else:
            torch.testing.assert_close(p.grad, q.grad)


@in_both_modes
@pytest.mark.parametrize("scale", [3.0, 0.0, -0.5])
def test_the_incoming_gradient_scales_the_gradient_in_place(
    mode: str, scale: float, leaf: torch.Tensor, target: torch.Tensor
) -> None:
    (scale * cross_entropy(leaf * 2, target, inplace=mode)).backward()
    torch.testing.assert_close(leaf.grad, scale * _expected_gradient(leaf, target))


@in_both_modes
def test_the_gradient_is_the_logits_own_memory(mode: str, leaf: torch.Tensor, target: torch.Tensor) -> None:
    seen: list[torch.Tensor] = []
    logits = _Spy.apply(leaf, seen, True)
    address = logits.data_ptr()
    cross_entropy(logits, target, inplace=mode).backward()
    assert [gradient.data_ptr() for gradient in seen] == [address]


@in_both_modes
def test_no_second_buffer_of_the_logits_size_is_allocated(mode: str) -> None:
    leaf, target = torch.randn(512, 4099, requires_grad=True), torch.randint(4099, (512,))
    logits = _Spy.apply(leaf, [], False)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        cross_entropy(logits, target, inplace=mode).backward()
    allocated = [event.self_cpu_memory_usage for event in profile.events() if event.self_cpu_memory_usage > 0]
    assert allocated
    assert sum(allocated) < logits.nbytes / 10


def test_inplace_backward_leaves_the_logits_intact_until_backward(leaf: torch.Tensor, target: torch.Tensor) -> None:
    logits = leaf * 2
    before = logits.detach().clone()
    loss = cross_entropy(logits, target, inplace="backward")
    assert torch.equal(logits.detach(), before)
    loss.backward()
    torch.testing.assert_close(logits.detach() * 2, leaf.grad)  # a plain read afterwards sees the gradient


def test_inplace_forward_turns_the_logits_into_their_gradient_at_once(leaf: torch.Tensor, target: torch.Tensor) -> None:
    logits = leaf * 2
    cross_entropy(logits, target, inplace="forward")
    torch.testing.assert_close(logits.detach() * 2, _expected_gradient(leaf, target))


def test_inplace_forward_of_float16_waits_for_the_loss_scale(isa: str) -> None:
    leaf, target = torch.randn(65536, 256).half().requires_grad_(), torch.randint(256, (65536,))
    logits = leaf * 1
    before = logits.detach().clone()
    loss = cross_entropy(logits, target, inplace="forward")
    assert torch.equal(logits.detach(), before)
    (loss.float() * 2**15).backward()
    exact = leaf.detach().float().requires_grad_()
    (F.cross_entropy(exact, target) * 2**15).backward()
    zeros = [(gradient == 0).float().mean().item() for gradient in (leaf.grad, exact.grad.half())]
    assert zeros[0] == pytest.approx(zeros[1], abs=1e-4)
    torch.testing.assert_close(leaf.grad.float(), exact.grad, rtol=2e-3, atol=1e-7)


@in_both_modes
@pytest.mark.parametrize(("autocast", "scale"), [(True, 2.0**16), (False, 2.0**15)])
def test_a_float16_step_under_a_grad_scaler_equals_the_one_out_of_place(
    mode: str, autocast: bool, scale: float
) -> None:
    target = torch.randint(256, (4096,))
    stepped = []
    for inplace in (mode, None):
        torch.manual_seed(0)
        layer = torch.nn.Linear(32, 256, bias=False)
        before = layer.weight.detach().clone()
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        with torch.autocast("cpu", dtype=torch.float16, enabled=autocast):
            loss = cross_entropy(layer(torch.randn(4096, 32)).half(), target, inplace=inplace)
        scaler.scale(loss.float()).backward()
        scaler.step(optimizer)
        assert not torch.equal(layer.weight, before)  # a gradient that overflowed would have been skipped
        stepped.append(layer.weight.detach().clone())
    torch.testing.assert_close(stepped[0], stepped[1], rtol=1e-3, atol=1e-6)
