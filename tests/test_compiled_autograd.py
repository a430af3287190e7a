"""Every op under torch._dynamo.compiled_autograd: the gradients of eager mode, bit for bit."""

import pytest
import torch
from torch._dynamo import compiled_autograd

import charlm.functional as F

N, V, D = 6, 5, 4


def sample(name):
    """Leaves that require grad, and a loss of them whose gradient is not 1."""
    generator = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    target, tokens = torch.tensor([0, 4, 2, -100, 1, 1]), torch.tensor([[0, 1], [4, 1], [3, 3]])
    weight = randn(V).abs()
    cross_entropies = {
        "cross_entropy": {},
        "cross_entropy none": {"reduction": "none"},
        "cross_entropy options": {"weight": weight, "label_smoothing": 0.1, "softcap": 2.0, "lse_square_scale": 0.1},
        "cross_entropy token_weight": {"token_weight": randn(N).abs(), "reduction": "sum"},
        "cross_entropy inplace backward": {"inplace": "backward", "weight": weight},
        "cross_entropy inplace forward": {"inplace": "forward", "label_smoothing": 0.1},
    }
    if name in cross_entropies:
        keywords = cross_entropies[name]
        return [randn(N, V)], lambda x: F.cross_entropy(x * 2, target, **keywords)
    cases = {
        "cross_entropy probabilities": (
            [randn(N, V), randn(N, V).softmax(1), weight],
            lambda x, p, w: F.cross_entropy(x, p, weight=w),
        ),
        "linear_cross_entropy": (
            [randn(N, D), randn(V, D), randn(V)],
            lambda x, w, b: F.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.1),
        ),
        "linear_cross_entropy none": (
            [randn(N, D), randn(V, D)],
            lambda x, w: F.linear_cross_entropy(x, w, target, reduction="none"),
        ),
        "embedding": ([randn(V, D)], lambda w: F.embedding(tokens, w, padding_idx=1)),
        "embedding by frequency": ([randn(V, D)], lambda w: F.embedding(tokens, w, scale_grad_by_freq=True)),
        "embedding sparse": ([randn(V, D)], lambda w: F.embedding(tokens, w, sparse=True)),
        "embedding_linear": (
            [randn(V, D), randn(3, 2 * D), randn(3)],
            lambda c, w, b: F.embedding_linear(tokens, c, w, b, activation="tanh"),
        ),
        "embedding_linear gelu": (
            [randn(V, D), randn(3, 2 * D)],
            lambda c, w: F.embedding_linear(tokens, c, w, activation="gelu", plan="folded"),
        ),
        "entropy": ([randn(N, V)], F.entropy),
        "kl_divergence": ([randn(N, V), randn(N, V)], F.kl_divergence),
        "kl_divergence probs": (
            [randn(N, V).softmax(1), randn(N, V)],
            lambda p, q: F.kl_divergence(p, q, p_kind="probs"),
        ),
        "surprisal": ([randn(N, V)], lambda x: F.surprisal(x, target)),
    }
    return cases[name]


CASES = [
    "cross_entropy",
    "cross_entropy none",
    "cross_entropy options",
    "cross_entropy token_weight",
    "cross_entropy inplace backward",
    "cross_entropy inplace forward",
    "cross_entropy probabilities",
    "linear_cross_entropy",
    "linear_cross_entropy none",
    "embedding",
    "embedding by frequency",
    "embedding sparse",
    "embedding_linear",
    "embedding_linear gelu",
    "entropy",
    "kl_divergence",
    "kl_divergence probs",
    "surprisal",
]


def gradients(name, backend=None):
    leaves, function = sample(name)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    loss = (output * torch.linspace(0.5, 3, output.numel()).reshape(output.shape)).sum()
    if backend is None:
        loss.backward()
    else:
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend=backend)):
            loss.backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("backend", [pytest.param("eager", marks=pytest.mark.exhaustive), "aot_eager"])
def test_compiled_autograd_gives_the_gradients_of_eager_mode(name, backend):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for ours, eager in zip(gradients(name, backend), gradients(name), strict=True):
        assert ours.is_sparse == eager.is_sparse
        assert torch.equal(ours.to_dense(), eager.to_dense())
    assert torch._dynamo.utils.counters["compiled_autograd"]["captures"] == 1


def test_a_second_backward_through_overwritten_logits_raises_under_compiled_autograd():
    x = torch.randn(3, 5, requires_grad=True)
    loss = F.cross_entropy(x * 2, torch.tensor([0, 1, 2]), inplace="forward")
    with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")):
        loss.backward(retain_graph=True)
        with pytest.raises(RuntimeError, match="only once"):
            loss.backward()


def test_another_batch_size_reuses_compiled_autograds_graph():
    torch._dynamo.reset()
    weight = torch.randn(5, 4, requires_grad=True)
    for n in (3, 7, 9):
        tokens = torch.arange(n) % 5
        expected = torch.zeros(5, 4).index_add_(0, tokens, torch.ones(n, 4))
        weight.grad = None
        with compiled_autograd._enable(lambda graph: torch.compile(graph, backend="aot_eager")):
            F.embedding(tokens, weight).sum().backward()
        assert torch.equal(weight.grad, expected)


@pytest.mark.parametrize("name", [name for name in CASES if "inplace" not in name and "sparse" not in name])
def test_double_backward_is_refused_by_name_and_never_wrong(name):
    torch._dynamo.reset()
    leaves, function = sample(name)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    output = function(*leaves)
    with (
        compiled_autograd._enable(lambda graph: torch.compile(graph, backend="eager")),
        pytest.raises(NotImplementedError, match=r"Backward has no double backward under compiled autograd"),
    ):
        torch.autograd.grad((output * output).sum(), leaves, create_graph=True)
