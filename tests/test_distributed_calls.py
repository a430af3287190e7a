"""Calls with DTensors: their collectives and bytes, the placements of results and gradients, errors, torch.compile."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import charlm.functional as F
from charlm import reference
from tests.sharding_support import Failures, check, no_reference, run_parts

if not torch.distributed.is_available():
    pytest.skip("this torch is built without torch.distributed", allow_module_level=True)

from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.debug import CommDebugMode

ROWS, CLASSES, WHOLE, SUM = Shard(0), Shard(1), Replicate(), Partial()
N, C, D = 7, 5, 4
LOGITS, INPUT, LAYER = torch.randn(3, N, max(C, D), generator=torch.Generator().manual_seed(0)).unbind()
LOGITS, INPUT, LAYER = LOGITS[:, :C], INPUT[:, :D], LAYER[:C, :D]
# int16, which torch's own ops refuse, and ignored rows of which the ranks have different numbers
TARGET = torch.tensor([0, -100, -100, 1, 2, 3, 4], dtype=torch.int16)
TOKENS = TARGET.clamp(min=0)
TOKEN_WEIGHT, CLASS_WEIGHT = torch.rand(2, N, generator=torch.Generator().manual_seed(1)).add(0.5).unbind()
CLASS_WEIGHT = CLASS_WEIGHT[:C]


class Traffic(CommDebugMode):
    """Counts collectives, and the bytes that a rank gives to them."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        before = self.get_total_counts()
        output = super().__torch_dispatch__(func, types, args, kwargs)
        if self.get_total_counts() > before:  # a tensor that is gathered into is larger than what is given
            self.n_bytes += min(x.nbytes for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, Tensor))
        return output

    def counts(self) -> dict[str, int]:
        found: Counter[str] = Counter()
        for op, n in self.get_comm_counts().items():
            name = "all_gather" if "all_gather" in str(op) or "allgather" in str(op) else "all_reduce"
            known = any(part in str(op) for part in ("all_reduce", "allreduce", "all_gather", "allgather"))
            found[name if known else str(op)] += n
        return dict(found)


# op; tensors and their placements; options; the collectives and bytes of forward, and those of backward; the placement
# of the result, and those of the gradients
Case = tuple[str, list[tuple[Tensor, Placement]], dict[str, Any], dict[str, int], int, dict[str, int], Placement, list]

LOSS = [(LOGITS, ROWS), (TARGET, ROWS)]
LINEAR = [(INPUT, ROWS), (LAYER, WHOLE), (TARGET, ROWS)]
BY_CLASS = [(LOGITS, CLASSES), (TARGET, WHOLE)]
ONE = {"all_reduce": 1}

