"""Random calls of every op against plain formulas in float64: `python -m tests.fuzz --seconds 600 --seed 1`.

A case draws shapes, dtypes, layouts, special values and options. Its result and gradients are compared with a formula
that is written here, in torch's simplest ops and float64, and that shares nothing with `charlm.reference`. They must
also have the same bits with one thread and with two. Every few cases a call with wrong arguments is made: what torch's
own function refuses, ours must refuse with the same type of error.

The bound of an error: four times that of the same formula in the dtype of the arithmetic, which knows how well the
numbers are conditioned, plus one rounding to the result's dtype, plus 16 roundings of the largest number involved. (In
float64 the formula is what is compared with, so its error there is taken to be that in float32, times the ratio of the
two precisions.) What exceeds that is judged again by the formula's largest error on 16 neighbours of the tensors, a few
roundings away: its error on one sample can be small by luck.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as torchs
from torch import Tensor

import charlm.functional as F

FLOATS = (torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16)
INDICES = (torch.int64, torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8, torch.uint16, torch.uint32)
INPLACE_REFUSALS = ("may overlap", "may share memory", "reduction", "of one dtype")


@dataclass
class Case:
    """A call of ours, and the formula of the same: both take the tensors by name, and options are in their closures."""

    op: str
    call: Callable[..., Tensor]
    formula: Callable[..., Tensor]
    tensors: dict[str, Tensor]
    differentiable: list[str]
    options: dict[str, Any] = field(default_factory=dict)
    scale: float = 1.0  # the largest number involved beside inputs and results
    rounds_between: bool = False  # between its layers, to the dtype of the inputs, as torch's composition does

    def __str__(self) -> str:
        shown = {name: f"{str(t.dtype)[6:]}{list(t.shape)}/{t.stride()}" for name, t in self.tensors.items()}
        return f"{self.op} {shown} {self.options} grad of {self.differentiable}"


class Draw:
    """The random choices of one case."""

    def __init__(self, seed: int, number: int) -> None:
        self.random = random.Random(f"{seed}/{number}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(60))

    def maybe(self, share: float = 0.5) -> bool:
        return self.random.random() < share

    def one(self, *choices: Any) -> Any:
        return self.random.choice(choices)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def logits(self, shape: tuple[int, ...], dtype: torch.dtype, special: bool = True) -> Tensor:
        x = self.normal(*shape) * self.one(0.1, 1, 3, 10) + self.one(0, 0, 0, 100)
        if special and self.maybe(0.1) and x.numel():
            x = torch.where(torch.rand(shape, generator=self.generator) < 0.2, -math.inf, x)
        return self.layout(x.to(dtype))

    def layout(self, x: Tensor) -> Tensor:
        """The same shape in other memory; an expanded or overlapping layout repeats some of the values."""
        kind = self.one("contiguous", "contiguous", "transposed", "sliced", "strided", "expanded", "overlapping")
        if x.dim() == 0 or x.numel() == 0 or kind == "contiguous":
            return x
        d = self.random.randrange(x.dim())
        if kind == "transposed":
            return x.transpose(0, d).contiguous().transpose(0, d)
        if kind == "sliced":
            return torch.cat([x, x], d).narrow(d, 1 if x.size(d) > 1 else 0, x.size(d))
        if kind == "strided":
            return torch.stack([x, x], -1)[..., 0]
        if kind == "expanded":
            return x.narrow(d, 0, 1).expand(x.shape)
        if x.dim() == 2:
            return x.flatten().as_strided(x.shape, (max(1, x.size(1) // 2), 1))
        return x

    def sizes(self) -> tuple[int, int]:
        n = self.one(0, 1, 2, 3, 7, 16, 33, 64, 100)
        return n, self.one(1, 2, 5, 15, 16, 17, 27, 64, 65, 100, 257, 1025)

    def indices(self, limit: int, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> Tensor:
        dtype = dtype or self.one(*INDICES)
        limit = min(limit, torch.iinfo(dtype).max)
        return torch.randint(0, max(1, limit), shape, generator=self.generator).to(dtype)


# -------------------------------------------------------------------------------------------------- formulas


def computed(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def transformed(x: Tensor, o: dict[str, Any]) -> Tensor:
    """The scaled and capped logits, (..., C)."""
    z = x * o["logit_scale"]
    if o["softcap"] not in (None, math.inf):
        z = o["softcap"] * torch.tanh(z / o["softcap"])
    return z.movedim(0 if x.dim() == 1 else 1, -1)


def cross_entropy_formula(x: Tensor, y: Tensor, w: Tensor | None, t: Tensor | None, o: dict[str, Any]) -> Tensor:
    dim = 0 if x.dim() == 1 else 1
    z = transformed(x, o)
    n_classes, smoothing = x.size(dim), o["label_smoothing"]
    if not y.is_floating_point():  # an ignored row counts for nothing, whatever its logits are: no gradient, no NaN
        z = torch.where((y.long() != o["ignore_index"]).reshape(z.shape[:-1]).unsqueeze(-1), z, 0)
    lse = z.logsumexp(-1)
    minus_log_p = lse.unsqueeze(-1) - z
    class_weight = torch.ones(n_classes, dtype=z.dtype) if w is None else w
    if y.is_floating_point():
        p = y.movedim(dim, -1) * (1 - smoothing) + smoothing / n_classes
        weighted = torch.where(p * class_weight == 0, 0 * p, p * class_weight * minus_log_p)
        loss, share, valid = weighted.sum(-1), torch.ones_like(lse), torch.ones_like(lse, dtype=torch.bool)
        penalty = torch.ones_like(lse)
    else:
        index = y.long().reshape(lse.shape)
        valid = index != o["ignore_index"]
        index = torch.where(valid, index, 0)
        penalty = class_weight[index]
        share = torch.where(valid, penalty, 0)
        loss = (1 - smoothing) * penalty * minus_log_p.gather(-1, index.unsqueeze(-1)).squeeze(-1)
        if smoothing > 0:
            loss = loss + smoothing / n_classes * (class_weight * minus_log_p).sum(-1)
    if o["lse_square_scale"]:
        loss = loss + o["lse_square_scale"] * penalty * lse.square()
    loss = torch.where(valid, loss, 0)
    if t is not None:
        loss, share = loss * t.reshape(loss.shape), share * t.reshape(loss.shape)
    if o["reduction"] == "none":
        return loss
    if o["reduction"] == "sum":
        return loss.sum()
    if o["all_ignored"] == "zero" and not valid.any():
        return loss.sum()
    return loss.sum() / share.sum()


def entropy_formula(logits: Tensor) -> Tensor:
    log_p = logits - logits.logsumexp(-1, keepdim=True)
    return -torch.where(log_p == -math.inf, 0, log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)


def with_metrics(loss: Tensor, lse: Tensor, entropy: Tensor) -> Tensor:
    """One number whose gradient holds those of the loss, of lse and of entropy."""
    return loss.sum() + 0.5 * lse.sum() - 0.25 * entropy.sum()


def log_of(x: Tensor, kind: str) -> Tensor:
    if kind == "logits":
        return x - x.logsumexp(-1, keepdim=True)
    return x if kind == "log_probs" else x.log()


def activate(x: Tensor, name: str) -> Tensor:
    return {"none": lambda x: x, "tanh": torch.tanh, "relu": torch.relu, "gelu": torchs.gelu}[name](x)


# ----------------------------------------------------------------------------------------------------- cases


def draw_cross_entropy_options(draw: Draw, dtype: torch.dtype, probabilities: bool, inplace: bool) -> dict[str, Any]:
    options = {
        "reduction": draw.one("mean", "mean", "sum", "none"),
        "ignore_index": -100 if probabilities else draw.one(-100, -100, 0, 1),
        "label_smoothing": draw.one(0.0, 0.0, 0.1, 1.0),
        "lse_square_scale": draw.one(0.0, 0.0, 0.01),
        "softcap": draw.one(None, None, 5.0, 1e-50, 1e39, math.inf),
        "logit_scale": draw.one(1.0, 1.0, 0.5, 2),
        "all_ignored": draw.one("nan", "zero"),
    }
    if options["softcap"] is not None and not 1e-30 < options["softcap"] < 1e30:
        options["label_smoothing"] = options["lse_square_scale"] = 0.0
    if draw.maybe(0.3):
        options["loss_dtype"] = computed(dtype)
    if inplace:
        options["inplace"] = draw.one("backward", "forward")
    return options


def cross_entropy(draw: Draw) -> Case:
    dtype = draw.one(*FLOATS)
    n, n_classes = draw.sizes()
    shape = draw.one((n, n_classes), (n, n_classes), (n_classes,), (n, n_classes, 3), (n, n_classes, 2, 2))
    probabilities, inplace = draw.maybe(0.25), draw.maybe(0.3)
    options = draw_cross_entropy_options(draw, dtype, probabilities, inplace)
    places = shape[:1] + shape[2:] if len(shape) > 1 else ()
    # A logit of -inf under a large cap is a number beside which no other counts.
    metrics = not inplace and draw.maybe(0.3)
    special = (
        not probabilities and not metrics and options["label_smoothing"] == 0 and options["softcap"] in (None, 5.0)
    )
    x = draw.logits(shape, dtype, special)
    tensors = {"x": x}
    if probabilities:
        tensors["y"] = draw.layout(draw.normal(*shape).softmax(0 if len(shape) == 1 else 1).to(dtype))
    else:
        y = draw.indices(n_classes, places)
        if draw.maybe() and options["ignore_index"] == -100 and y.dtype.is_signed and y.numel():
            y = torch.where(torch.rand(places, generator=draw.generator) < draw.one(0.2, 0.2, 1.1), -100, y).to(y.dtype)
        tensors["y"] = draw.layout(y)
    if draw.maybe(0.3):
        weight_dtype = dtype if probabilities else draw.one(dtype, computed(dtype))
        tensors["w"] = draw.layout((draw.normal(n_classes).abs() + 0.1).to(weight_dtype))
    if draw.maybe(0.3):
        tensors["t"] = draw.layout(draw.normal(*places).abs() + 0.1)

    def call(x: Tensor, y: Tensor, w: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        logits = x
        if inplace and x.requires_grad:  # no leaf, in memory of the drawn layout
            logits = (x * 1).as_strided(x.shape, x.stride()) if x.numel() and dense(x) else x * 1
        if not metrics:
            return F.cross_entropy(logits, y, w, token_weight=t, **options)
        returned = {"return_lse": True, "return_entropy": True, "loss_dtype": computed(dtype)}
        return with_metrics(*F.cross_entropy(logits, y, w, token_weight=t, **options | returned)[:3])

    def formula(x: Tensor, y: Tensor, w: Tensor | None = None, t: Tensor | None = None) -> Tensor:
        loss = cross_entropy_formula(x, y, w, t, options)
        z = transformed(x, options)
        return with_metrics(loss, z.logsumexp(-1), entropy_formula(z)) if metrics else loss

    differentiable = ["x", "y"] if probabilities and not inplace and draw.maybe() else ["x"]
    return Case("cross_entropy", call, formula, tensors, differentiable, options, largest(x) + math.log(n_classes + 1))


def dense(x: Tensor) -> bool:
    return x.is_contiguous() or x.transpose(0, -1).is_contiguous()


def linear_cross_entropy(draw: Draw) -> Case:
    dtype = draw.one(*FLOATS)
    n, n_classes = draw.sizes()
    width = draw.one(1, 3, 16, 33)
    options = draw_cross_entropy_options(draw, dtype, False, False)
    x, w = draw.layout(draw.normal(n, width).to(dtype)), draw.layout(draw.normal(n_classes, width).to(dtype))
    tensors = {"x": x, "w": w, "y": draw.indices(n_classes, (n,))}
    if draw.maybe():
        tensors["b"] = draw.normal(n_classes).to(dtype)
    metrics = draw.maybe(0.3)

    def call(x: Tensor, w: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        if not metrics:
            return F.linear_cross_entropy(x, w, y, linear_bias=b, **options)
        returned = {"return_lse": True, "return_entropy": True, "loss_dtype": computed(dtype)}
        return with_metrics(*F.linear_cross_entropy(x, w, y, linear_bias=b, **options | returned)[:3])

    def formula(x: Tensor, w: Tensor, y: Tensor, b: Tensor | None = None) -> Tensor:
        logits = x @ w.T if b is None else x @ w.T + b
        loss, z = cross_entropy_formula(logits, y, None, None, options), transformed(logits, options)
        return with_metrics(loss, z.logsumexp(-1), entropy_formula(z)) if metrics else loss

    scale = 1 + largest(x) * largest(w) * width + 2 * (largest(x) + largest(w)) * math.sqrt(max(1, n, n_classes))
    grads = ["x", "w", *(["b"] * ("b" in tensors))]
    return Case("linear_cross_entropy", call, formula, tensors, grads, options, scale, rounds_between=True)


def embedding(draw: Draw) -> Case:
    size, width = draw.one(1, 2, 27, 65, 300), draw.one(1, 3, 10, 64)
    shape = draw.one((), (5,), (0,), (7, 3), (100,), (2, 3, 4))
    padding_idx = draw.one(None, None, 0, -1)
    options = {"padding_idx": padding_idx, "scale_grad_by_freq": draw.maybe(0.2)}
    tensors = {"weight": draw.layout(draw.normal(size, width).to(draw.one(*FLOATS)))}
    tensors["index"] = draw.layout(draw.indices(size, shape))

    def formula(weight: Tensor, index: Tensor) -> Tensor:
        rows = weight[index.long()]
        if padding_idx is not None:
            keep = (index.long() != padding_idx % size).unsqueeze(-1)
            rows = torch.where(keep, rows, rows.detach())
        if options["scale_grad_by_freq"]:
            counts = torch.bincount(index.long().flatten(), minlength=size)[index.long()].unsqueeze(-1)
            rows = rows.detach() + (rows - rows.detach()) / counts
        return rows

    return Case(
        "embedding", lambda weight, index: F.embedding(index, weight, **options), formula, tensors, ["weight"], options
    )


def embedding_linear(draw: Draw) -> Case:
    size, width, places, hidden = draw.one(1, 5, 27), draw.one(1, 8, 10), draw.one(1, 3, 8), draw.one(1, 16, 33)
    n, dtype = draw.one(0, 1, 5, 100, 300), draw.one(*FLOATS)
    options = {"activation": draw.one("none", "tanh", "relu", "gelu"), "plan": draw.one("auto", "folded", "gathered")}
    tensors = {
        "c": draw.layout(draw.normal(size, width).to(dtype)),
        "w": draw.layout(draw.normal(hidden, places * width).to(dtype)),
        "index": draw.indices(size, (n, places)),
    }
    if draw.maybe():
        tensors["b"] = draw.normal(hidden).to(dtype)

    def call(c: Tensor, w: Tensor, index: Tensor, b: Tensor | None = None) -> Tensor:
        return F.embedding_linear(index, c, w, b, **options)

    def formula(c: Tensor, w: Tensor, index: Tensor, b: Tensor | None = None) -> Tensor:
        sums = c[index.long()].flatten(-2) @ w.T
        return activate(sums if b is None else sums + b, options["activation"])

    grads = ["c", "w", *(["b"] * ("b" in tensors))]
    # A gradient is a sum of so many terms, of either sign: the roundings of its partial sums grow as their root.
    terms = max(1, n) * places * max(width, hidden)
    scale = 2 * (1 + largest(tensors["c"]) + largest(tensors["w"])) * math.sqrt(terms)
    return Case("embedding_linear", call, formula, tensors, grads, options, scale, rounds_between=True)


def entropy(draw: Draw) -> Case:
    n, n_classes = draw.sizes()
    shape = draw.one((n, n_classes), (n_classes,), (2, n, n_classes))
    x = draw.logits(shape, draw.one(*FLOATS))
    return Case("entropy", F.entropy, entropy_formula, {"logits": x}, ["logits"], {}, largest(x))


def as_kind(logits: Tensor, kind: str) -> Tensor:
    return {"logits": logits, "log_probs": logits.log_softmax(-1), "probs": logits.softmax(-1)}[kind]


def kl_divergence(draw: Draw) -> Case:
    n, n_classes = draw.sizes()
    dtype = draw.one(*FLOATS)
    kinds = {"p_kind": draw.one("logits", "log_probs", "probs"), "q_kind": draw.one("logits", "log_probs", "probs")}
    p, q = (draw.layout(as_kind(draw.normal(n, n_classes), kind).to(dtype)) for kind in kinds.values())

    def formula(p: Tensor, q: Tensor) -> Tensor:
        log_p, log_q = log_of(p, kinds["p_kind"]), log_of(q, kinds["q_kind"])
        total = ((p if kinds["p_kind"] == "probs" else log_p.exp()) * (log_p - log_q)).sum(-1)
        return torch.where(total < 0, total - total.detach(), total)  # rounding, or numbers that do not sum to 1

    scale = n_classes * max(1.0, largest(p), largest(q))
    return Case(
        "kl_divergence",
        lambda p, q: F.kl_divergence(p, q, **kinds),
        formula,
        {"p": p, "q": q},
        ["p", "q"],
        kinds,
        scale,
    )


def kl_div(draw: Draw) -> Case:
    n, n_classes = draw.sizes()
    dtype, log_target = draw.one(*FLOATS), draw.maybe()
    options = {"reduction": draw.one("none", "sum", "batchmean"), "log_target": log_target}
    x = draw.layout(draw.normal(n, n_classes).log_softmax(-1).to(dtype))
    t = draw.layout(as_kind(draw.normal(n, n_classes), "log_probs" if log_target else "probs").to(dtype))

    def formula(x: Tensor, t: Tensor) -> Tensor:
        values = t.exp() * (t - x) if log_target else t * (t.log() - x)
        total = values if options["reduction"] == "none" else values.sum()
        return total / n if options["reduction"] == "batchmean" else total

    return Case(
        "kl_div", lambda x, t: F.kl_div(x, t, **options), formula, {"x": x, "t": t}, ["x", "t"], options, largest(x)
    )


def surprisal(draw: Draw) -> Case:
    n, n_classes = draw.sizes()
    shape = draw.one((n, n_classes), (n_classes,), (3, n, n_classes))
    x, y = draw.logits(shape, draw.one(*FLOATS)), draw.indices(n_classes, shape[:-1])

    def formula(logits: Tensor, target: Tensor) -> Tensor:
        return logits.logsumexp(-1) - logits.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)

    return Case("surprisal", F.surprisal, formula, {"logits": x, "target": y}, ["logits"], {}, largest(x) + 8)


OPS: dict[str, Callable[[Draw], Case]] = {
    function.__name__: function
    for function in (
        cross_entropy,
        linear_cross_entropy,
        embedding,
        embedding_linear,
        entropy,
        kl_div,
        kl_divergence,
        surprisal,
    )
}


# ----------------------------------------------------------------------------------------------------- judging


def largest(x: Tensor) -> float:
    finite = x.detach().double()
    finite = finite[finite.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def run(case: Case, function: Callable[..., Tensor], dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Result and gradients, of the tensors as they are, or as contiguous ones of `dtype`."""
    tensors = {}
    for name, t in case.tensors.items():
        t = t.detach()
        if dtype is not None:
            t = t.contiguous().to(dtype, copy=True) if t.is_floating_point() else t
        tensors[name] = t.requires_grad_() if name in case.differentiable else t
        if name in case.differentiable and tensors[name] is case.tensors[name]:
            tensors[name] = t.clone().requires_grad_()
    result = function(**tensors)
    cotangent = torch.linspace(0.5, 2, result.numel(), dtype=torch.float64).reshape(result.shape)
    grads = torch.autograd.grad(result, [tensors[name] for name in case.differentiable], cotangent.to(result.dtype))
    return {"result": result.detach(), **{f"{n}.grad": g for n, g in zip(case.differentiable, grads, strict=True)}}


