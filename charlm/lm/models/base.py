"""What every language model here can do: predict the next token from the tokens before it, and generate."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

import charlm.functional as F


class LanguageModel(nn.Module):
    """A model of the next token given the last `block_size` tokens.

    vocab_size: number of tokens, V.
    block_size: length of the context window, T.
    pad_token:  stands in the window where there is nothing before.

    `predicts_every_position` says what it is trained on: `Sequences`, idx and targets (B, T), or, if false,
    `Examples`, idx (B, T) and targets (B,).
    """

    predicts_every_position = False

    def __init__(self, vocab_size: int, block_size: int, pad_token: int = 0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.pad_token = pad_token

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """The next token's logits, and their mean cross-entropy in nats where `targets` are given.

        idx (B, T) contexts and targets (B,), of any integer dtype → logits (B, V), loss () or None.
        """
        raise NotImplementedError

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """`forward`'s loss, for those who need no logits: in nats, () or, with reduction "none", (B,); "sum" too."""
        return F.cross_entropy(self(idx)[0], targets, reduction=reduction)

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continues each row of `idx` by sampling one token at a time.

        Args:
            idx: (B, t) integer tokens, any t: only the last `block_size` are seen, fewer are padded on the
                 left.
            max_new_tokens: how many tokens to add at most.
            temperature: divides the logits; 0 takes the most probable token.
            top_k: sample among the k most probable tokens; more than there are means all.
            top_p: sample among the most probable tokens that together reach this probability (Holtzman et al.
                   2020).
            stop_token: a row that draws it is filled with it; generation ends when every row has.
            generator: on the CPU; the draws are made there, so they do not depend on the device.

        Returns:
            (B, t + n) int64, n ≤ max_new_tokens.

        Raises:
            ValueError: a temperature below 0 or not finite, top_k below 1, or top_p outside (0, 1].
        """
        check_sampling(temperature, top_k, top_p)
        training = self.training
        self.eval()
        sequence = idx.long()
        cache: dict[str, Any] = {}
        stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        for _ in range(max_new_tokens):
            logits = self.next_logits(sequence, cache)  # (B, V)
            token = sample_token(logits, temperature, top_k, top_p, generator)  # (B,)
            if stop_token is not None:
                token = token.masked_fill(stopped, stop_token)
                stopped = stopped | (token == stop_token)
            sequence = torch.cat([sequence, token[:, None]], dim=1)
            if stop_token is not None and bool(stopped.all()):
                break
        self.train(training)
        return sequence

    def next_logits(self, sequence: Tensor, cache: dict[str, Any]) -> Tensor:
        """The logits (B, V) of the token behind `sequence` (B, t), of which the last `block_size` are seen.

        cache: what the model keeps from one call for the next, whose sequence is this one and a token more; empty at
               first.
        """
        pad = torch.full((len(sequence), self.block_size), self.pad_token, dtype=torch.int64, device=sequence.device)
        return self(torch.cat([pad, sequence], dim=1)[:, -self.block_size :])[0]


def reduced(losses: Tensor, reduction: str) -> Tensor:
    """`losses` (B,) as they are ("none"), their "mean" or their "sum"."""
    return losses if reduction == "none" else getattr(losses, reduction)()


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for an option that no distribution follows from."""
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature is {temperature}, but must be a finite number and at least 0")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k is {top_k}, but must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p}, but must be above 0 and at most 1")


def sample_token(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token (B,) int64 for each row of `logits` (B, V); the options are those of `generate`."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Double precision: a small temperature spreads the logits over a range where float32 would lose the tail. The
    # largest is 0, so that the others alone become infinite where a temperature of almost 0 divides them.
    logits = logits.double()
    probabilities = torch.softmax((logits - logits.amax(dim=-1, keepdim=True)) / temperature, dim=-1).cpu()
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)  # (B, V)
    if top_p is not None:
        before = ranked.cumsum(dim=-1) - ranked  # probability of what ranks above: the first always stays
        ranked = ranked.masked_fill(before >= top_p, 0.0)
    if top_k is not None:
        ranked[:, top_k:] = 0.0
    rank = torch.multinomial(ranked, 1, generator=generator)
    return order.gather(1, rank).squeeze(1).to(logits.device)
