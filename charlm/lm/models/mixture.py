"""A network and an n-gram, each half of the prediction.

    p(x | c) = p_network(x | c) / 2 + p_n-gram(x | c) / 2

The two err in different places: the n-gram knows by heart what it has seen, the network how it would go on. Bengio et
al. (2003), "A Neural Probabilistic Language Model", section 4, mix their network and a trigram with these weights. The
network is trained as if it were alone: on what it was counted from the n-gram is too sure of itself to learn beside.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm.lm.examples import Examples, is_asked
from charlm.lm.models.base import LanguageModel, reduced
from charlm.lm.models.ngram import NGram


class Mixture(LanguageModel):
    """The mean of a network's probabilities and those of a Kneser–Ney n-gram.

    Args:
        network: a neural model; in training mode the mixture is the network alone.
        order: of the n-gram: at least 1 and at most network.block_size + 1.

    Raises:
        ValueError: an order beyond what the network's window shows.
    """

    def __init__(self, network: LanguageModel, order: int) -> None:
        super().__init__(network.vocab_size, network.block_size, network.pad_token)
        if not 1 <= order <= network.block_size + 1:
            raise ValueError(f"order is {order}, but must be at least 1 and at most {network.block_size + 1}")
        self.network = network
        self.ngram = NGram(network.vocab_size, max(1, order - 1), network.pad_token, order=order)
        self.predicts_every_position = network.predicts_every_position

    def fit(self, examples: Examples) -> None:
        """Counts the n-grams of `examples`, a split's, with contexts of `ngram.block_size`."""
        self.ngram.fit(examples)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As the network's, but logits are log-probabilities, float64."""
        if self.training:
            return self.network(idx, targets)
        logits, _ = self.network(idx) if targets is None else self.network(idx, targets)
        every = logits.dim() == 3
        counted = self.ngram(self._contexts(idx, every))[0].view(logits.shape)
        mixed = _half_of_each(logits.double().log_softmax(dim=-1), counted)
        if targets is None:
            return mixed, None
        return mixed, F.cross_entropy(mixed.flatten(0, -2), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """`forward`'s loss without its logits: () or, with "none", the shape of targets, 0 where they are -100."""
        if self.training:
            return self.network.loss(idx, targets, reduction)
        contexts = self._contexts(idx, every=targets.dim() == 2)
        asked = is_asked(targets.flatten())
        counted = self.ngram.loss(contexts[asked], targets.flatten()[asked], reduction="none")  # (N,) of those asked
        alone = self.network.loss(idx, targets, reduction="none").flatten()[asked]
        losses = -_half_of_each(-alone.double(), -counted)
        if reduction != "none":
            return reduced(losses, reduction)
        return losses.new_zeros(targets.shape).masked_scatter_(asked.view(targets.shape), losses)

    def next_logits(self, sequence: Tensor, cache: dict[str, Any]) -> Tensor:
        """As `LanguageModel.next_logits`: log-probabilities (B, V), float64."""
        logits = self.network.next_logits(sequence, cache)
        return _half_of_each(logits.double().log_softmax(dim=-1), self.ngram.next_logits(sequence, {}))

    def _contexts(self, idx: Tensor, every: bool) -> Tensor:
        """What the n-gram sees of idx (B, T): the last n tokens of each row (B, n), or of every position (B * T, n)."""
        n = self.ngram.block_size
        if not every:
            return idx[:, -n:]
        # A row begins with the token before its first prediction; nothing lies before that one.
        return nn.functional.pad(idx, (n - 1, 0), value=self.pad_token).unfold(1, n, 1).flatten(0, 1)


def _half_of_each(a: Tensor, b: Tensor) -> Tensor:
    """log((e^a + e^b) / 2)."""
    return torch.logaddexp(a, b) - math.log(2)
