"""A bag of words, the mean of the embeddings so far, as in makemore.

x_t    = C[token_t] + P[t]                         token and position embeddings
y_t    = x_t + mean(x_1, …, x_t)
z_t    = y_t + W_2 tanh(W_1 y_t + b_1) + b_2
logits = z_t V + d
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from charlm.lm.models.dropout import Dropout
from charlm.lm.models.mlp import HEAD_GAIN, TANH_GAIN
from charlm.lm.models.sequence import SequenceModel, keys_at
from charlm.nn import Embedding


class BoW(SequenceModel):
    """A bag of words: order enters through the position embeddings and the last token alone.

    Args:
        vocab_size, block_size, pad_token: As in `LanguageModel`.
        n_embd: Width D of the embeddings.
        n_hidden: Width of the tanh layer.
        dropout: Dropout probability of the hidden units.
    """

    def __init__(
        self, vocab_size: int, block_size: int, pad_token: int = 0, *, n_embd: int, n_hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__(vocab_size, block_size, pad_token)
        self.embedding = Embedding(vocab_size, n_embd)
        self.position = Embedding(block_size, n_embd)
        self.expand = nn.Linear(n_embd, n_hidden)
        self.contract = nn.Linear(n_hidden, n_embd)
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(n_embd, vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes embeddings from N(0, 1), the tanh layer with its gain, a small softmax layer, and biases 0."""
        for embedding in (self.embedding, self.position):
            nn.init.normal_(embedding.weight)
        for layer, gain in ((self.expand, TANH_GAIN), (self.contract, 1.0), (self.head, HEAD_GAIN)):
            nn.init.normal_(layer.weight, std=gain * layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def features(
        self, idx: Tensor, at: Tensor, keys: Tensor | None = None, state: dict[str, Any] | None = None
    ) -> Tensor:
        """As `SequenceModel.features`; the state is the sum of the embeddings, and their number."""
        t = idx.shape[1]
        done, sums = (0, 0.0) if not state else (state["count"], state["sum"])
        x = self.embedding(idx) + self.position.weight[done : done + t]  # (B, t, D)
        sums = x.cumsum(1) + sums
        if state is not None:
            state["count"], state["sum"] = done + t, sums[:, -1:]
        counts = torch.arange(done + 1, done + t + 1, device=x.device, dtype=x.dtype)[:, None]
        y = (x + sums / counts).flatten(0, 1)[at]  # (n, D)
        hidden = self.dropout(torch.tanh(self.expand(y)), keys_at(keys, at, t))
        return y + self.contract(hidden)
