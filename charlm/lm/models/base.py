"""The interface of all language models: they predict the next token from the tokens before it, and generate."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm._errors import UserError


class LanguageModel(nn.Module):
    """A model of the next token given the last `block_size` tokens.

    Args:
        vocab_size: Number of tokens V.
        block_size: Length T of the context window.
        pad_token: Token that fills the window before the first token.

    The class attribute `predicts_every_position` says what a model is trained on: `Sequences`, with idx and targets
    (B, T), if true, and otherwise `Examples`, with idx (B, T) and targets (B,). `tokens_before_window` is the number of
    tokens before a fixed window of running text that the model takes in addition, as the first columns of idx.
    """

    predicts_every_position = False
    tokens_before_window = 0

    def __init__(self, vocab_size: int, block_size: int, pad_token: int = 0) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.block_size = block_size
        self.pad_token = pad_token

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Computes the logits of the next token and, if `targets` are given, their mean cross-entropy in nats.

        Args:
            idx: (B, T) contexts, any integer dtype.
            targets: (B,) next tokens, any integer dtype.

        Returns:
            The logits, (B, V), and the loss, () or None.
        """
        raise NotImplementedError

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """The loss of `forward` in nats, without its logits where a model can avoid them.

        Args:
            idx: As in `forward`.
            targets: As in `forward`.
            reduction: "mean", "sum" or "none".
            keys: (B,) int64, `dropout.sample_keys` of the samples, which dropout in training mode is a function of;
                None draws it from torch's global generator.

        Returns:
            () or, with reduction "none", the shape of targets.
        """
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
            idx: (B, t) tokens of any integer dtype, any t. The model sees the last `block_size` of them; shorter rows
                are padded on the left.
            max_new_tokens: Largest number of tokens to add.
            temperature: Divisor of the logits; 0 takes the most probable token.
            top_k: Sample among the k most probable tokens; a k above V means all.
            top_p: Sample among the most probable tokens that together reach this probability (Holtzman et al. 2020).
            stop_token: A row that draws it is filled with it from there on; generation ends when every row has drawn
                it.
            generator: A generator on the CPU. Tokens are drawn on the CPU, so they do not depend on the device.

        Returns:
            (B, t + n) int64, n ≤ max_new_tokens.

        Raises:
            ValueError: The temperature is negative or not finite, top_k is below 1, or top_p is outside (0, 1].
        """
        options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "stop_token": stop_token}
        drawn = list(self.draw(idx, max_new_tokens, **options, generator=generator))
        return torch.cat([idx.long(), *(token[:, None] for token in drawn)], dim=1)

    @torch.no_grad()
    def draw(
        self,
        idx: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields the tokens (B,) of each step of `generate`, as soon as they are drawn."""
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
            yield token
            if stop_token is not None and bool(stopped.all()):
                break
        self.train(training)

    def next_logits(self, sequence: Tensor, cache: dict[str, Any]) -> Tensor:
        """The logits (B, V) of the token after `sequence`, (B, t), from its last `block_size` tokens.

        `cache` holds the state that a model keeps between calls. It is empty at first, and each call must extend the
        sequence of the previous one by one token.
        """
        pad = torch.full((len(sequence), self.block_size), self.pad_token, dtype=torch.int64, device=sequence.device)
        return self(torch.cat([pad, sequence], dim=1)[:, -self.block_size :])[0]


def reduce(losses: Tensor, reduction: str) -> Tensor:
    """Applies a reduction, "none", "mean" or "sum", to `losses` (B,)."""
    return losses if reduction == "none" else getattr(losses, reduction)()


def check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises ValueError for a sampling option that is out of its range."""
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
    """Samples one token, (B,) int64, for each row of `logits` (B, V); the options are those of `generate`."""
    largest = logits.amax(dim=-1, keepdim=True)  # NaN if one of them is
    if not bool(largest.isfinite().all()):
        raise UserError("the model predicts no finite numbers: its training diverged; try a lower --learning-rate")
    if temperature == 0:
        return logits.argmax(dim=-1)
    # Double precision, because a small temperature spreads the logits so far that float32 would lose the tail. The
    # largest logit is shifted to 0, so that a temperature close to 0 makes only the others infinite.
    probabilities = torch.softmax((logits.double() - largest.double()) / temperature, dim=-1).cpu()
    ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)  # (B, V)
    if top_p is not None:
        before = ranked.cumsum(dim=-1) - ranked  # total probability of the higher ranks, 0 for the first
        ranked = ranked.masked_fill(before >= top_p, 0.0)
    if top_k is not None:
        ranked[:, top_k:] = 0.0
    rank = torch.multinomial(ranked, 1, generator=generator)
    return order.gather(1, rank).squeeze(1).to(logits.device)
