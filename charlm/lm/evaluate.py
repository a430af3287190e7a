"""The loss of a model on a whole split or a sample of it, its standard error, and the count baselines beside it.

The mean loss μ = Σ s_u / Σ n_u is a ratio of sums over independent units u, where s_u is the sum in nats over the n_u
tokens of a unit. Its standard error over m units, by linearization (Cochran 1977, Sampling Techniques, 2.11 and 6.4):

    SE(μ) = sqrt( m / (m - 1) · Σ (s_u - μ n_u)² ) / Σ n_u

In line format the units are the items. In running text they are blocks of BLOCK characters, because the surprisals of
neighbouring characters are correlated; single tokens as units would give too small an error.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from charlm.lm.corpus import Corpus
from charlm.lm.examples import BLOCK, Examples, Sequences, is_target, resolve_protocol
from charlm.lm.held_out import choose_order, fitted_ngram
from charlm.lm.models import COUNT_MODELS, LanguageModel, NGram
from charlm.lm.vocabulary import UNKNOWN, check_choice
from charlm.ngrams import MAX_LENGTH

KNESER_NEY_TOKENS = 4_000_000  # that the n-gram of the tables counts
LARGE_SPLIT = 5_000_000  # predictions from which on tables have no rows that take long: 250,000 predictions a second
SUMMED = 1 << 20  # surprisals that are summed at once
CHUNK = 8192  # predictions at a time: the logits of a chunk stay in cache for most vocabularies


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a split.

    Attributes:
        split: The split's name.
        protocol: A key of PROTOCOLS: the context that predictions may use.
        nats: The mean surprisal per token, -log p, every token weighing the same.
        tokens: The number of predictions. In line format an item of n characters has n + 1: its end is predicted too
            and stands for the newline of the file, so nats per token are nats per character of the file.
        standard_error: Of a sample of the split, the standard error of `nats`; otherwise None.
    """

    split: str
    protocol: str
    nats: float
    tokens: int
    standard_error: float | None = None

    @property
    def bits_per_char(self) -> float:
        return self.nats / math.log(2)

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats) if self.nats < 700 else math.inf

    def to_json(self) -> dict[str, str | int | float | None]:
        """The object of `charlm eval --json`; a number that JSON cannot represent is null."""
        numbers = {"nats": self.nats, "bits_per_char": self.bits_per_char, "perplexity": self.perplexity}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        return {"split": self.split, "protocol": self.protocol, **finite, "tokens": self.tokens}


def predictions(model: LanguageModel, corpus: Corpus, split: str, protocol: str | None = None) -> Examples | Sequences:
    """Every prediction of `split`, once, in the order of the file and in the form that `model` takes.

    `protocol` is for running text only. "sliding" predicts each token from the block_size tokens before it; "fixed"
    predicts within consecutive windows of block_size, as nanoGPT does. None chooses the one that takes `model` a single
    pass over the text.

    Raises:
        UserError: The protocol does not exist, or the corpus has items.
    """
    protocol = resolve_protocol(protocol, corpus.format, "fixed" if model.predicts_every_position else "sliding")
    if protocol == "sliding":
        return corpus.examples(split, model.block_size)
    if protocol == "items":
        return (corpus.sequences if model.predicts_every_position else corpus.examples)(split, model.block_size)
    if not model.predicts_every_position:
        return corpus.examples_in_windows(split, model.block_size)
    return corpus.windows(split, model.block_size, model.tokens_before_window)


def surprisals(model: LanguageModel, examples: Examples | Sequences) -> Tensor:
    """-log p of each predicted token: (tokens,) nats in the order of `examples`, with the model in evaluation mode."""
    return torch.cat([*surprisal_parts(model, examples)])


@torch.no_grad()
def surprisal_parts(model: LanguageModel, examples: Examples | Sequences) -> Iterator[Tensor]:
    """`surprisals` in parts of about CHUNK predictions."""
    training = model.training
    model.eval()
    for idx, targets in examples.chunks(rows_per_pass(model)):
        losses = model.loss(idx, targets, reduction="none")
        yield losses[is_target(targets)] if isinstance(examples, Sequences) else losses
    model.train(training)