CASES: list[Case] = [
    ("cross_entropy", LOSS, {}, ONE, 12, {}, WHOLE, [ROWS]),
    ("cross_entropy", LOSS, {"label_smoothing": 0.1, "all_ignored": "zero"}, ONE, 12, {}, WHOLE, [ROWS]),
    ("cross_entropy", LOSS, {"return_token_accuracy": True, "return_lse": True}, ONE, 16, {}, WHOLE, [ROWS]),
    ("cross_entropy", LOSS, {"reduction": "sum"}, {}, 0, {}, SUM, [ROWS]),
    ("cross_entropy", LOSS, {"reduction": "none"}, {}, 0, {}, ROWS, [ROWS]),
    ("cross_entropy", [(LOGITS, WHOLE), (TARGET, WHOLE)], {}, {}, 0, {}, WHOLE, [WHOLE]),
    ("cross_entropy", [(LOGITS, ROWS), (TARGET, WHOLE)], {}, ONE, 12, {}, WHOLE, [ROWS]),  # the target is cut
    ("cross_entropy", BY_CLASS, {}, {"all_gather": 1}, 12 * N, {}, WHOLE, [CLASSES]),
    ("cross_entropy", BY_CLASS, {"reduction": "none"}, {"all_gather": 1}, 12 * N, {}, WHOLE, [CLASSES]),
    ("linear_cross_entropy", LINEAR, {}, ONE, 12, {}, WHOLE, [ROWS, SUM]),
    ("linear_cross_entropy", LINEAR, {"reduction": "sum"}, {}, 0, {}, SUM, [ROWS, SUM]),
    ("linear_cross_entropy", LINEAR, {"reduction": "none"}, {}, 0, {}, ROWS, [ROWS, SUM]),
    (
        "linear_cross_entropy",
        [(INPUT, WHOLE), (LAYER, ROWS), (TARGET, WHOLE)],
        {},
        {"all_gather": 1},
        12 * N,
        ONE,
        WHOLE,
        [WHOLE, ROWS],
    ),
    ("embedding", [(TOKENS, ROWS), (LAYER, WHOLE)], {}, {}, 0, {}, ROWS, [SUM]),
    ("embedding", [(TOKENS, WHOLE), (LAYER, ROWS)], {"padding_idx": 1}, {}, 0, {}, SUM, [ROWS]),
    ("embedding", [(TOKENS, WHOLE), (LAYER, CLASSES)], {}, {}, 0, {}, Shard(1), [Shard(1)]),
    ("embedding_linear", [(TOKENS[:, None], ROWS), (LAYER, WHOLE), (INPUT, WHOLE)], {}, {}, 0, {}, ROWS, [SUM, SUM]),
    (
        "embedding_linear",
        [(TOKENS[:, None], WHOLE), (LAYER, WHOLE), (INPUT, ROWS)],
        {"activation": "tanh"},
        {},
        0,
        {},
        Shard(1),
        [SUM, ROWS],
    ),
    ("entropy", [(LOGITS, ROWS)], {}, {}, 0, {}, ROWS, [ROWS]),
    ("entropy", [(LOGITS, CLASSES)], {}, {"all_gather": 1}, 12 * N, {}, WHOLE, [CLASSES]),
    ("surprisal", LOSS, {}, {}, 0, {}, ROWS, [ROWS]),
    ("surprisal", BY_CLASS, {}, {"all_gather": 1}, 12 * N, {}, WHOLE, [CLASSES]),
    ("kl_divergence", [(LOGITS, CLASSES)] * 2, {}, {"all_gather": 1}, 24 * N, {}, WHOLE, [CLASSES] * 2),
    ("kl_divergence", [(LOGITS, ROWS), (LOGITS[0], WHOLE)], {}, {}, 0, {}, ROWS, [ROWS, SUM]),
    ("kl_div", [(LOGITS, ROWS)] * 2, {"log_target": True, "reduction": "batchmean"}, ONE, 4, {}, WHOLE, [ROWS] * 2),
    ("kl_div", [(LOGITS, CLASSES)] * 2, {"log_target": True, "reduction": "sum"}, {}, 0, {}, SUM, [CLASSES] * 2),
]  # fmt: skip


def placed(tensors: list[tuple[Tensor, Placement]], mesh: DeviceMesh) -> list[DTensor]:
    """Leaves; floating ones require grad."""
    found = [distribute_tensor(tensor.clone(), mesh, [placement], src_data_rank=None) for tensor, placement in tensors]
    return [x.requires_grad_() if x.is_floating_point() else x for x in found]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def run_case(case: Case, mesh: DeviceMesh) -> None:
    op, tensors, options, forward_counts, forward_bytes, backward_counts, result, gradients = case
    arguments = placed(tensors, mesh)
    with Traffic() as forward:
        output = first(getattr(F, op)(*arguments, **options))
    found = forward.counts(), forward.n_bytes
    assert found == (forward_counts, forward_bytes), f"forward: {found}"
    assert output.placements == (result,)
    total = output.to_local().sum()  # so that a result that is sharded takes no collective of its own
    with Traffic() as backward:
        total.backward()
    leaves = [x for x in arguments if x.requires_grad]
    gathers = [gathers_of_to_local(x) for x in leaves]
    allowed = dict(Counter(backward_counts) + Counter(all_gather=sum(gathers)))
    assert backward.counts() == allowed, f"backward: {backward.counts()}"
    found = [x.grad.placements[0] for x in leaves]
    assert found == [WHOLE if n else placement for n, placement in zip(gathers, gradients, strict=True)]
    plain = [x.clone().requires_grad_(x.is_floating_point()) for x, _ in tensors]
    expected = first(getattr(F, op)(*plain, **options))
    torch.testing.assert_close(output.full_tensor(), expected)