def formula_dtype(case: Case) -> torch.dtype:
    """The dtype that the formula's own error is measured in."""
    dtype = next(t.dtype for t in case.tensors.values() if t.is_floating_point())
    return dtype if case.rounds_between else computed(dtype)


def own_error(exact: Tensor, formula: Tensor) -> float:
    """The formula's largest error, of the elements that are finite with and without it."""
    formula, exact = formula.double(), exact.double()
    known = formula.isfinite() & exact.isfinite()
    return (formula - exact)[known].abs().max().item() if known.any() else 0.0


def own_errors(case: Case, exact: dict[str, Tensor]) -> dict[str, float]:
    """`own_error` of the result and of each gradient."""
    dtype = formula_dtype(case)
    measured_in, ratio = dtype, 1.0
    if dtype == torch.float64:
        measured_in, ratio = torch.float32, torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    formula = run(case, case.formula, measured_in)
    return {name: ratio * own_error(exact[name], value) for name, value in formula.items()}


def neighbour(case: Case, number: int) -> Case:
    """`case` with each number a few roundings away."""
    generator = torch.Generator().manual_seed(number)
    eps = torch.finfo(formula_dtype(case)).eps

    def move(t: Tensor) -> Tensor:
        t = t.detach()
        factor = 1 + 4 * eps * (torch.rand(t.shape, generator=generator, dtype=torch.float64) - 0.5)
        return (t * factor).to(t.dtype) if t.is_floating_point() else t

    return replace(case, tensors={name: move(t) for name, t in case.tensors.items()})


