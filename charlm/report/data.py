"""The numbers of a report: from the checkpoint, the logs and the corpus of each run to plain numbers and texts.

A large corpus is not read as a whole: of train the last TRAIN_TOKENS tokens, and of dev the first DEV_TOKENS, both
rounded to whole items. All models and baselines are measured on the same predictions.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from charlm._errors import UserError
from charlm.information import conditional_entropies
from charlm.lm import checkpoint
from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import NETWORKS
from charlm.lm.corpus import Corpus
from charlm.lm.data import TextCorpus
from charlm.lm.diagnostics import DIAGNOSTICS
from charlm.lm.evaluate import Comparison, compared, measure_baselines, predictions, rows_per_pass
from charlm.lm.examples import BLOCK, Examples, Sequences, is_target
from charlm.lm.metrics import METRICS
from charlm.lm.models import LanguageModel, Mixture
from charlm.lm.optimizer import learning_rate_at
from charlm.lm.predictability import held_out
from charlm.lm.sample import SamplingOptions, containing_splits, sample
from charlm.lm.vocabulary import Vocabulary

TRAIN_TOKENS = 1_000_000
DEV_TOKENS = 100_000
DEV_LOGITS = 100_000_000  # of all predictions: fewer of a large vocabulary
MOST_CHARACTERS = 60  # of the heat maps of bigrams
MOST_POINTS = 500  # characters of the picture of the embedding
BINS = 15  # of the reliability diagram, as in Guo et al. (2017), "On Calibration of Modern Neural Networks"
ORDER = 5  # the longest context of the n-grams
RATES = 200  # points of the curve of the learning rate
LOGITS = 1 << 23  # computed at a time
PASSAGES = (0.0, 0.005, 0.25, 0.5, 0.75, 0.995, 1.0)  # the ranks of the shown items: from the best to the worst
PASSAGE = 80  # characters of a sample of running text


class Embedding(NamedTuple):
    """The embedding of the most frequent characters in two dimensions: (token, x, y, frequency in train) each.

    `explained` is the share of the variance of each axis; None if the embedding itself has two dimensions.
    """

    points: list[tuple[int, float, float, float]]
    width: int
    explained: tuple[float, float] | None


class Passage(NamedTuple):
    """An item or a block of running text, and the bits of each of its characters and of the end of an item."""

    text: str
    bits: list[float]


@dataclass(frozen=True)
class Run:
    """The numbers of one run; `row` and everything below it are measured on the excerpt of dev."""

    name: str
    saved: Checkpoint
    losses: dict[str, list[tuple[int, float]]]  # (step, nats) by split
    damaged_lines: int  # of the logs, also those without a finite loss
    rates: list[tuple[int, float]]  # (step, learning rate)
    records: list[dict[str, Any]]  # of diagnostics.jsonl
    embedding: Embedding | None
    samples: list[tuple[str, str]]  # text and mark: "new", splits, or "" in running text
    row: Comparison
    bigrams: list[list[float]]  # p(column | row) of the frequent characters
    calibration: dict[str, Reliability]
    passages: list[Passage]


@dataclass(frozen=True)
class Report:
    """The numbers of all runs and of the corpus that they share."""

    runs: list[Run]
    source: str
    format: str
    sizes: dict[str, int]
    tokens: dict[str, tuple[int, int]]  # of train and dev: those that were measured, and all
    vocabulary: Vocabulary
    baselines: list[Comparison]
    frequent: list[int]  # the tokens of the heat maps
    bigrams: list[list[float]]  # as in Run, of the data
    in_sample: list[float]  # H_0, H_1, … of train, bits
    held_out: list[float]  # of dev, bits


def gather(
    directories: list[Path],
    corpus_of: Callable[[Checkpoint], Corpus],
    device: torch.device | str = "cpu",
    on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> Report:
    """Loads and measures the runs in `directories`; `corpus_of` reads the corpus of a checkpoint.

    Raises:
        UserError: A folder has no valid checkpoint or one with infinite or undefined weights, the runs were trained on
            different data, or dev is empty.
    """
    loaded = {str(directory): checkpoint.load(directory) for directory in directories}
    name, first = next(iter(loaded.items()))
    for other, saved in loaded.items():
        if saved.digest != first.digest:
            raise UserError(f"{other} was trained on other data, or another split of it, than {name}: report it alone")
    corpus = corpus_of(first)
    part = excerpt(corpus)
    train, dev = (part.examples(split, 1).targets for split in part.parts)
    for split, tokens in (("train", train), ("dev", dev)):
        if not len(tokens):
            raise UserError(f"{split} of the data of {name} is empty: there is nothing to measure")
    counts = torch.bincount(train.long(), minlength=len(corpus.vocabulary)).double()
    frequent = counts.argsort(descending=True, stable=True)[:MOST_CHARACTERS].sort()[0]
    runs, measured = [], []
    for other, saved in loaded.items():
        model = saved.build_model(device)
        found = measure(model, part, frequent, device, lambda done, total, of=other: on_progress(of, done, total))
        if not all(tensor.isfinite().all() for tensor in (found.nats, *model.parameters())):
            raise UserError(f"{other} predicts no finite numbers: its training diverged; try a lower --learning-rate")
        runs.append(_run(other, saved, model, found, part, corpus, counts, device))
        measured.append(found)
    on_progress("baselines", 0, 0)
    return Report(
        runs=runs,
        source=first.config.input_file or "the names shipped with charlm",
        format=corpus.format,
        sizes=corpus.sizes,
        tokens={"train": (len(train), corpus.tokens("train")), "dev": (len(dev), corpus.tokens("dev"))},
        vocabulary=corpus.vocabulary,
        baselines=measure_baselines(part, "dev", first.config.add_k),
        frequent=frequent.tolist(),
        bigrams=measured[0].observed.tolist(),
        in_sample=conditional_entropies(train, min(ORDER, len(train) - 1), base=2).tolist(),
        held_out=held_out(part, ORDER),
    )


def excerpt(corpus: Corpus) -> TextCorpus:
    """The end of train and the beginning of dev, which follow each other in running text, in whole items."""
    characters = ("\n" if corpus.vocabulary.separator else "") + corpus.vocabulary.chars
    parts = {}
    dev = min(DEV_TOKENS, DEV_LOGITS // len(corpus.vocabulary))
    for split, most in (("train", TRAIN_TOKENS), ("dev", dev)):
        stream = corpus.stream(split, 0)
        start, stop = stream.start, len(stream.tokens)
        if stop - start > most:
            cut = stop - most if split == "train" else start + most
            if stream.n_items:  # whole items, at least one
                before, behind = stream.items(stream.item_of(torch.tensor([cut])))
                cut = int((before if before > start else behind).item())
            start, stop = (cut, stop) if split == "train" else (start, cut)
        text = "".join(map(characters.__getitem__, stream.part(start, stop).tolist()))
        parts[split] = text.split("\n")[:-1] if corpus.vocabulary.separator else [text]
    return TextCorpus(corpus.format, corpus.vocabulary, corpus.digest, 0, parts)


# ---- a run


def _run(
    name: str,
    saved: Checkpoint,
    model: LanguageModel,
    measured: Measured,
    part: TextCorpus,
    corpus: Corpus,
    counts: Tensor,
    device: torch.device | str,
) -> Run:
    entries, damaged = read_log(Path(name, METRICS), _loss)
    records, others = read_log(Path(name, DIAGNOSTICS), _record)
    is_line = corpus.format == "line"
    options = SamplingOptions(20) if is_line else SamplingOptions(5, max_new_tokens=PASSAGE)
    texts = sample(model, saved.vocabulary, options, device)
    steps = sorted({saved.step * number // RATES for number in range(RATES)}) if saved.config.type in NETWORKS else []
    return Run(
        name=name,
        saved=saved,
        losses={split: [(step, loss) for step, of, loss in entries if of == split] for split in ("train", "dev")},
        damaged_lines=damaged + others,
        rates=[(step, learning_rate_at(saved.config, step)) for step in steps],
        records=records,
        embedding=flat_embedding(model, counts),
        samples=list(zip(texts, containing_splits(texts, corpus) if is_line else [""] * len(texts), strict=True)),
        row=compared(name, saved.config.label, model, measured.examples, "dev", measured.nats, seconds=0.0),
        bigrams=measured.predicted.tolist(),
        calibration=measured.calibration,
        passages=passages(part, measured.nats / math.log(2)),
    )


def read_log(path: Path, parse: Callable[[Any], Any]) -> tuple[list[Any], int]:
    """What `parse` makes of the objects of a log, and the number of lines that are damaged; without a file none."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    entries = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            entries.append(parse(json.loads(line)))
    return entries, len(lines) - len(entries)


