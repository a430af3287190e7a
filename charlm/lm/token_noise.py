"""Unigram noising of the input (Xie et al. 2017, "Data Noising as Smoothing in Neural Network Language Models")."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from charlm.lm.models.dropout import in_layer, random_bits

LAYER = -1  # of the keys: the layers of models count from 0
COUNTED_TOKENS = 1 << 22  # at a time, of the training split


class TokenNoise:
    """Replaces each input token, with the given probability, by one drawn from the frequencies of `parts` together."""

    def __init__(self, probability: float, parts: Iterable[Tensor], vocab_size: int) -> None:
        self.probability = probability
        counts = [torch.bincount(tokens, minlength=vocab_size) for tokens in parts]
        self.counts = torch.stack(counts).sum(0).cumsum(0)  # (V,) int64, up to each token

    def __call__(self, idx: Tensor, keys: Tensor) -> Tensor:
        """idx (B, T), keys (B,) int64 → (B, T) with noise that is a function of the keys and the position."""
        width = idx.shape[1]
        bits = random_bits(in_layer(keys, LAYER), 2 * width).view(len(idx), width, 2)
        uniform = (bits >> 11 & (1 << 53) - 1).double() / (1 << 53)  # in [0, 1), exactly the same on every device
        drawn = torch.searchsorted(self.counts, (uniform[..., 1] * self.counts[-1]).long(), right=True)
        return torch.where(uniform[..., 0] < self.probability, drawn.to(idx.dtype), idx)