def judge(name: str, ours: Tensor, exact: Tensor, formula: Tensor, scale: float, own_error: float) -> str | None:
    """What is wrong with a result, or None."""
    if ours.shape != exact.shape:
        return f"{name} has shape {tuple(ours.shape)}, not {tuple(exact.shape)}"
    got, rounded = ours.double(), exact.to(ours.dtype).double()
    known = rounded.isfinite() & formula.double().isfinite()
    special = ~rounded.isfinite() & ((rounded == formula.double()) | (rounded.isnan() & formula.isnan()))
    if not ((got == rounded) | (got.isnan() & rounded.isnan()))[special].all():
        return f"{name} is not {rounded[special][:4].tolist()} but {got[special][:4].tolist()}"
    if not known.any():
        return None
    got, exact = got[known], exact[known]
    eps, eps_out = torch.finfo(computed(ours.dtype)).eps, torch.finfo(ours.dtype).eps
    floor = 16 * eps * max(exact.abs().max().item(), scale)
    smallest = torch.finfo(ours.dtype).smallest_normal
    bound = 4 * own_error + eps_out * exact.abs() + floor + smallest
    error = (got - exact).abs()
    if (error <= bound).all():
        return None
    at = (error - bound).nan_to_num(math.inf).argmax()
    return f"{name} is {got[at].item()}, not {exact[at].item()} (bound {bound[at].item():.2e})"


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[name].nan_to_num(7.0), b[name].nan_to_num(7.0)) for name in a)


