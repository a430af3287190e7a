"""Models that count: uniform, unigram, and bigram with add-k smoothing. The baselines of every table.

    uniform   p(b)      = 1 / V
    unigram   p(b)      = (n(b) + k) / (N + k V)
    bigram    p(b | a)  = (n(a, b) + k) / (n(a) + k V)

V is the number of tokens, n counts the training targets, k is add-k (Lidstone) smoothing; k = 1 is Laplace's.
With k = 0 what training never saw has probability 0, and the loss on it is infinite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import charlm.functional as F
from charlm.lm.errors import UserError
from charlm.lm.examples import Examples
from charlm.lm.models.base import LanguageModel, reduced

MAX_COUNTS = 1 << 28  # 2 GB of float64: a bigram of 16,384 tokens
COUNTED_AT_ONCE = 1 << 20  # examples: a corpus may have 10⁹


class CountModel(LanguageModel):
    """A model that is trained in one step, by counting."""

    def fit(self, examples: Examples) -> None:
        """Counts `examples`, in place of whatever was counted before."""
        raise NotImplementedError


class TableModel(CountModel):
    """Log-probabilities looked up by the last token of the context.

    `log_probs` (rows, V) float64: one row for each token that the context can end in, or one row for all.
    """

    rows_are_contexts = False

    def __init__(self, vocab_size: int, block_size: int = 1, pad_token: int = 0, add_k: float = 1.0) -> None:
        super().__init__(vocab_size, block_size, pad_token)
        self.add_k = add_k
        if not self.fits(vocab_size):
            raise UserError(
                f"a table of {vocab_size:,} × {vocab_size:,} counts does not fit: the bigram takes at most "
                f"{math.isqrt(MAX_COUNTS):,} tokens"
            )
        rows = vocab_size if self.rows_are_contexts else 1
        self.log_probs: Tensor
        self.register_buffer("log_probs", torch.full((rows, vocab_size), 1 / vocab_size, dtype=torch.float64).log_())

    @classmethod
    def fits(cls, vocab_size: int) -> bool:
        """Whether the table of so many tokens is one that a machine can be asked to hold."""
        return not cls.rows_are_contexts or vocab_size**2 <= MAX_COUNTS

    def fit(self, examples: Examples) -> None:
        """Counts `examples`, and sets `log_probs` from the counts."""
        size = self.vocab_size
        counts = torch.zeros_like(self.log_probs)  # exact up to 2⁵³
        for contexts, targets in examples.chunks(COUNTED_AT_ONCE):
            pairs = self._row(contexts) * size + targets.long()  # (N,)
            counts.view(-1).scatter_add_(0, pairs, counts.new_ones(()).expand(len(pairs)))
        smoothed = counts + self.add_k
        total = smoothed.sum(dim=1, keepdim=True)
        # A context that never occurred, with k = 0, says nothing: uniform.
        probabilities = torch.where(total > 0, smoothed / total, 1 / size)
        self.log_probs.copy_(probabilities.log())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """idx (B, T), targets (B,) → logits (B, V) float64, log-probabilities, and the loss in nats."""
        logits = F.embedding(self._row(idx), self.log_probs)
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """`forward`'s loss, looked up: its (B, V) logits would be gigabytes where V is 100,000."""
        nats = -self.log_probs[self._row(idx), targets.long()]  # (B,)
        return reduced(nats, reduction)

    def _row(self, idx: Tensor) -> Tensor:
        """The row of `log_probs` for each context: (B, T) → (B,) int64."""
        return idx[:, -1].long() if self.rows_are_contexts else torch.zeros_like(idx[:, -1], dtype=torch.int64)


class Uniform(TableModel):
    """Every token is as probable as any other: log V nats."""

    def fit(self, examples: Examples) -> None:
        """Nothing to learn."""


class Unigram(TableModel):
    """The tokens' frequencies, whatever the context."""


class Bigram(TableModel):
    """The tokens' frequencies after the last token of the context."""

    rows_are_contexts = True


COUNT_MODELS: dict[str, type[TableModel]] = {"uniform": Uniform, "unigram": Unigram, "bigram": Bigram}
