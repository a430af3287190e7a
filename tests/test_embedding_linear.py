"""embedding_linear on every sample, dtype, plan and instruction set, against torch and float64."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from charlm import functional, nn, reference
from charlm.reference import INDEX_DTYPES
from charlm.testing import (
    FLOAT_DTYPES,
    SampleInput,
    assert_close_to_reference,
    assert_matches_reference,
    evaluate,
    sample_inputs_embedding_linear,
)

SAMPLES = [
    pytest.param(sample, id=f"{sample.name}-{dtype}".replace("torch.", ""))
    for dtype in FLOAT_DTYPES
    for sample in sample_inputs_embedding_linear(dtype)
]
ACTIVATIONS = ("none", "tanh", "relu", "gelu")
PLANS = ("folded", "gathered")


def _arguments(dtype: torch.dtype = torch.float64, n: int = 5) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """input (n, 3), C (7, 4), W (6, 12), b (6); the parameters require grad."""
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(7, (n, 3), generator=generator)
    shapes = ((7, 4), (6, 12), (6,))
    parameters = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return index, *(p.requires_grad_() for p in parameters)


@pytest.mark.covering
@pytest.mark.parametrize("sample", SAMPLES)
def test_results_and_gradients_are_as_close_to_float64_as_torchs(sample: SampleInput, isa: str) -> None:
    assert_matches_reference(functional.embedding_linear, reference.embedding_linear, sample)


@pytest.mark.parametrize("plan", PLANS)
def test_gradients_of_one_sign_of_many_contexts_are_as_close_to_float64_as_torchs(plan: str, isa: str) -> None:
    # So many blocks for columns and places that a thread of a GPU gets a thousand contexts.
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(256, (4000, 4), generator=generator)
    shapes = ((256, 1), (1056, 4), (1056,))
    parameters = [torch.rand(shape, generator=generator) for shape in shapes]
    grad = torch.rand(4000, 1056, generator=generator)
    ours = torch.ops.charlm._embedding_linear_backward(
        grad, index, *parameters[:2], grad, -1, 0, 1 + PLANS.index(plan), [True] * 3
    )
    expected = []
    for dtype in (torch.float32, torch.float64):
        copies = [p.to(dtype).requires_grad_() for p in parameters]
        expected.append(torch.autograd.grad(reference.embedding_linear(index, *copies), copies, grad.to(dtype)))
    for name, *grads in zip(("C", "W", "b"), ours, *expected, strict=True):
        assert_close_to_reference(*grads, name)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("dtype", INDEX_DTYPES, ids=str)
def test_every_integer_dtype_of_tokens_gives_the_int64_result(dtype: torch.dtype, plan: str) -> None:
    index, C, W, b = _arguments()
    expected = functional.embedding_linear(index, C, W, b, plan=plan)
    assert torch.equal(functional.embedding_linear(index.to(dtype), C, W, b, plan=plan), expected)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_derivatives_of_first_and_second_order(activation: str, plan: str) -> None:
    index, *parameters = _arguments()

    def op(*parameters: Tensor) -> Tensor:
        return functional.embedding_linear(index, *parameters, activation=activation, plan=plan)

    assert gradcheck(op, parameters)
    assert gradgradcheck(op, parameters)


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("needed", [0, 1, 2])
def test_one_gradient_alone_is_the_one_among_all(needed: int, plan: str) -> None:
    index, *parameters = _arguments(torch.float32, n=300)
    everything = torch.autograd.grad(functional.embedding_linear(index, *parameters, plan=plan).sum(), parameters)
    alone = [p if i == needed else p.detach() for i, p in enumerate(parameters)]
    (grad,) = torch.autograd.grad(functional.embedding_linear(index, *alone, plan=plan).sum(), alone[needed])
    assert torch.equal(grad, everything[needed])


@pytest.mark.covering(2)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("plan", PLANS)
def test_nan_and_infinity_come_out_as_torchs(plan: str, activation: str, isa: str) -> None:
    C = torch.tensor([[0.0], [torch.nan], [torch.inf], [-torch.inf], [3e38], [-1.0]])
    index, weight = torch.arange(6).view(6, 1), torch.ones(11, 1)
    ours = functional.embedding_linear(index, C, weight, activation=activation, plan=plan)
    # torch's float gelu of infinity is NaN where it has AVX-512; the gathered plan on CUDA calls it.
    theirs = [
        reference.embedding_linear(index, C.to(dtype), weight.to(dtype), activation=activation).float()
        for dtype in ((torch.float32, torch.float64) if isa == "emulated" else (torch.float64,))
    ]
    assert torch.stack([torch.isclose(ours, expected, equal_nan=True) for expected in theirs]).any(0).all()


@pytest.mark.parametrize("plan", PLANS)
def test_the_output_at_padding_idx_is_its_row_and_only_its_embedding_has_no_gradient(plan: str) -> None:
    C, W = torch.ones(3, 2, requires_grad=True), torch.ones(1, 4, requires_grad=True)
    output = functional.embedding_linear(torch.tensor([[1, 2]]), C, W, padding_idx=-2, plan=plan)
    output.sum().backward()
    assert output.tolist() == [[4.0]]
    assert C.grad.tolist() == [[0, 0], [0, 0], [1, 1]]
    assert W.grad.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_sums_do_not_depend_on_the_number_of_threads(threads: int, isa: str) -> None:
    # With D = 1 and numbers that float holds exactly, torch's GEMMs round nothing: what is left are our own sums.
    generator = torch.Generator().manual_seed(0)
    index = torch.randint(2, (9001, 2), generator=generator)
    C, W = torch.tensor([[1.0], [2.0]], requires_grad=True), torch.ones(40, 2, requires_grad=True)
    b = torch.randn(40, generator=generator).requires_grad_()
    cotangent = torch.randn(9001, 40, generator=generator)

    def results() -> tuple[Tensor, ...]:
        output = functional.embedding_linear(index, C, W, b, activation="tanh", plan="folded")
        return (output.detach(), *torch.autograd.grad(output, (W, b), cotangent))

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = results()
        torch.set_num_threads(threads)
        for ours, other in zip(results(), expected, strict=True):
            assert torch.equal(ours, other)
    finally:
        torch.set_num_threads(before)


def test_the_plan_is_folded_for_many_contexts_and_gathered_for_few() -> None:
    C, W = torch.zeros(256, 32), torch.zeros(256, 8 * 32)
    for n, expected in ((1, "gathered"), (65536, "folded")):
        output = functional.embedding_linear(torch.zeros(n, 8, dtype=torch.uint8), C, W, return_plan=True)
        assert (output.plan, output.backward_plan) == (expected, expected)
        assert output.output.shape == (n, 256)


def test_a_forced_plan_is_the_one_that_is_returned() -> None:
    index, C, W, b = _arguments()
    for plan in PLANS:
        output = functional.embedding_linear(index, C, W, b, plan=plan, return_plan=True)
        assert (output.plan, output.backward_plan) == (plan, plan)


# V, T, D on both sides of each limit of the GPU's paths: of what is computed in a block's shared memory (less
# for float64), of the tokens whose gradients are added there, and of the places that are added at a time.
BORDERS = {
    "most_dimensions": (64, 4, 87),
    "too_many_dimensions": (64, 4, 88),
    "most_rows_of_the_table": (27, 27, 1),
    "too_many_rows_of_the_table": (27, 28, 1),
    "most_rows_of_the_table_for_float64": (27, 13, 1),
    "too_many_rows_of_the_table_for_float64": (27, 14, 1),
    "most_tokens": (256, 2, 5),
    "too_many_tokens": (257, 2, 5),
    "largest_products_of_the_gradient": (256, 1, 58),
    "too_large_products_of_the_gradient": (256, 1, 59),
    **{f"{t}_places": (11, t, 3) for t in (1, 2, 3, 4, 5, 7, 8, 9, 16, 17)},
    **{f"{t}_places_of_many_tokens": (64, t, 3) for t in (3, 4, 5)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("border", BORDERS)
def test_both_sides_of_each_border_between_paths(border: str, dtype: torch.dtype) -> None:
    vocabulary, places, dim = BORDERS[border]
    for n, hidden, activation in ((1, 65, "none"), (37, 33, "tanh"), (210, 40, "gelu")):
        generator = torch.Generator().manual_seed(n)
        index = torch.randint(vocabulary, (n, places), generator=generator).to(torch.int32)
        shapes = ((vocabulary, dim), (hidden, places * dim), (hidden,))
        arguments: dict[str, Any] = {
            name: torch.randn(shape, generator=generator).mul_(0.5 * shape[-1] ** -0.5).to(dtype)
            for name, shape in zip(("embedding_weight", "linear_weight", "linear_bias"), shapes, strict=True)
        }
        names = tuple(arguments)
        arguments |= {"input": index, "activation": activation, "plan": "folded", "padding_idx": 1}
        sample = SampleInput(border, arguments, names, 64.0)
        assert_matches_reference(functional.embedding_linear, reference.embedding_linear, sample)


@pytest.mark.parametrize(("n", "places", "hidden"), [(300, 2, 2113), (600, 32, 512)])
def test_more_contexts_than_a_block_handles_at_a_time(n: int, places: int, hidden: int) -> None:
    generator = torch.Generator().manual_seed(n)
    index = torch.randint(27, (n, places), generator=generator).to(torch.uint8)
    shapes = ((27, 2), (hidden, 2 * places), (hidden,))
    parameters = [torch.randn(shape, generator=generator).div_(8).requires_grad_() for shape in shapes]
    cotangent = torch.randn(n, hidden, generator=generator)
    folded = functools.partial(functional.embedding_linear, plan="folded")
    results = []
    for op, dtype in (
        (folded, torch.float32),
        (reference.embedding_linear, torch.float32),
        (reference.embedding_linear, torch.float64),
    ):
        leaves = [p.detach().to(dtype).requires_grad_() for p in parameters]
        output = op(index, *leaves, activation="tanh")
        results.append((output.detach(), *torch.autograd.grad(output, leaves, cotangent.to(dtype))))
    for name, *values in zip(("output", "C", "W", "b"), *results, strict=True):
        assert_close_to_reference(*values, name)


def test_an_output_changed_in_place_before_backward_raises() -> None:
    index, C, W, b = _arguments()
    output = functional.embedding_linear(index, C, W, b, activation="tanh")
    with torch.no_grad():
        output.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("plan", PLANS)
def test_backward_twice_with_retain_graph_gives_the_same(plan: str) -> None:
    index, *parameters = _arguments(torch.float32)
    loss = functional.embedding_linear(index, *parameters, activation="gelu", plan=plan).square().sum()
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, parameters), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("plan", PLANS)
def test_autocast_computes_in_its_dtype_and_keeps_float32_gradients(plan: str) -> None:
    index, C, W, b = _arguments(torch.float32, n=64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = functional.embedding_linear(index, C, W, b, activation="tanh", plan=plan)
        theirs = torch.tanh(F.linear(F.embedding(index, C).flatten(-2), W, b))
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    ours.float().sum().backward()
    assert {p.grad.dtype for p in (C, W, b)} == {torch.float32}


def test_func_transforms_and_forward_mode_agree_with_torch() -> None:
    index, *parameters = (t.detach() for t in _arguments())

    def ours(C: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return functional.embedding_linear(index, C, W, b, activation="tanh").sum()

    def theirs(C: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return reference.embedding_linear(index, C, W, b, activation="tanh").sum()

    everything = (0, 1, 2)
    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        torch.testing.assert_close(transform(ours, everything)(*parameters), transform(theirs, everything)(*parameters))
    batch = torch.stack([parameters[0], 2 * parameters[0]])
    vmapped = torch.func.vmap(ours, (0, None, None))(batch, *parameters[1:])
    torch.testing.assert_close(vmapped, torch.stack([theirs(c, *parameters[1:]) for c in batch]))


@pytest.mark.covering
@pytest.mark.parametrize("plan", [0, 1, 2])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_opcheck(activation: str, plan: int) -> None:
    index, C, W, b = _arguments(torch.float32)
    number = ACTIVATIONS.index(activation)
    torch.library.opcheck(torch.ops.charlm.embedding_linear.default, (index, C, W, b, 2, number, plan))
    kept = torch.randn(5, 6)
    torch.library.opcheck(
        torch.ops.charlm._embedding_linear_backward.default,
        (kept, index, C.detach(), W.detach(), kept, 2, number, plan, [True, False, True]),
    )


@pytest.mark.parametrize(
    ("backend", "dynamic"),
    [("aot_eager", False), ("aot_eager", True), pytest.param("inductor", True, marks=pytest.mark.exhaustive)],
)
def test_compiles_without_a_graph_break(backend: str, dynamic: bool) -> None:
    torch._dynamo.reset()
    parameters = _arguments(torch.float32)[1:]

    @torch.compile(fullgraph=True, dynamic=dynamic, backend=backend)
    def step(index: Tensor, *parameters: Tensor) -> Tensor:
        return functional.embedding_linear(index, *parameters, activation="tanh").square().sum()

    for n in (5, 9, 300):
        index = torch.arange(3 * n).view(n, 3) % 7
        expected = reference.embedding_linear(index, *parameters, activation="tanh").square().sum()
        torch.testing.assert_close(step(index, *parameters), expected)
        ours = torch.autograd.grad(step(index, *parameters), parameters)
        for a, b in zip(ours, torch.autograd.grad(expected, parameters), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_exports_with_any_number_of_contexts() -> None:
    module = nn.EmbeddingLinear(7, 4, 3, 6, activation="relu")
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (torch.zeros(5, 3, dtype=torch.int64),), dynamic_shapes=({0: batch},))
    index = torch.arange(33).view(11, 3) % 7
    torch.testing.assert_close(program.module()(index), module(index))


BAD_SHAPES = [
    ((5,), (7, 4), (6, 11), None, r"T \* D = 5 \* 4 = 20 columns .* \[5\] .* \[7, 4\], got shape \[6, 11\]"),
    ((), (7, 4), (6, 4), None, r"input must have a dimension of places, shape \(..., T\), got a 0-d tensor"),
    ((5, 3), (7,), (6, 12), None, r"embedding_weight must be 2-D, \(V, D\), got shape \[7\]"),
    ((5, 3), (7, 4), (12,), None, r"linear_weight must be 2-D, \(H, T \* D\), got shape \[12\]"),
    ((5, 3), (7, 4), (6, 12), (5,), r"linear_bias must have shape \[6\] .* \[6, 12\], got shape \[5\]"),
]


@pytest.mark.parametrize("module", [functional, reference], ids=["functional", "reference"])
@pytest.mark.parametrize(("index", "embedding", "linear", "bias", "text"), BAD_SHAPES)
def test_shapes_that_do_not_fit_are_refused_with_the_shapes(
    module: Any, index: tuple[int, ...], embedding: tuple[int, ...], linear: tuple[int, ...], bias: Any, text: str
) -> None:
    arguments = (torch.zeros(index, dtype=torch.int64), torch.zeros(embedding), torch.zeros(linear))
    with pytest.raises(RuntimeError, match=text):
        module.embedding_linear(*arguments, None if bias is None else torch.zeros(bias))


@pytest.mark.parametrize("plan", PLANS)
def test_a_token_out_of_range_is_named_with_its_position(plan: str) -> None:
    index, C, W, b = _arguments()
    index[3, 1] = 7
    with pytest.raises(IndexError, match=r"index 7 at position \(3, 1\) is out of range for 7 embeddings"):
        functional.embedding_linear(index, C, W, b, plan=plan)


@pytest.mark.parametrize("plan", PLANS)
def test_the_backward_names_a_token_out_of_range_with_its_position(plan: str) -> None:
    index, C, W, _ = (t.detach() for t in _arguments())
    index[3, 1] = 7
    grad = torch.ones(5, 6, dtype=torch.float64)
    with pytest.raises(IndexError, match=r"index 7 at position \(3, 1\) is out of range for 7 embeddings"):
        torch.ops.charlm._embedding_linear_backward(grad, index, C, W, grad, -1, 0, 1 + PLANS.index(plan), [True] * 3)


def test_bad_options_and_dtypes_are_refused() -> None:
    index, C, W, b = _arguments(torch.float32)
    with pytest.raises(ValueError, match="activation must be one of none, tanh, relu, gelu, got 'sigmoid'"):
        functional.embedding_linear(index, C, W, b, activation="sigmoid")
    with pytest.raises(ValueError, match="plan must be one of auto, folded, gathered, got 'fast'"):
        nn.EmbeddingLinear(7, 4, 3, 6, plan="fast")
    with pytest.raises(AssertionError, match="padding_idx 7 must be within num_embeddings 7"):
        functional.embedding_linear(index, C, W, b, padding_idx=7)
    with pytest.raises(RuntimeError, match="expected input of an integer dtype"):
        functional.embedding_linear(index.float(), C, W, b)
    with pytest.raises(RuntimeError, match="must have the same dtype, got Float and Double"):
        functional.embedding_linear(index, C, W.double(), b)
    with pytest.raises(RuntimeError, match="must have the same dtype, got Float and Double"):
        functional.embedding_linear(index, C, W, b.double())
    with pytest.raises(NotImplementedError, match="not implemented for 'Int'"):
        functional.embedding_linear(index, C.detach().int(), W.detach().int())


def test_the_module_has_torchs_parameters_and_the_functions_result() -> None:
    torch.manual_seed(0)
    module = nn.EmbeddingLinear(27, 10, 3, 20, padding_idx=0, activation="gelu")
    assert [*module.state_dict()] == ["embedding.weight", "linear.weight", "linear.bias"]
    torch.manual_seed(0)
    theirs = torch.nn.Sequential(
        torch.nn.Embedding(27, 10, 0), torch.nn.Flatten(-2), torch.nn.Linear(30, 20), torch.nn.GELU()
    )
    index = torch.randint(27, (33, 3))
    torch.testing.assert_close(module(index), theirs(index))
    assert "activation='gelu'" in repr(module)


def test_a_subclass_with_torch_function_is_called(isa: str) -> None:
    class Logged(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(getattr(function, "__name__", ""))
            return super().__torch_function__(function, types, args, kwargs or {})

    names: list[str] = []
    index, C, W, b = (t.detach() for t in _arguments())
    output = functional.embedding_linear(index, C.as_subclass(Logged), W, b)
    assert names[0] == "embedding_linear"
    torch.testing.assert_close(torch.Tensor(output), functional.embedding_linear(index, C, W, b))


def test_saves_nothing_of_the_size_of_the_embedded_context() -> None:
    index, C, W, b = _arguments(torch.float32, n=64)
    saved: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        functional.embedding_linear(index, C, W, b, activation="tanh")
    assert sorted(saved) == sorted([index.numel(), C.numel(), W.numel(), b.numel(), 64 * 6])


def test_evaluate_sees_a_gradient_for_every_parameter() -> None:
    sample = next(s for s in sample_inputs_embedding_linear(torch.float32) if s.name == "names_folded")
    results = evaluate(functional.embedding_linear, sample)
    assert {name for name, value in results.items() if value.abs().sum() > 0} == {
        "output",
        "embedding_weight.grad",
        "linear_weight.grad",
        "linear_bias.grad",
    }