def check(case: Case) -> str | None:
    torch.set_num_threads(1)
    try:
        ours = run(case, case.call)
    except RuntimeError as error:
        if "inplace" in case.options and any(text in str(error) for text in INPLACE_REFUSALS):
            return None
        if case.op == "cross_entropy" and case.options.get("inplace") == "forward" and "reduction" in str(error):
            return None
        return f"{type(error).__name__}: {error}"
    except ValueError as error:
        if case.options.get("inplace") == "forward" and case.options["reduction"] == "none":
            return None
        return f"{type(error).__name__}: {error}"
    exact = run(case, case.formula, torch.float64)
    formula = run(case, case.formula, formula_dtype(case))

    def first_wrong(errors: dict[str, float]) -> str | None:
        found = (
            judge(name, value, exact[name], formula[name], case.scale * SCALES.get(name, 1.0), errors[name])
            for name, value in ours.items()
        )
        return next(filter(None, found), None)

    errors = own_errors(case, exact)
    if first_wrong(errors):
        for near in (neighbour(case, number) for number in range(16)):
            found = own_errors(near, run(near, case.formula, torch.float64))
            errors = {name: max(error, found[name]) for name, error in errors.items()}
        if wrong := first_wrong(errors):
            return wrong
    torch.set_num_threads(2)
    products_are_torchs = case.op in ("linear_cross_entropy", "embedding_linear")  # whose bits may differ
    if not products_are_torchs and not same_bits(ours, run(case, case.call)):
        return "other bits with two threads than with one"
    return None