def gathers_of_to_local(leaf: DTensor) -> int:
    """The all-gathers of torch's own `to_local`, in backward: torch 2.11 gathers the gradient of uneven columns."""
    leaf = leaf.detach().requires_grad_()
    total = leaf.to_local().exp().sum()  # whose gradient is contiguous, as that of a kernel is
    with Traffic() as backward:
        total.backward()
    return backward.counts().get("all_gather", 0)


def collectives(failures: Failures, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for case in CASES:
        check(failures, f"{case[0]} {[p for _, p in case[1]]} {case[2]}", run_case, case, mesh)


def agree(call: Callable[..., Any], mesh: DeviceMesh, *tensors: tuple[Tensor, Placement], **options: Any) -> None:
    """What `call` gives for DTensors is what it gives for the whole tensors; gradients too."""
    arguments = placed(list(tensors), mesh)
    plain = [x.clone().requires_grad_(x.is_floating_point()) for x, _ in tensors]
    found, expected = (first(call(*xs, **options)) for xs in (arguments, plain))
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found.full_tensor(), expected, equal_nan=True)
    for loss in (found.full_tensor(), expected):
        if loss.requires_grad:
            loss.sum().backward()
    for x, one in zip(arguments, plain, strict=True):
        if x.requires_grad and one.grad is not None:
            torch.testing.assert_close(x.grad.full_tensor(), one.grad, equal_nan=True)


