"""Count models: uniform, unigram, and bigram with add-k smoothing. They are the baselines of every table of losses.

    uniform   p(b)      = 1 / V
    unigram   p(b)      = (n(b) + k) / (N + k V)
    bigram    p(b | a)  = (n(a, b) + k) / (n(a) + k V)

V is the number of tokens, n counts the training targets, and k is the constant of add-k (Lidstone) smoothing; k = 1 is
Laplace smoothing. With k = 0 a pair that does not occur in train has probability 0 and an infinite loss.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import charlm.functional as F
from charlm._errors import UserError
from charlm.lm.examples import Examples
from charlm.lm.models.base import LanguageModel, reduce

MAX_COUNTS = 1 << 28  # 2 GB of float64: a bigram of 16,384 tokens
COUNT_CHUNK = 1 << 20  # examples counted at a time: a corpus may have 10⁹


class CountModel(LanguageModel):
    """A model that is trained by counting, without an optimizer."""

    def fit(self, examples: Examples) -> None:
        """Counts `examples`, and discards earlier counts."""
        raise NotImplementedError


class TableModel(CountModel):
    """A table of log-probabilities, indexed by the last token of the context.

    `log_probs` is (rows, V) float64, with one row per last token, or a single row for all contexts.
    """

    rows_are_contexts = False

    def __init__(self, vocab_size: int, block_size: int = 1, pad_token: int = 0, add_k: float = 1.0) -> None:
        super().__init__(vocab_size, block_size, pad_token)
        self.add_k = add_k
        if not self.fits(vocab_size):
            raise UserError(
                f"a table of {vocab_size:,} × {vocab_size:,} counts does not fit: the bigram supports at most "
                f"{math.isqrt(MAX_COUNTS):,} tokens"
            )
        rows = vocab_size if self.rows_are_contexts else 1
        self.log_probs: Tensor
        self.register_buffer("log_probs", torch.full((rows, vocab_size), 1 / vocab_size, dtype=torch.float64).log_())

    @classmethod
    def fits(cls, vocab_size: int) -> bool:
        """Whether the table for `vocab_size` tokens has at most MAX_COUNTS entries."""
        return not cls.rows_are_contexts or vocab_size**2 <= MAX_COUNTS

    def fit(self, examples: Examples) -> None:
        """Counts `examples` and computes `log_probs`."""
        size = self.vocab_size
        counts = torch.zeros_like(self.log_probs)  # exact up to 2⁵³
        for contexts, targets in examples.chunks(COUNT_CHUNK):
            pairs = self._row(contexts) * size + targets.long()  # (N,)
            counts.view(-1).scatter_add_(0, pairs, counts.new_ones(()).expand(len(pairs)))
        smoothed = counts + self.add_k
        total = smoothed.sum(dim=1, keepdim=True)
        # With k = 0, a context that did not occur is followed by a uniform distribution.
        probabilities = torch.where(total > 0, smoothed / total, 1 / size)
        self.log_probs.copy_(probabilities.log())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As `LanguageModel.forward`; the logits are log-probabilities, (B, V) float64."""
        logits = F.embedding(self._row(idx), self.log_probs)
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """As `LanguageModel.loss`, by a lookup: for V = 100,000 the (B, V) logits would take gigabytes."""
        nats = -self.log_probs[self._row(idx), targets.long()]  # (B,)
        return reduce(nats, reduction)

    def _row(self, idx: Tensor) -> Tensor:
        """The row of `log_probs` of each context: (B, T) → (B,) int64."""
        return idx[:, -1].long() if self.rows_are_contexts else torch.zeros_like(idx[:, -1], dtype=torch.int64)


class Uniform(TableModel):
    """Every token is equally probable; the loss is log V nats."""

    def fit(self, examples: Examples) -> None:
        """Does nothing: there is nothing to learn."""


class Unigram(TableModel):
    """The frequency of each token, independent of the context."""


class Bigram(TableModel):
    """The frequency of each token after the last token of the context."""

    rows_are_contexts = True


COUNT_MODELS: dict[str, type[TableModel]] = {"uniform": Uniform, "unigram": Unigram, "bigram": Bigram}
