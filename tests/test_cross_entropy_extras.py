"""The keyword-only extras, against formulas written out here, apart from charlm.reference."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from charlm.functional import CrossEntropyOutput, cross_entropy

RETURNS = ("return_lse", "return_entropy", "return_predicted_tokens", "return_token_accuracy")


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.randn(33, 27, dtype=torch.float64) * 2


@pytest.fixture
def target() -> torch.Tensor:
    return torch.randint(27, (33,)).masked_fill(torch.rand(33) < 0.3, -100)


def test_z_loss_adds_the_mean_square_of_lse(logits: torch.Tensor, target: torch.Tensor, isa: str) -> None:
    valid = target != -100
    expected = F.cross_entropy(logits, target) + 0.1 * logits.logsumexp(1)[valid].square().mean()
    torch.testing.assert_close(cross_entropy(logits, target, lse_square_scale=0.1), expected)


def test_z_loss_has_the_class_weight_of_its_target(logits: torch.Tensor, target: torch.Tensor, isa: str) -> None:
    weight, valid = torch.rand(27, dtype=torch.float64) + 0.5, target != -100
    share = weight[target[valid]]
    expected = F.cross_entropy(logits, target, weight)
    expected += 0.1 * (share * logits.logsumexp(1)[valid].square()).sum() / share.sum()
    torch.testing.assert_close(cross_entropy(logits, target, weight, lse_square_scale=0.1), expected)


def test_softcap_is_a_scaled_tanh_of_the_scaled_logits(logits: torch.Tensor, target: torch.Tensor, isa: str) -> None:
    capped = 5.0 * torch.tanh(0.7 * logits / 5.0)
    expected = F.cross_entropy(capped, target, label_smoothing=0.1)
    actual = cross_entropy(logits, target, label_smoothing=0.1, softcap=5.0, logit_scale=0.7)
    torch.testing.assert_close(actual, expected)


def test_token_weight_weighs_the_losses_and_the_mean(logits: torch.Tensor, target: torch.Tensor, isa: str) -> None:
    token_weight = torch.rand(33, dtype=torch.float64)
    losses = F.cross_entropy(logits, target, reduction="none") * token_weight
    valid = target != -100
    for reduction, expected in {
        "none": losses,
        "sum": losses.sum(),
        "mean": losses.sum() / token_weight[valid].sum(),
    }.items():
        actual = cross_entropy(logits, target, token_weight=token_weight, reduction=reduction)
        torch.testing.assert_close(actual, expected)


def test_token_weight_of_ones_and_of_zeros_at_ignored_targets_agree(logits: torch.Tensor, target: torch.Tensor) -> None:
    valid = target != -100
    expected = cross_entropy(logits, target)
    actual = cross_entropy(logits, target.clamp(min=0), token_weight=valid.double())
    torch.testing.assert_close(actual, expected)


def test_token_weights_make_gradient_accumulation_equal_to_one_batch(logits: torch.Tensor) -> None:
    target = torch.randint(27, (33,))
    whole, parts = (logits.clone().requires_grad_() for _ in range(2))
    cross_entropy(whole, target).backward()
    share = torch.full((33,), 1 / 33, dtype=torch.float64)
    for rows in (slice(0, 10), slice(10, 33)):
        cross_entropy(parts[rows], target[rows], token_weight=share[rows], reduction="sum").backward()
    torch.testing.assert_close(parts.grad, whole.grad)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_the_output_holds_what_was_requested_and_none_elsewhere(
    reduction: str, logits: torch.Tensor, target: torch.Tensor
) -> None:
    for name in RETURNS:
        output = cross_entropy(logits, target, reduction=reduction, **{name: True})
        assert isinstance(output, CrossEntropyOutput)
        assert [field for field, value in output._asdict().items() if value is not None] == [
            "loss",
            name.removeprefix("return_"),
        ]
        torch.testing.assert_close(output.loss, F.cross_entropy(logits, target, reduction=reduction))
    assert isinstance(cross_entropy(logits, target, reduction=reduction), torch.Tensor)


def test_returned_values_are_those_of_the_distribution(logits: torch.Tensor, target: torch.Tensor, isa: str) -> None:
    output = cross_entropy(logits, target, **dict.fromkeys(RETURNS, True))
    torch.testing.assert_close(output.lse, logits.logsumexp(1))
    torch.testing.assert_close(output.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(output.predicted_tokens, logits.argmax(1))
    valid = target != -100
    right = (logits.argmax(1) == target)[valid].float().mean()
    torch.testing.assert_close(output.token_accuracy, right)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_returned_values_are_float32_but_for_float64_logits(dtype: torch.dtype) -> None:
    output = cross_entropy(torch.randn(3, 27, 2).to(dtype), torch.randint(27, (3, 2)), **dict.fromkeys(RETURNS, True))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert output.loss.dtype == dtype
    assert (output.lse.dtype, output.entropy.dtype) == (wide, wide)
    assert (output.predicted_tokens.dtype, output.token_accuracy.dtype) == (torch.int64, torch.float32)
    assert output.lse.shape == output.entropy.shape == output.predicted_tokens.shape == (3, 2)


def test_loss_lse_and_entropy_carry_gradients(logits: torch.Tensor, target: torch.Tensor) -> None:
    output = cross_entropy(logits.requires_grad_(), target, **dict.fromkeys(RETURNS, True))
    requires_grad = {name: value.requires_grad for name, value in output._asdict().items()}
    assert requires_grad == {
        "loss": True,
        "lse": True,
        "entropy": True,
        "predicted_tokens": False,
        "token_accuracy": False,
    }


def test_entropy_of_equal_logits_is_log_of_their_number_and_of_one_class_zero(isa: str) -> None:
    for n_classes in (1, 27, 256, 1000):
        output = cross_entropy(torch.full((2, n_classes), 8.0), torch.zeros(2).long(), return_entropy=True)
        expected = torch.full((2,), math.log(n_classes))
        torch.testing.assert_close(output.entropy, expected, rtol=1e-6, atol=2e-6)


def test_a_masked_vocabulary_has_a_finite_entropy(isa: str) -> None:
    logits = torch.zeros(2, 27)
    logits[:, 4:] = -torch.inf
    output = cross_entropy(logits, torch.zeros(2).long(), return_entropy=True, return_lse=True)
    torch.testing.assert_close(output.entropy, torch.full((2,), math.log(4)))
    torch.testing.assert_close(output.lse, torch.full((2,), math.log(4)))


@pytest.mark.parametrize("n_classes", [2, 7, 27, 64, 65, 300, 4099])
def test_the_first_of_equal_largest_logits_is_predicted(n_classes: int, isa: str) -> None:
    logits = torch.zeros(n_classes, n_classes)
    logits += torch.eye(n_classes)  # row i: its largest logit at i, and once more at the end
    logits[:, -1] = 1
    output = cross_entropy(logits, torch.zeros(n_classes).long(), return_predicted_tokens=True)
    assert torch.equal(output.predicted_tokens, torch.arange(n_classes))


def test_token_accuracy_without_reduction_is_one_or_zero_and_zero_where_ignored() -> None:
    logits, target = torch.eye(4), torch.tensor([0, 2, -100, 3])
    output = cross_entropy(logits, target, reduction="none", return_token_accuracy=True)
    assert output.token_accuracy.tolist() == [1.0, 0.0, 0.0, 1.0]


def test_token_accuracy_leaves_out_an_ignored_class() -> None:
    logits, target = torch.eye(4), torch.tensor([0, 1, 2, 0])  # right, right, right and wrong
    options = {"ignore_index": 0, "return_token_accuracy": True}
    assert cross_entropy(logits, target, **options).token_accuracy.item() == 1.0
    rows = cross_entropy(logits, target, reduction="none", **options).token_accuracy
    assert rows.tolist() == [0.0, 1.0, 1.0, 0.0]


def test_token_accuracy_of_probabilities_compares_the_two_largest() -> None:
    logits, target = torch.eye(4), torch.eye(4)[[0, 2, 2, 3]]
    assert cross_entropy(logits, target, return_token_accuracy=True).token_accuracy.item() == 0.75


@pytest.mark.parametrize("options", [{}, {"lse_square_scale": 0.1}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("n_rows", [0, 3])
def test_a_mean_over_nothing_is_nan_or_by_choice_zero(options: dict, n_rows: int, isa: str) -> None:
    target = torch.full((n_rows,), -100)
    for all_ignored in ("nan", "zero"):
        logits = torch.randn(n_rows, 27, requires_grad=True)
        output = cross_entropy(logits, target, all_ignored=all_ignored, return_token_accuracy=True, **options)
        output.loss.backward()
        values = [output.loss.item(), output.token_accuracy.item()]
        assert values == [0.0, 0.0] if all_ignored == "zero" else all(map(math.isnan, values))
        assert logits.grad.tolist() == torch.zeros(n_rows, 27).tolist()


def test_all_ignored_zero_changes_nothing_where_a_target_counts(logits: torch.Tensor, target: torch.Tensor) -> None:
    loss, expected = cross_entropy(logits, target, all_ignored="zero"), cross_entropy(logits, target)
    torch.testing.assert_close(loss, expected)


def test_all_ignored_zero_leaves_zero_class_weights_nan() -> None:
    loss = cross_entropy(torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.zeros(5), all_ignored="zero")
    assert loss.isnan()


@pytest.mark.parametrize(
    ("options", "exception"),
    [
        ({"softcap": 0.0}, ValueError),
        ({"softcap": -1.0}, ValueError),
        ({"all_ignored": "none"}, ValueError),
        ({"inplace": "always"}, ValueError),
        ({"inplace": True}, ValueError),
        ({"inplace": "forward", "reduction": "none"}, ValueError),
        ({"token_weight": torch.ones(32)}, RuntimeError),
        ({"token_weight": torch.ones(33, 1)}, RuntimeError),
        ({"token_weight": torch.ones(33, requires_grad=True)}, RuntimeError),
    ],
    ids=str,
)
def test_a_bad_option_is_refused(options: dict, exception: type[Exception]) -> None:
    with pytest.raises(exception):
        cross_entropy(torch.randn(33, 27), torch.randint(27, (33,)), **options)


def test_an_infinite_weight_of_a_class_that_is_no_target_takes_no_part(isa: str) -> None:
    logits, target = torch.randn(5, 7, requires_grad=True), torch.tensor([0, 1, 2, 3, 0])
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, math.inf, 5.0, 6.0])
    loss = cross_entropy(logits, target, weight, lse_square_scale=0.1)
    (grad,) = torch.autograd.grad(loss, logits)
    assert math.isfinite(loss.item())
    assert grad.isfinite().all()