def _loss(entry: Any) -> tuple[int, str, float]:
    step, split, nats = int(entry["step"]), entry["split"], float(entry["nats"])
    if not math.isfinite(nats):
        raise ValueError(nats)
    return step, split, nats


def _record(entry: Any) -> dict[str, Any]:
    """A record of diagnostics.jsonl, if it has the form that `charlm.lm.diagnostics` writes."""

    def number(value: Any) -> float | None:
        return None if value is None else float(value)

    found: dict[str, Any] = {"step": int(entry["step"])}
    for kind in ("activations", "gradients"):
        found[kind] = {
            name: {
                **{key: number(one[key]) for key in ("mean", "std", "bound", "saturated") if key in one},
                "counts": [int(count) for count in one["counts"]],
            }
            for name, one in entry[kind].items()
            if one["bound"] and one["counts"] and sum(one["counts"]) > 0 and {"mean", "std"} <= {*one}
        }
    return {**found, "updates": {name: number(ratio) for name, ratio in entry["updates"].items()}}


def flat_embedding(model: LanguageModel, counts: Tensor) -> Embedding | None:
    """The embedding of a network in two dimensions: itself, or its two principal components."""
    network = model.network if isinstance(model, Mixture) else model
    if not hasattr(network, "embedding"):
        return None
    weight = network.embedding.weight.detach().double().cpu()  # (V, D)
    xy, explained = weight, None
    if weight.shape[1] != 2:
        u, s, _ = torch.linalg.svd(weight - weight.mean(0), full_matrices=False)
        xy = nn.functional.pad(u * s, (0, 2))[:, :2]
        xy = xy * torch.where(xy.gather(0, xy.abs().argmax(0, keepdim=True)) < 0, -1, 1)  # the sign is arbitrary
        shares = nn.functional.pad(s.square() / s.square().sum().clamp(min=1e-300), (0, 2))
        explained = (shares[0].item(), shares[1].item())
    share = counts / counts.sum()
    tokens = counts.argsort(descending=True, stable=True)[:MOST_POINTS].tolist()
    points = [(token, xy[token, 0].item(), xy[token, 1].item(), share[token].item()) for token in tokens]
    return Embedding(points, weight.shape[1], explained)