SCALES = {"result": 64.0}  # a sum of up to so many rows


def misuse(draw: Draw) -> str | None:
    """A wrong call of a function that torch has: both must raise the same type of error, or neither."""
    x, y, w = torch.randn(3, 5), torch.tensor([0, 1, 2]), torch.randn(4, 2)
    name, arguments, options = draw.one(
        ("cross_entropy", (x, draw.one(y[:2], y.float(), y + 3, -y, y > 0, [0, 1], None, y[None])), {}),
        ("cross_entropy", (draw.one(x[0], x.long(), x[:0], [[0.0]], 1.0, x[..., None]), y), {}),
        ("cross_entropy", (x, y), {"weight": draw.one(w, x[0].double(), [1.0], 1.0, x[0])}),
        (
            "cross_entropy",
            (x, y),
            {"label_smoothing": draw.one(1.5, None, "a", torch.ones(1), torch.tensor(0.1), True, 1)},
        ),
        (
            "cross_entropy",
            (x, y),
            {"ignore_index": draw.one(1.0, True, 2**63, -(2**63), torch.tensor(1), torch.ones(()))},
        ),
        ("cross_entropy", (x, y), {"reduction": draw.one("avg", None, 1, "batchmean")}),
        ("embedding", (draw.one(y, y + 2, -y, y.float(), y > 0, 2, [0], None), w), {}),
        ("embedding", (y, draw.one(w[0], w[None], [1.0], w.long())), {}),
        ("embedding", (y, w), {"padding_idx": draw.one(4, -5, 1.0, torch.tensor(1), "a", 3)}),
        ("embedding", (y, w), {draw.one("sparse", "scale_grad_by_freq"): draw.one(1, None, "a", True)}),
        ("kl_div", (draw.one(x, x[0], x[:2], [0.0], 1), x.softmax(1)), {"reduction": draw.one("sum", "none")}),
        ("kl_div", (x, x.softmax(1)), {"reduction": draw.one("avg", None, 1)}),
        ("kl_div", (x, x.softmax(1)), {"log_target": draw.one(1, None, True), "reduction": "sum"}),
    )
    if name == "embedding" and isinstance(arguments[1], Tensor) and arguments[1].dtype == torch.int64:
        return None  # torch gathers from integer tables too; ours leaves no gradient to them, and says so

    def kind(function: Callable[..., Any]) -> type | None:
        try:
            function(*arguments, **options)
        except Exception as error:
            return next(base for base in type(error).__mro__ if base.__module__ == "builtins")
        return None

    ours, theirs = kind(getattr(F, name)), kind(getattr(torchs, name))
    if ours is theirs or (ours, theirs) in DECIDED:
        return None
    return f"misuse: {name}{arguments} {options}: ours {ours}, torch's {theirs}"


