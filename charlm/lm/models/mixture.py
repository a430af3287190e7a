"""The mixture of a network and an n-gram, whose weights depend on what the n-gram has seen of the context.

    p(x | c) = w(c) p_network(x | c) + (1 - w(c)) p_n-gram(x | c)

    w(c)     = sigmoid(b_m + u · (log A, log T, log A log T, log² A, log² T))

m is the length of the longest context that the n-gram has seen, A the sum of its counts, and T the number of distinct
tokens after it. The two models make different errors: the n-gram memorizes what it has seen, and the network
generalizes. Bengio et al. (2003), "A Neural Probabilistic Language Model", section 4, mix their network and a trigram
with equal weights, which are also the weights here before `fit_weights`.

b and u minimize the loss on predictions that neither model was trained on (see `charlm.lm.held_out`). The network is
trained alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm.lm.examples import Examples, is_target
from charlm.lm.models.base import LanguageModel, reduce
from charlm.lm.models.ngram import Contexts, NGram

MAX_STEPS = 60  # of L-BFGS
N_CONFIDENCE = 5  # the terms of w that do not depend on m


class Mixture(LanguageModel):
    """A weighted mean of the probabilities of a network and a Kneser–Ney n-gram; in training mode, the network alone.

    Args:
        network: A neural model.
        order: Order of the n-gram, at least 1. For a network that predicts every position at most network.block_size
            + 1, because the n-gram sees no more than the row.

    Raises:
        ValueError: The order is out of its range.
    """

    def __init__(self, network: LanguageModel, order: int) -> None:
        ngram = NGram(network.vocab_size, max(1, order - 1), network.pad_token, order=order)
        block_size = max(network.block_size, ngram.block_size)
        if network.predicts_every_position and block_size > network.block_size:
            raise ValueError(f"order is {order}, but must be at least 1 and at most {network.block_size + 1}")
        super().__init__(network.vocab_size, block_size, network.pad_token)
        self.network = network
        self.ngram = ngram
        self.predicts_every_position = network.predicts_every_position
        # The first token of a window of running text is the only one that the network sees before its first prediction.
        self.tokens_before_window = ngram.block_size - 1 if network.predicts_every_position else 0
        self.weights: Tensor  # (order + 5,) float64: b, then u
        self.register_buffer("weights", torch.zeros(order + N_CONFIDENCE, dtype=torch.float64))

    def fit(self, examples: Examples) -> None:
        """Counts the n-grams of `examples`, consecutive ones of a split with contexts of `ngram.block_size` tokens."""
        self.ngram.fit(examples)

    def fit_weights(self, network: Tensor, ngram: Tensor, terms: Tensor) -> None:
        """Chooses the weights that minimize the mean loss of N predictions.

        Where there is little data, a normal prior of variance 1/2 draws each b_m to their mean and u to 0, and one of
        variance 10 draws the mean to 0: one of the models may be far better for every context.

        Args:
            network: (N,) the network's -log p of each target, in nats.
            ngram: (N,) that of an n-gram which has not counted the predictions.
            terms: (N, order + 5) float64, `weight_terms` of its contexts.
        """
        network, ngram = network.double(), ngram.double()
        weights = torch.zeros_like(self.weights, device=terms.device, requires_grad=True)
        optimizer = torch.optim.LBFGS([weights], max_iter=MAX_STEPS, line_search_fn="strong_wolfe")

        def objective() -> Tensor:
            optimizer.zero_grad()
            b, u = weights[:-N_CONFIDENCE], weights[-N_CONFIDENCE:]
            prior = (b - b.mean()).square().sum() + u.square().sum() + b.mean().square() / 20
            loss = _mixed(terms @ weights, network, ngram).mean() + prior / len(terms)
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(objective)
        self.weights.copy_(weights.detach())

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """As the network's forward; in evaluation mode the logits are log-probabilities in float64."""
        seen = self._of_network(idx, targets)
        if self.training:
            return self.network(seen, targets)
        logits, _ = self.network(seen, targets)
        contexts = self.ngram.contexts(self._windows(idx, logits.shape[1] if logits.dim() == 3 else None))
        log_probs = logits.double().log_softmax(dim=-1).flatten(0, -2)  # (B, V) or (B * t, V)
        mixed = -_mixed(self._logit(contexts)[:, None], -log_probs, -self.ngram.log_probs(contexts)).view(logits.shape)
        if targets is None:
            return mixed, None
        return mixed, F.cross_entropy(mixed.flatten(0, -2), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """As `LanguageModel.loss`, without logits; with reduction "none", ignored targets have a loss of 0."""
        seen = self._of_network(idx, targets)
        if self.training:
            return self.network.loss(seen, targets, reduction, keys)
        counted = is_target(targets.flatten())  # (B * t,), of which N are true
        windows = self._windows(idx, targets.shape[1] if targets.dim() == 2 else None)[counted]
        contexts = self.ngram.contexts(windows)
        ngram = self.ngram.surprisal(contexts, targets.flatten()[counted])  # (N,)
        network = self.network.loss(seen, targets, reduction="none").flatten()[counted]  # (N,)
        losses = _mixed(self._logit(contexts), network.double(), ngram)
        if reduction != "none":
            return reduce(losses, reduction)
        return losses.new_zeros(targets.shape).masked_scatter_(counted.view(targets.shape), losses)

    def next_logits(self, sequence: Tensor, cache: dict[str, Any]) -> Tensor:
        """As `LanguageModel.next_logits`; the logits are log-probabilities, (B, V) float64."""
        network = self.network.next_logits(sequence, cache).double().log_softmax(dim=-1)
        n = self.ngram.block_size
        contexts = self.ngram.contexts(nn.functional.pad(sequence, (n, 0), value=self.pad_token)[:, -n:])
        return -_mixed(self._logit(contexts)[:, None], -network, -self.ngram.log_probs(contexts))

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        """A mixture of an earlier version has no weights, which were 1/2."""
        state_dict.setdefault(f"{prefix}weights", torch.zeros_like(self.weights))
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _of_network(self, idx: Tensor, targets: Tensor | None) -> Tensor:
        """The last tokens of each row of idx that the network sees."""
        if not self.predicts_every_position:
            return idx[:, -self.network.block_size :]
        return idx if targets is None or targets.dim() == 1 else idx[:, -targets.shape[1] :]

    def _windows(self, idx: Tensor, positions: int | None) -> Tensor:
        """The last n tokens of each row of idx (B, T), or before each of its last positions: (B, n) or (B * t, n)."""
        n = self.ngram.block_size
        if positions is None:
            return nn.functional.pad(idx, (max(0, n - idx.shape[1]), 0), value=self.pad_token)[:, -n:]
        missing = max(0, n - 1 - (idx.shape[1] - positions))  # a row without tokens before it starts with padding
        padded = nn.functional.pad(idx, (missing, 0), value=self.pad_token)[:, -(positions + n - 1) :]
        return padded.unfold(1, n, 1).flatten(0, 1)

    def _logit(self, contexts: Contexts) -> Tensor:
        """The logit of w of each of `contexts`: (B,) float64."""
        return weight_terms(self.ngram, contexts) @ self.weights


def weight_terms(ngram: NGram, contexts: Contexts) -> Tensor:
    """What the logit of w is linear in: (B, order + 5) float64, the one-hot m and the five terms of A and T."""
    length, total, distinct = ngram.evidence(contexts)
    a, t = total.clamp(min=1).log(), distinct.clamp(min=1).log()
    confidence = torch.stack([a, t, a * t, a * a, t * t], dim=1)
    return torch.cat([nn.functional.one_hot(length, ngram.order).double(), confidence], dim=1)


def _mixed(logit: Tensor, network: Tensor, ngram: Tensor) -> Tensor:
    """-log(w e^-network + (1 - w) e^-ngram) for w = sigmoid(logit)."""
    return -torch.logaddexp(nn.functional.logsigmoid(logit) - network, nn.functional.logsigmoid(-logit) - ngram)
