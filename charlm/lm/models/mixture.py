"""The mean of the predictions of a network and an n-gram.

    p(x | c) = p_network(x | c) / 2 + p_n-gram(x | c) / 2

The two make different errors: the n-gram memorizes what it has seen, and the network generalizes. Bengio et al. (2003),
"A Neural Probabilistic Language Model", section 4, mix their network and a trigram with these weights. The network is
trained alone, because the n-gram is overconfident on the training data that it was counted on.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm.lm.examples import Examples, is_target
from charlm.lm.models.base import LanguageModel, reduce
from charlm.lm.models.ngram import NGram


class Mixture(LanguageModel):
    """The mean of the probabilities of a network and a Kneser–Ney n-gram; in training mode, the network alone.

    Args:
        network: A neural model.
        order: Order of the n-gram, at least 1 and at most network.block_size + 1.

    Raises:
        ValueError: The order is out of its range.
    """

    def __init__(self, network: LanguageModel, order: int) -> None:
        super().__init__(network.vocab_size, network.block_size, network.pad_token)
        if not 1 <= order <= network.block_size + 1:
            raise ValueError(f"order is {order}, but must be at least 1 and at most {network.block_size + 1}")
        self.network = network
        self.ngram = NGram(network.vocab_size, max(1, order - 1), network.pad_token, order=order)
        self.predicts_every_position = network.predicts_every_position

    def fit(self, examples: Examples) -> None:
        """Counts the n-grams of `examples`, all those of a split with contexts of `ngram.block_size` tokens."""
        self.ngram.fit(examples)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As the network's forward; in evaluation mode the logits are log-probabilities in float64."""
        if self.training:
            return self.network(idx, targets)
        logits, _ = self.network(idx) if targets is None else self.network(idx, targets)
        every_position = logits.dim() == 3
        ngram_log_probs = self.ngram(self._contexts(idx, every_position))[0].view(logits.shape)
        mixed = _log_mean_exp(logits.double().log_softmax(dim=-1), ngram_log_probs)
        if targets is None:
            return mixed, None
        return mixed, F.cross_entropy(mixed.flatten(0, -2), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """As `LanguageModel.loss`, without logits; with reduction "none", ignored targets have a loss of 0."""
        if self.training:
            return self.network.loss(idx, targets, reduction, keys)
        contexts = self._contexts(idx, every_position=targets.dim() == 2)
        counted = is_target(targets.flatten())  # (B * t,), of which N are true
        ngram_loss = self.ngram.loss(contexts[counted], targets.flatten()[counted], reduction="none")  # (N,)
        network_loss = self.network.loss(idx, targets, reduction="none").flatten()[counted]  # (N,)
        losses = -_log_mean_exp(-network_loss.double(), -ngram_loss)
        if reduction != "none":
            return reduce(losses, reduction)
        return losses.new_zeros(targets.shape).masked_scatter_(counted.view(targets.shape), losses)

    def next_logits(self, sequence: Tensor, cache: dict[str, Any]) -> Tensor:
        """As `LanguageModel.next_logits`; the logits are log-probabilities, (B, V) float64."""
        logits = self.network.next_logits(sequence, cache)
        return _log_mean_exp(logits.double().log_softmax(dim=-1), self.ngram.next_logits(sequence, {}))

    def _contexts(self, idx: Tensor, every_position: bool) -> Tensor:
        """The last n tokens of each row of idx (B, T), or of every position: (B, n) or (B * T, n)."""
        n = self.ngram.block_size
        if not every_position:
            return idx[:, -n:]
        # A row starts with the token before its first prediction, and has no context before that token.
        return nn.functional.pad(idx, (n - 1, 0), value=self.pad_token).unfold(1, n, 1).flatten(0, 1)


def _log_mean_exp(a: Tensor, b: Tensor) -> Tensor:
    """log((e^a + e^b) / 2)."""
    return torch.logaddexp(a, b) - math.log(2)
