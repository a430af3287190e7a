"""Tensor subclasses that implement torch's own ops only: they take the reference, and never an error."""

import os
import socket

import pytest
import torch
import torch.multiprocessing
from torch.distributed.tensor import Replicate, Shard, distribute_tensor, init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, loss_parallel, parallelize_module
from torch.utils._pytree import tree_map

import charlm
import charlm.functional as F
import charlm.nn

TARGET = torch.tensor([0, -100, -100, 1, 2, 3])


class QuantizedWeight(torch.Tensor):
    """int8 numbers and a scale; dequantized for every aten op. It knows no other ops, as torchao's weights do not."""

    @staticmethod
    def __new__(cls, numbers, scale):
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=scale.dtype)

    def __init__(self, numbers, scale):
        self.numbers, self.scale = numbers, scale

    def dequantize(self):
        return self.numbers.to(self.scale.dtype) * self.scale

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        if op.namespace != "aten":
            raise NotImplementedError(f"{op} is not an aten op")
        if op is torch.ops.aten.detach.default:
            return cls(args[0].numbers, args[0].scale)
        plain = tree_map(lambda x: x.dequantize() if isinstance(x, cls) else x, (args, kwargs or {}))
        return op(*plain[0], **plain[1])


def quantized(*shape):
    numbers = torch.randint(-127, 128, shape, generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    return QuantizedWeight(numbers, torch.tensor(0.01))


@pytest.mark.parametrize(
    "call",
    [
        lambda w: F.embedding(torch.tensor([1, 4]), w),
        lambda w: F.embedding(torch.tensor([1, 4], dtype=torch.uint8), w, padding_idx=-1),
        lambda w: F.cross_entropy(w, TARGET[:5].clamp(-100, 3), ignore_index=-100),
        lambda w: F.cross_entropy(w, torch.tensor([0, 1, 2, 3, 0]), softcap=2.0, return_entropy=True).entropy,
        lambda w: F.cross_entropy(torch.ones(2, 4), torch.tensor([0, 1]), weight=w[0]),
        lambda w: F.linear_cross_entropy(torch.ones(2, 4), w, torch.tensor([0, 1])),
        lambda w: F.embedding_linear(torch.tensor([[1, 4]]), w, torch.ones(3, 8), activation="tanh"),
        F.entropy,
        lambda w: F.kl_divergence(w, torch.zeros(5, 4)),
        lambda w: F.kl_divergence(torch.zeros(4), w),
        lambda w: F.surprisal(w, torch.tensor([0, 1, 2, 3, 0])),
    ],
)
def test_a_quantized_weight_gives_what_its_numbers_give(call):
    weight = quantized(5, 4)
    torch.testing.assert_close(call(weight), call(weight.dequantize()))


def test_patched_modules_keep_their_quantized_weights():
    model = torch.nn.Sequential(torch.nn.Embedding(5, 4), torch.nn.Linear(4, 5))
    model[0].weight = torch.nn.Parameter(quantized(5, 4), requires_grad=False)
    expected = model(torch.tensor([1, 4]))
    charlm.patch_model(model)
    assert type(model[0]) is charlm.nn.Embedding
    assert torch.equal(model(torch.tensor([1, 4])), expected)
    with charlm.patch_torch():
        assert torch.equal(model(torch.tensor([1, 4])), expected)


@pytest.mark.filterwarnings("ignore")
def test_torchs_quantized_tables_are_left_to_torch():
    tokens = torch.tensor([1, 4])
    table = torch.quantize_per_tensor(torch.randn(5, 4), 0.01, 0, torch.quint8)
    assert torch.equal(
        F.embedding(tokens, table).dequantize(), torch.nn.functional.embedding(tokens, table).dequantize()
    )


class Plain(torch.Tensor):
    """A subclass that changes nothing: torch calls each function on plain tensors and converts what it returns."""


def test_results_of_several_fields_are_rebuilt_for_a_subclass():
    logits, target = torch.randn(3, 5), torch.tensor([0, 4, 2])
    options = {"return_lse": True, "return_predicted_tokens": True}
    found = F.cross_entropy(logits.as_subclass(Plain), target, **options)
    expected = F.cross_entropy(logits, target, **options)
    assert type(found) is type(expected)
    assert [type(field) for field in found] == [Plain, Plain, type(None), Plain, type(None)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True) if b is not None)
    weight = torch.randn(5, 5)
    found = F.linear_cross_entropy(logits.as_subclass(Plain), weight, target, return_lse=True)
    assert torch.equal(found.lse, F.linear_cross_entropy(logits, weight, target, return_lse=True).lse)
    found = F.embedding_linear(target[:, None], weight.as_subclass(Plain), weight, return_plan=True)
    expected = F.embedding_linear(target[:, None], weight, weight, return_plan=True)
    assert torch.equal(found.output, expected.output)
    assert found[1:] == expected[1:]