def other_calls(failures: Failures, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    rows = (LOGITS, ROWS)

    def run(name: str, *args: Any, **options: Any) -> None:
        check(failures, name, lambda: agree(args[0], mesh, *args[1:], **options))

    run(
        "a plain target and plain weights",
        lambda x: F.cross_entropy(x, TARGET, CLASS_WEIGHT, token_weight=TOKEN_WEIGHT),
        rows,
    )
    run("a plain table", lambda i: F.embedding(i, LAYER), (TOKENS, ROWS))
    run("a plain layer", lambda x: F.linear_cross_entropy(x, LAYER, TARGET, linear_bias=CLASS_WEIGHT), (INPUT, ROWS))
    run("sum and accuracy", lambda x: F.cross_entropy(x, TARGET, reduction="sum", return_token_accuracy=True)[4], rows)
    linear = ((INPUT, ROWS), (LAYER, WHOLE), (TARGET, ROWS))
    for reduction in ("sum", "mean"):
        name, options = f"accuracy of a layer, {reduction}", {"reduction": reduction, "return_token_accuracy": True}
        run(name, lambda *xs, **options: F.linear_cross_entropy(*xs, **options)[4], *linear, **options)
    run("all ignored", F.cross_entropy, rows, (torch.full((N,), -100), ROWS))
    run("all ignored, zero", F.cross_entropy, rows, (torch.full((N,), -100), ROWS), all_ignored="zero")
    run("inplace has no effect", lambda x, t: F.cross_entropy(x * 2, t, inplace="forward"), rows, (TARGET, ROWS))
    run("legacy reduction", F.cross_entropy, rows, (TARGET, ROWS), size_average=False)
    sequences, targets = INPUT[:6].reshape(2, 3, D), TARGET[1:].reshape(2, 3)
    for reduction in ("none", "sum", "mean"):
        for options in ({}, {"weight": CLASS_WEIGHT}, {"token_weight": TOKEN_WEIGHT[:6].reshape(2, 3)}):
            call = functools.partial(F.linear_cross_entropy, shift=True, reduction=reduction, **options)
            for layer in (WHOLE, ROWS):  # by class, torch's ops shift the DTensors
                batch = ROWS if layer == WHOLE else WHOLE
                name = f"shift {reduction} {layer} {list(options)}"
                run(name, call, (sequences, batch), (LAYER, layer), (targets, batch))

    def by_parts(x: Tensor) -> Tensor:
        return F.cross_entropy(x * 2, TARGET) + F.entropy(x).sum() + F.surprisal(x, TOKENS).sum()

    run("several uses of the logits", by_parts, rows)
    if torch.__version__ >= "2.13":  # torch 2.11 loses the second derivative of its own to_local
        run("a second derivative", lambda x: slope(F.entropy(x).sum(), x).square(), rows)
    for dtype in (torch.bfloat16, torch.float16):
        run(f"autocast {dtype}", under_autocast, (LOGITS.to(dtype), ROWS), (TARGET, ROWS))
    many = ((LOGITS.half().repeat(9001, 1), ROWS), (TARGET.repeat(9001), ROWS))
    run("a sum that float16 cannot hold", F.cross_entropy, *many)


def slope(y: Tensor, x: Tensor) -> Tensor:
    return torch.autograd.grad(y, x, create_graph=True)[0]


def under_autocast(x: Tensor, target: Tensor) -> Tensor:
    with torch.autocast("cpu", x.dtype):
        return F.cross_entropy(x, target)


def pending(failures: Failures, world: int) -> None:
    """Logits and tokens that an asynchronous collective still gathers."""
    mesh = init_device_mesh("cpu", (world,))

    def call() -> None:
        x, target = placed([(LOGITS, ROWS), (TARGET.long(), ROWS)], mesh)
        whole, tokens = (t.redistribute(placements=[WHOLE], async_op=True) for t in (x, target))
        with no_reference():
            F.cross_entropy(whole, tokens).backward()
        one = LOGITS.clone().requires_grad_()
        F.cross_entropy(one, TARGET).backward()
        torch.testing.assert_close(x.grad.full_tensor(), one.grad)

    check(failures, "pending", call)


LEFT_TO_TORCH: list[tuple[str, list[tuple[Tensor, Placement]], dict[str, Any]]] = [
    ("kl_divergence", [(LOGITS, CLASSES), (LOGITS, CLASSES)], {"p_kind": "log_probs", "q_kind": "log_probs"}),
    ("cross_entropy", [(LOGITS, CLASSES), (LOGITS.softmax(1), CLASSES)], {"reduction": "none"}),
    ("cross_entropy", [(LOGITS, SUM), (TARGET, WHOLE)], {}),
    ("cross_entropy", [(LOGITS, WHOLE), (TARGET, ROWS)], {"reduction": "sum"}),
    ("embedding", [(TOKENS, WHOLE), (LAYER, ROWS)], {"scale_grad_by_freq": True}),
    ("embedding", [(TOKENS, ROWS), (LAYER, ROWS)], {}),
    ("embedding", [(TOKENS, WHOLE), (LAYER, WHOLE)], {"sparse": True}),
    ("embedding", [(TOKENS, WHOLE), (LAYER, ROWS)], {"max_norm": 1.0}),
    ("linear_cross_entropy", [(INPUT, CLASSES), (LAYER, CLASSES), (TARGET, WHOLE)], {}),
]


def as_torch(case: tuple[str, list[tuple[Tensor, Placement]], dict[str, Any]], mesh: DeviceMesh) -> None:
    """The same result, placement, collectives and bytes, or the same error, as by the reference."""
    op, tensors, options = case
    found = []
    for module in (F, reference):
        arguments = placed([(x, WHOLE if p == SUM else p) for x, p in tensors], mesh)
        arguments = [
            DTensor.from_local(x.to_local() / mesh.size(), mesh, [SUM]) if p == SUM else x
            for x, (_, p) in zip(arguments, tensors, strict=True)
        ]
        with Traffic() as traffic:
            try:
                output = getattr(module, op)(*arguments, **options)
                whole = output.full_tensor()  # once: torch loses the mask of a table divided by rows
                whole.sum().backward()
                result: Any = (output.placements, whole.detach(), [x.grad for x in arguments])
            except (NotImplementedError, RuntimeError) as error:
                result = type(error)
        found.append((result, traffic.counts(), traffic.n_bytes))
    ours, theirs = found
    assert ours[1:] == theirs[1:]
    if not isinstance(theirs[0], tuple):
        assert ours[0] is theirs[0]
        return
    assert ours[0][0] == theirs[0][0]
    torch.testing.assert_close(ours[0][1:], theirs[0][1:])


def left_to_torch(failures: Failures, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))
    for case in LEFT_TO_TORCH:
        check(failures, f"{case[0]} {[p for _, p in case[1]]} {case[2]}", as_torch, case, mesh)