def rows_per_pass(model: LanguageModel) -> int:
    """The number of rows that `surprisals` takes at a time."""
    return max(1, CHUNK // model.block_size) if model.predicts_every_position else CHUNK


def evaluate(
    model: LanguageModel,
    examples: Examples | Sequences,
    split: str,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Evaluation:
    """The mean loss over all `examples`, summed in double precision, with the model in evaluation mode.

    Of a sample of the split the standard error is computed too. `on_progress` is called with the number of predictions
    done, and of all.
    """
    total, sums = examples.tokens, []
    is_sample = isinstance(examples.index, Tensor)
    waiting: list[Tensor] = []
    done = waiting_from = 0
    for part in surprisal_parts(model, examples):
        waiting.append(part)
        done += len(part)
        if done - waiting_from >= SUMMED and not is_sample:
            sums.append(torch.cat(waiting).sum(dtype=torch.float64).item())
            waiting, waiting_from = [], done
        on_progress(done, total)
    error = None
    if waiting:
        rest = torch.cat(waiting)
        sums.append(rest.sum(dtype=torch.float64).item())
        if is_sample:
            rows = torch.arange(len(examples))
            units = examples.row_units(rows).repeat_interleave(examples.count(rows))
            error = standard_error(rest.double().cpu(), units.unique_consecutive(return_inverse=True)[1])
    return Evaluation(split, examples.protocol, math.fsum(sums) / total, total, error)


def evaluate_on(
    model: LanguageModel,
    corpus: Corpus,
    split: str,
    protocol: str | None = None,
    unknown: str = "error",
    device: torch.device | str = "cpu",
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> tuple[Evaluation, int]:
    """Evaluates `model`, which is on `device`, on a split that may contain characters outside its vocabulary.

    Args:
        protocol: As in `predictions`.
        unknown: "error" refuses unknown characters; "escape" counts them at the cost that
            `charlm.lm.character_model` derives.
        on_progress: As in `evaluate`.

    Returns:
        The evaluation, and the number of unknown characters.

    Raises:
        UserError: A character is unknown, or `protocol` or `unknown` is not one of its values.
    """
    check_choice("unknown", unknown, UNKNOWN)
    escapes = unknown == "escape"
    vocabulary = replace(corpus.vocabulary, escapes=escapes)
    examples = predictions(model, replace(corpus, vocabulary=vocabulary), split, protocol).to(device)
    if not escapes:
        return evaluate(model, examples, split, on_progress), 0
    escaped = ~corpus.known(split)
    nats = vocabulary.with_escapes(surprisals(model, examples).double().cpu(), escaped)
    return Evaluation(split, examples.protocol, nats.mean().item(), len(nats)), int(escaped.sum().item())


def fitted_baselines(
    corpus: Corpus, split: str, add_k: float = 1.0, ngram: NGram | None = None
) -> Iterator[tuple[str, LanguageModel]]:
    """The count models to evaluate on `split`, whose tables fit into memory, fitted on train: (name, model) pairs.

    They are uniform, unigram and bigram with add-k smoothing, and, unless `split` is a LARGE_SPLIT, a Kneser–Ney n-gram
    of at most KNESER_NEY_TOKENS tokens, whose order is chosen on a held-out part of train; `ngram` is that n-gram if
    there is one already.
    """
    train, vocabulary = corpus.examples("train", block_size=1), corpus.vocabulary
    for name, kind in COUNT_MODELS.items():
        if kind.fits(len(vocabulary)):
            model = kind(len(vocabulary), pad_token=vocabulary.pad_token, add_k=add_k).eval()
            model.fit(train)
            yield name, model
    if corpus.tokens(split) > LARGE_SPLIT:
        return
    if ngram is None:
        order, most = choose_order(corpus, MAX_LENGTH)
        ngram = fitted_ngram(corpus, order, corpus.tokens("train"), min(most, KNESER_NEY_TOKENS))
    yield f"{ngram.order}-gram, Kneser–Ney", ngram.eval()


def baselines(
    corpus: Corpus, split: str = "dev", add_k: float = 1.0, ngram: NGram | None = None
) -> dict[str, Evaluation]:
    """The evaluation of each of `fitted_baselines` on `split`, by name."""
    fitted = fitted_baselines(corpus, split, add_k, ngram)
    return {name: evaluate(model, corpus.examples(split, model.block_size), split) for name, model in fitted}


# ---- comparison


@dataclass(frozen=True)
class Comparison:
    """One row of the table of `charlm compare`."""

    name: str  # the folder of a trained model, or the name of a baseline
    type: str  # `Config.label`, such as "mlp + 6-gram"; for a baseline its name
    evaluation: Evaluation
    standard_error: float  # of the mean, in nats; NaN where the split has fewer than two units
    parameters: int  # that were trained; 0 for a count model
    seconds: float  # of the evaluation, with the data in memory; not of training

    def to_json(self) -> dict[str, Any]:
        """One entry of `charlm compare --json`; a number that JSON cannot represent is null."""
        loss = {key: value for key, value in self.evaluation.to_json().items() if key not in ("split", "tokens")}
        error = self.standard_error if math.isfinite(self.standard_error) else None
        return {
            "name": self.name,
            "type": self.type,
            **loss,
            "standard_error": error,
            "parameters": self.parameters,
            "evaluation_seconds": self.seconds,
        }


def measure(
    name: str, type: str, model: LanguageModel, corpus: Corpus, split: str, device: torch.device | str = "cpu"
) -> Comparison:
    """Evaluates `model`, which is in evaluation mode on `device`, on all of `split`, with standard error and time."""
    examples = predictions(model, corpus, split).to(device)
    start = time.perf_counter()
    nats = surprisals(model, examples).double().cpu()  # (N,)
    return compared(name, type, model, examples, split, nats, time.perf_counter() - start)


def compared(
    name: str, type: str, model: LanguageModel, examples: Examples | Sequences, split: str, nats: Tensor, seconds: float
) -> Comparison:
    """The row of `model` with the surprisals `nats`, (N,) float64, of `examples`, all predictions of the split."""
    evaluation = Evaluation(split, examples.protocol, nats.mean().item(), len(nats))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return Comparison(name, type, evaluation, standard_error(nats, unit_of_each(examples)), parameters, seconds)


def measure_baselines(corpus: Corpus, split: str, add_k: float = 1.0) -> list[Comparison]:
    """`measure` for each of `fitted_baselines`."""
    return [measure(name, name, model, corpus, split) for name, model in fitted_baselines(corpus, split, add_k)]


def standard_error(nats: Tensor, units: Tensor) -> float:
    """The standard error of the mean of `nats`, (N,) float64; `units` (N,) holds the unit of each token, from 0 on."""
    count = int(units[-1].item()) + 1 if len(units) else 0
    if count < 2:
        return math.nan
    deviation = torch.zeros(count, dtype=torch.float64).index_add_(0, units, nats - nats.mean())  # s_u - μ n_u
    return math.sqrt(count / (count - 1) * deviation.square().sum().item()) / len(nats)


def units_of(format: str) -> str:
    """The independent units of the standard error, in words."""
    return "items" if format == "line" else f"blocks of {BLOCK} characters"


def unit_of_each(examples: Examples | Sequences) -> Tensor:
    """The unit of each prediction of all rows of a split: (tokens,) int64, from 0 on."""
    if examples.protocol != "items":
        return torch.arange(examples.tokens) // BLOCK
    starts, ends = examples.stream.items(torch.arange(examples.stream.n_items))
    return torch.arange(len(starts)).repeat_interleave(ends - starts)