def passages(part: TextCorpus, bits: Tensor) -> list[Passage]:
    """Items or blocks of dev at PASSAGES, ranked by their mean bits; `bits` (N,) are of all predictions of dev."""
    texts = part.parts["dev"]
    if part.format == "text":
        texts = [texts[0][start : start + BLOCK] for start in range(0, len(texts[0]), BLOCK)]
    sizes = [len(text) + (part.format == "line") for text in texts]
    found = {text: Passage(text, each.tolist()) for text, each in zip(texts, bits.split(sizes), strict=True)}
    ranked = sorted(found.values(), key=lambda passage: sum(passage.bits) / len(passage.bits))
    return [ranked[rank] for rank in sorted({round(share * (len(ranked) - 1)) for share in PASSAGES})]


# ---- predictions


Reliability = tuple[float, list[tuple[int, float, float]]]


def binned(p: Tensor, happened: Tensor) -> Tensor:
    """The number, the probabilities and the happening of events in bins of p: p (n,), bool (n,) → (3, BINS) sums."""
    p = p.double()
    bins = (p * BINS).long().clamp(0, BINS - 1)
    return torch.stack([torch.bincount(bins, each, BINS) for each in (torch.ones_like(p), p, happened.double())])


def reliability(sums: Tensor) -> Reliability:
    """The expected calibration error, and (events, mean p, share that happened) of each bin; sums (3, BINS)."""
    events, p, happened = sums.unbind()
    bins = [(int(n), of / n, share / n) for n, of, share in zip(*sums.tolist(), strict=True) if n]
    return ((p - happened).abs().sum() / events.sum()).item(), bins