def errors(failures: Failures, world: int) -> None:
    mesh = init_device_mesh("cpu", (world,))

    def message(error: type[Exception], call: Callable[[], Any], text: str) -> None:
        with pytest.raises(error, match=text):
            call()

    def whole(tensor: Tensor) -> DTensor:
        return distribute_tensor(tensor, mesh, [WHOLE], src_data_rank=None)

    logits, layer = (distribute_tensor(x, mesh, [ROWS]) for x in (LOGITS, LAYER))
    indices = whole(torch.tensor([0, 4, 5]))
    cases = {
        "an index outside the whole table": (
            IndexError,
            lambda: F.embedding(indices, layer),
            r"index 5 at position \(2,\) is out of range for 5 embeddings",
        ),
        "a negative index": (
            IndexError,
            lambda: F.embedding(whole(torch.tensor([-1])), layer),
            r"index -1 at position \(0,\) is out of range for 5 embeddings",
        ),
        "a target outside the classes": (
            IndexError,
            lambda: F.cross_entropy(logits, whole(torch.full((N,), 9)), reduction="none"),
            "target 9 at position .* is out of range for 5 classes",
        ),
        "a target outside the classes, of one process": (
            IndexError,
            lambda: F.cross_entropy(logits, distribute_tensor(torch.tensor([9] + [0] * (N - 1)), mesh, [ROWS])),
            "target 9 at position" if mesh.get_local_rank() == 0 else "a target of another process is out of range",
        ),
        "an unknown reduction": (ValueError, lambda: F.cross_entropy(logits, whole(TARGET), reduction="x"), "x"),
        "another number of targets": (ValueError, lambda: F.cross_entropy(logits, TARGET[:4]), "batch_size"),
        "rows that may differ between processes, a table": (RuntimeError, lambda: F.embedding(TOKENS, layer), "mixed"),
        "rows that may differ between processes, a layer": (
            RuntimeError,
            lambda: F.linear_cross_entropy(INPUT, layer, TARGET),
            "mixed",
        ),
        "a negative probability": (
            ValueError,
            lambda: F.kl_divergence(
                *(distribute_tensor(x, mesh, [CLASSES]) for x in (LOGITS, -LOGITS.exp())), q_kind="probs"
            ),
            r"q must hold probabilities, but is -.* at position \(0, 0\)",
        ),
        "a loss_dtype": (
            ValueError,
            lambda: F.cross_entropy(logits, whole(TARGET), loss_dtype=torch.float16),
            "loss_dtype must be",
        ),
        "a shift beyond the sequence": (
            ValueError,
            lambda: F.linear_cross_entropy(whole(INPUT), whole(LAYER), whole(TARGET), shift=N),
            "shift must be in",
        ),
    }
    for name, case in cases.items():
        check(failures, name, message, *case)


def compiled(failures: Failures, world: int, step: int = 8) -> None:
    mesh = init_device_mesh("cpu", (world,))

    def call(case: Case) -> None:
        op, tensors, options = case[:3]
        torch._dynamo.reset()

        def function(*arguments: Tensor) -> Tensor:
            return first(getattr(F, op)(*arguments, **options))

        fast = torch.compile(function, backend="aot_eager", fullgraph=True)
        results = []
        for each in (fast, function):
            arguments = placed(tensors, mesh)
            output = each(*arguments)
            output.to_local().sum().backward()
            results.append((output.placements, output.full_tensor(), [x.grad for x in arguments]))
        assert results[0][0] == results[1][0]
        torch.testing.assert_close(results[0][1:], results[1][1:])

    for case in CASES[::step]:
        check(failures, f"{case[0]} {[p for _, p in case[1]]} {case[2]}", call, case)


def all_compiled(failures: Failures, world: int) -> None:
    compiled(failures, world, step=1)


PARTS = [collectives, other_calls, pending, left_to_torch, errors, compiled]


@pytest.mark.exhaustive
def test_calls_on_two_processes(tmp_path: Path) -> None:
    for part, failures in run_parts(PARTS, 2, tmp_path).items():
        assert failures == {}, part


@pytest.mark.exhaustive
def test_every_call_compiles_on_two_processes(tmp_path: Path) -> None:
    assert run_parts([all_compiled], 2, tmp_path) == {"all_compiled": {}}