# Where ours differs on purpose: (ours, torch's).
DECIDED = {
    (NotImplementedError, RuntimeError),  # torch raises either for a dtype without a kernel, by op
    (RuntimeError, NotImplementedError),
    (None, RuntimeError),  # targets and indices of every integer dtype are taken
    (RuntimeError, None),  # bool indices are refused
    (TypeError, AttributeError),  # what is no tensor is named
    (ValueError, RuntimeError),  # sizes that differ: torch raises either
    (RuntimeError, ValueError),
}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    parser.add_argument("--op", choices=OPS, help="only this one")
    parser.add_argument("--case", type=int, help="only the case of this number")
    given = parser.parse_args(arguments)
    print(f"seed {given.seed}", flush=True)
    end, failures, number = time.monotonic() + given.seconds, 0, given.case or 0
    while time.monotonic() < end and failures < 20:
        draw = Draw(given.seed, number)
        make = OPS[given.op or draw.one(*OPS)]
        case: Case | str = "misuse"
        if draw.maybe(0.1) and given.op is None:
            wrong = misuse(draw)
        else:
            case = make(draw)
            wrong = check(case)
        if wrong:
            failures += 1
            only = f" --op {given.op}" if given.op else ""
            print(f"python -m tests.fuzz --seed {given.seed} --case {number}{only}: {case}: {wrong}", flush=True)
        number += 1
        if given.case is not None:
            break
    print(f"{number} cases, {failures} failures")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
