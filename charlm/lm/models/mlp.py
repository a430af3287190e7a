"""The neural language model of Bengio et al. (2003), as in parts 2 and 3 of makemore.

    e      = concat(C[x_1], …, C[x_T])         the last T characters, each a row of the embedding C
    h      = tanh(e W + b)                     or tanh(BatchNorm(e W))
    logits = h U + d

The product e W is a sum of rows of C W, and the loss does not materialize the logits; docs/skip_the_matmul.md derives
both.

"A Neural Probabilistic Language Model", JMLR 3, 2003; without the direct connections from e to the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm.lm.models.base import LanguageModel
from charlm.lm.models.batch_norm import BatchNorm
from charlm.lm.models.dropout import Dropout
from charlm.nn import Embedding

TANH_GAIN = 5 / 3  # keeps the variance of a tanh network's activations through depth
HEAD_GAIN = 0.1  # small logits, so that the initial loss is log V (makemore part 3)


class MLP(LanguageModel):
    """An MLP over the embedded context window, with one tanh layer.

    Args:
        vocab_size, block_size, pad_token: As in `LanguageModel`.
        n_embd: Width D of an embedding.
        n_hidden: Width H of the tanh layer.
        batch_norm: Batch normalization of the input of the tanh; its bias replaces b.
        dropout: Dropout probability of the hidden units.
    """

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        pad_token: int = 0,
        *,
        n_embd: int,
        n_hidden: int,
        batch_norm: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, block_size, pad_token)
        self.embedding = Embedding(vocab_size, n_embd)
        self.hidden = nn.Linear(block_size * n_embd, n_hidden, bias=not batch_norm)
        self.norm = BatchNorm(n_hidden) if batch_norm else nn.Identity()
        self.dropout = Dropout(dropout)
        self.head = nn.Linear(n_hidden, vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes embeddings from N(0, 1), the tanh layer with its gain, a small softmax layer, and biases 0."""
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.hidden.weight, std=TANH_GAIN / math.sqrt(self.hidden.in_features))
        nn.init.normal_(self.head.weight, std=HEAD_GAIN / math.sqrt(self.head.in_features))
        for bias in (self.hidden.bias, self.head.bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(self._hidden(idx))  # (B, T) → (B, H) → (B, V)
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """As `LanguageModel.loss`; the logits are never materialized."""
        hidden = self._hidden(idx, keys)  # (B, H)
        return F.linear_cross_entropy(
            hidden, self.head.weight, targets, linear_bias=self.head.bias, reduction=reduction
        )

    def forward_textbook(self, idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` as textbooks write it: one-hot rows times C, and the loss from an explicit softmax.

        Values and gradients are equal. It documents and tests the model, and is not used for training.
        """
        one_hot = torch.nn.functional.one_hot(idx.long(), self.vocab_size).to(self.embedding.weight.dtype)
        embedded = one_hot @ self.embedding.weight  # (B, T, V) @ (V, D) → (B, T, D)
        hidden = torch.tanh(self.norm(self.hidden(embedded.flatten(1))))  # (B, T * D) @ (T * D, H) → (B, H)
        logits = self.head(self.dropout(hidden))  # (B, H) @ (H, V) → (B, V)
        probabilities = logits.softmax(dim=-1)  # (B, V)
        picked = probabilities[torch.arange(len(targets), device=targets.device), targets.long()]  # (B,)
        return logits, -picked.log().mean()

    def _hidden(self, idx: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, T) → (B, H)."""
        layers = (self.embedding.weight, self.hidden.weight, self.hidden.bias)
        if isinstance(self.norm, nn.Identity):
            hidden = F.embedding_linear(idx, *layers, activation="tanh")
        else:
            hidden = torch.tanh(self.norm(F.embedding_linear(idx, *layers)))
        return self.dropout(hidden, keys)
