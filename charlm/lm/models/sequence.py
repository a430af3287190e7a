"""What the models have in common that predict at every position: the head, the targets, the window, the cache.

The head and its loss are computed where a target counts, and nowhere else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm.lm.examples import is_target
from charlm.lm.models.base import LanguageModel
from charlm.lm.models.dropout import POSITION


class SequenceModel(LanguageModel):
    """A model of `features` and a linear `head`. The first token of a row is the first that its predictions see."""

    predicts_every_position = True
    head: nn.Linear

    @property
    def output(self) -> tuple[Tensor, Tensor | None]:
        """The weight, (V, H), and the bias of the head."""
        return self.head.weight, self.head.bias

    def features(
        self, idx: Tensor, at: Tensor, keys: Tensor | None = None, state: dict[str, Any] | None = None
    ) -> Tensor:
        """The input of the head.

        Args:
            idx: (B, t) tokens of any integer dtype, t ≤ block_size.
            at: (n,) int64 places among the B * t positions.
            keys: (B,) int64 keys of dropout, or None.
            state: What the model knows of the tokens before idx, empty at their beginning; it is brought up to the end
                of idx. None means that there are no such tokens.

        Returns:
            (n, H), of the places `at`.
        """
        raise NotImplementedError

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Computes logits and, if `targets` are given, their mean cross-entropy in nats.

        Args:
            idx: (B, t) tokens of any integer dtype, t ≤ block_size.
            targets: (B, t) the next token of each position, where -100 is ignored; or (B,) the token after the last
                position.

        Returns:
            The logits, (B, V) for targets (B,) and otherwise (B, t, V), and the loss, () or None.
        """
        at = _last(idx) if targets is not None and targets.dim() == 1 else _all(idx)
        logits = nn.functional.linear(self.features(idx, at), *self.output)  # (n, V)
        loss = None if targets is None else F.cross_entropy(logits, targets.flatten())
        return logits if targets is not None and targets.dim() == 1 else logits.view(*idx.shape, self.vocab_size), loss

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """As `LanguageModel.loss`, for the targets of `forward`; the logits are never materialized."""
        if targets.dim() == 1:
            at = _last(idx)
        elif targets.is_cpu and not torch.compiler.is_compiling():
            at = is_target(targets).flatten().nonzero().flatten()
        else:  # the number of targets depends on the data: it would synchronize a GPU and break a compiled graph
            at = _all(idx)
        wanted = targets.flatten() if len(at) == targets.numel() else targets.flatten()[at]
        features, (weight, bias) = self.features(idx, at, keys), self.output
        loss = F.linear_cross_entropy(features, weight, wanted, linear_bias=bias, reduction=reduction)
        if reduction != "none" or len(at) == targets.numel():
            return loss.view(targets.shape) if reduction == "none" else loss
        return loss.new_zeros(targets.numel()).index_copy(0, at, loss).view(targets.shape)

    def next_logits(self, sequence: Tensor, cache: dict[str, Any]) -> Tensor:
        """As `LanguageModel.next_logits`. The cache holds the state, so that a new token computes one position.

        Once the window is full, each new token moves its beginning, and the whole window is computed again.
        """
        start = torch.full((len(sequence), 1), self.pad_token, dtype=torch.int64, device=sequence.device)
        window = torch.cat([start, sequence], dim=1)[:, -self.block_size :]
        if sequence.shape[1] >= self.block_size:
            features = self.features(window, _last(window))
        else:
            new = window[:, cache.get("length", 0) :]
            cache["length"] = window.shape[1]
            features = self.features(new, _last(new), state=cache.setdefault("state", {}))
        return nn.functional.linear(features, *self.output)


def _all(idx: Tensor) -> Tensor:
    """The places of all positions of idx (B, t): (B * t,)."""
    return torch.arange(idx.numel(), device=idx.device)


def _last(idx: Tensor) -> Tensor:
    """The places of the last position of each row of idx (B, t): (B,)."""
    return torch.arange(1, len(idx) + 1, device=idx.device) * idx.shape[1] - 1


def keys_at(keys: Tensor | None, at: Tensor, t: int) -> Tensor | None:
    """The keys of dropout of places: keys (B,), at (n,) among B * t → (n,)."""
    return None if keys is None else keys[at // t] + at % t * POSITION