class Measured(NamedTuple):
    """What a model predicts on dev."""

    examples: Examples | Sequences
    nats: Tensor  # (N,) float64, the surprisal of each prediction
    predicted: Tensor  # (K, K) the mean predicted probability of each frequent character (column) after each (row)
    observed: Tensor  # (K, K) how often each frequent character follows each
    calibration: dict[str, Reliability]


def measure(
    model: LanguageModel,
    corpus: Corpus,
    frequent: Tensor,
    device: torch.device | str,
    on_progress: Callable[[int, int], None],
) -> Measured:
    """Measures `model` on dev; `frequent` (K,) are the tokens of the bigrams."""
    examples = predictions(model, corpus, "dev").to(device)
    size, total = len(frequent), examples.tokens
    place = torch.full((model.vocab_size,), size)  # of each token among the frequent ones, behind them the others
    place[frequent] = torch.arange(size)
    predicted, observed = torch.zeros(2, size + 1, size + 1, dtype=torch.float64)
    every, top = torch.zeros(2, 3, BINS, dtype=torch.float64)
    nats = []
    for last, target, log_p in distributions(model, examples):
        nats.append(-log_p.gather(1, target[:, None])[:, 0].double())
        p = log_p.exp()
        row = place[last]
        predicted.index_add_(0, row, nn.functional.pad(p[:, frequent].double(), (0, 1)))
        observed.index_put_((row, place[target]), torch.ones((), dtype=torch.float64), accumulate=True)
        at, token = (p >= 1 / BINS).nonzero().unbind(1)
        every += binned(p[at, token], token == target[at])
        best, token = p.max(1)
        top += binned(best, token == target)
        on_progress(sum(map(len, nats)), total)
    every[:, 0] += torch.tensor([total * model.vocab_size, total, total]) - every.sum(1)  # those below 1 / BINS
    contexts = observed.sum(1, keepdim=True).clamp(min=1)  # (K + 1, 1)
    matrices = ((matrix / contexts)[:size, :size] for matrix in (predicted, observed))
    calibration = {"every token": reliability(every), "most probable token": reliability(top)}
    return Measured(examples, torch.cat(nats), *matrices, calibration)


@torch.no_grad()
def distributions(model: LanguageModel, examples: Examples | Sequences) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The last token of the context (n,), the target (n,), and log p of every token (n, V) float32, on the CPU."""
    width = model.block_size if model.predicts_every_position else 1
    rows = max(1, min(rows_per_pass(model), LOGITS // (model.vocab_size * width)))
    for idx, targets in examples.chunks(rows):
        logits, last = model(idx, targets)[0], idx[:, -1]  # (B, V) or (B, T, V); (B,)
        if model.predicts_every_position:
            counted = is_target(targets)
            last = idx[:, -targets.shape[1] :][counted]
            targets, logits = targets[counted], logits[counted]
        yield last.long().cpu(), targets.long().cpu(), logits.float().cpu().log_softmax(1)