def test_nested_indices_are_left_to_torch():
    tokens = torch.nested.nested_tensor([torch.tensor([0, 1]), torch.tensor([2, 3, 4])])
    table = torch.randn(5, 4)
    for ours, theirs in zip(
        F.embedding(tokens, table).unbind(), torch.nn.functional.embedding(tokens, table).unbind(), strict=True
    ):
        assert torch.equal(ours, theirs)


def test_fake_tensors_take_the_kernels():
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(3, 5, requires_grad=True)
        loss = F.cross_entropy(logits, torch.empty(3, dtype=torch.int64))
    assert "CrossEntropyBackward" in loss.grad_fn.name()


def compare(ours, expected):
    torch.testing.assert_close(ours.full_tensor() if hasattr(ours, "full_tensor") else ours, expected)


def losses(mesh):
    """Each case of cross_entropy: equal to one process on the whole batch, its gradient too."""
    torch.manual_seed(0)
    logits, class_weight, token_weight = torch.randn(6, 5), torch.rand(5), torch.rand(6)
    cases = [
        {},
        {"weight": class_weight},
        {"label_smoothing": 0.1},
        {"weight": class_weight, "label_smoothing": 0.1},
        {"reduction": "sum"},
        {"reduction": "none"},
        {"softcap": 2.0, "weight": class_weight},
        {"token_weight": token_weight},
        {"all_ignored": "zero", "lse_square_scale": 0.1},
    ]
    by_class = [{}, {"reduction": "sum"}, {"reduction": "none"}, {"logit_scale": 2.0}, {"token_weight": token_weight}]
    for placement, keywords in [(Shard(0), case) for case in cases] + [(Shard(1), case) for case in by_class]:
        one = logits.clone().requires_grad_()
        expected = F.cross_entropy(one, TARGET, **keywords)
        expected.sum().backward()
        rows = Shard(0) if placement == Shard(0) else Replicate()
        target = distribute_tensor(TARGET, mesh, [rows])
        placements = {"weight": Replicate(), "token_weight": rows}
        keywords = {
            name: distribute_tensor(value, mesh, [placements[name]]) if name in placements else value
            for name, value in keywords.items()
        }
        sharded = distribute_tensor(logits, mesh, [placement]).requires_grad_()

        def run(sharded=sharded, target=target, keywords=keywords):
            loss = F.cross_entropy(sharded, target, **keywords)
            loss.sum().backward()
            return loss

        if placement == Shard(0):
            loss = run()
        else:
            with loss_parallel():
                loss = run()
        compare(loss, expected)
        compare(sharded.grad, one.grad)
    for dtype in (torch.bfloat16, torch.float16):  # 70000 rows, whose sum float16 cannot hold
        rows, target = logits.to(dtype).repeat(11667, 1), TARGET.repeat(11667)
        loss = F.cross_entropy(distribute_tensor(rows, mesh, [Shard(0)]), distribute_tensor(target, mesh, [Shard(0)]))
        compare(loss, F.cross_entropy(rows, target))
    probabilities = torch.randn(6, 5).softmax(1)
    loss = F.cross_entropy(*(distribute_tensor(x, mesh, [Shard(0)]) for x in (logits, probabilities)))
    compare(loss, F.cross_entropy(logits, probabilities))


def tables(mesh):
    """Embedding tables split by rows and by columns."""
    tokens = torch.tensor([[0, 6], [3, 3]])
    for style in (RowwiseParallel(input_layouts=Replicate()), ColwiseParallel(output_layouts=Replicate())):
        one = torch.nn.Embedding(7, 4)
        table = torch.nn.Embedding.from_pretrained(one.weight.detach().clone(), freeze=False)
        table = parallelize_module(charlm.patch_model(table), mesh, style)
        factor = torch.arange(16.0).reshape(2, 2, 4)
        for module in (one, table):
            (module(tokens) * factor).sum().backward()
        compare(table(tokens), one(tokens))
        compare(table.weight.grad, one.weight.grad)


def others(mesh):
    logits = torch.randn(6, 5)
    sharded, target = distribute_tensor(logits, mesh, [Shard(0)]), distribute_tensor(TARGET, mesh, [Shard(0)])
    compare(F.entropy(sharded), F.entropy(logits))
    compare(F.kl_divergence(sharded, sharded * 2), F.kl_divergence(logits, logits * 2))
    compare(F.surprisal(sharded, target), F.surprisal(logits, TARGET))


def run_rank(rank, port):
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.manual_seed(1)
    mesh = init_device_mesh("cpu", (2,))
    for part in (losses, tables, others):
        part(mesh)
    torch.distributed.destroy_process_group()
    # A thread of gloo may still hold tensors of the last collective: while the interpreter is finalized it cannot
    # release their Python objects, and ends the process ("terminate called without an active exception").
    os._exit(0)


@pytest.mark.exhaustive
def test_dtensors_give_what_one_process_gives_on_the_whole_batch():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    torch.multiprocessing.spawn(run_rank, args=(port,), nprocs=2)
