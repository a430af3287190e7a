"""A hierarchical model in the style of WaveNet, as in part 5 of makemore.

    h_0    = C[x_1], …, C[x_T]                                 T embeddings
    h_l+1  = tanh(BatchNorm(W_l [h_l at 2i, h_l at 2i + 1]))   half as many positions
    logits = h_L U + d                                         one position is left after L = log2(T) layers

The layers merge pairs of neighbours, which makes a binary tree over T characters. This is the dilated causal
convolution of van den Oord et al. (2016), "WaveNet", evaluated at the last position only. The first layer is fused with
the embedding into one op that gathers rows of C W_0, and the loss does not materialize the logits.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm.lm.models.base import LanguageModel
from charlm.lm.models.batch_norm import BatchNorm
from charlm.lm.models.dropout import POSITION, Dropout
from charlm.lm.models.mlp import HEAD_GAIN, TANH_GAIN
from charlm.nn import Embedding


class WaveNet(LanguageModel):
    """A binary tree of tanh layers over the context.

    Args:
        vocab_size, pad_token: As in `LanguageModel`.
        block_size: Length T of the context, a power of two.
        n_embd: Width D of an embedding.
        n_hidden: Width H of every layer.
        dropout: Dropout probability of the hidden units of each layer.

    Raises:
        ValueError: block_size is not a power of two, or is below 2.
    """

    def __init__(
        self, vocab_size: int, block_size: int, pad_token: int = 0, *, n_embd: int, n_hidden: int, dropout: float = 0.0
    ) -> None:
        super().__init__(vocab_size, block_size, pad_token)
        n_layer = block_size.bit_length() - 1
        if block_size < 2 or block_size != 2**n_layer:
            raise ValueError(f"block_size is {block_size}, but must be a power of two, at least 2")
        self.embedding = Embedding(vocab_size, n_embd)
        widths = [n_embd, *[n_hidden] * (n_layer - 1)]
        # No bias, because batch normalization has one.
        self.layers = nn.ModuleList(nn.Linear(2 * width, n_hidden, bias=False) for width in widths)
        self.norms = nn.ModuleList(BatchNorm(n_hidden) for _ in widths)
        self.dropouts = nn.ModuleList(Dropout(dropout, layer) for layer in range(n_layer))
        self.head = nn.Linear(n_hidden, vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes embeddings from N(0, 1), the tanh layers with their gain, a small softmax layer, its bias 0."""
        nn.init.normal_(self.embedding.weight)
        for layer in self.layers:
            nn.init.normal_(layer.weight, std=TANH_GAIN / math.sqrt(layer.in_features))
        nn.init.normal_(self.head.weight, std=HEAD_GAIN / math.sqrt(self.head.in_features))
        nn.init.zeros_(self.head.bias)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        logits = self.head(self._hidden(idx))  # (B, T) → (B, H) → (B, V)
        return logits, None if targets is None else F.cross_entropy(logits, targets)

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """As `LanguageModel.loss`; the logits are never materialized."""
        return F.linear_cross_entropy(
            self._hidden(idx, keys), self.head.weight, targets, linear_bias=self.head.bias, reduction=reduction
        )

    def _hidden(self, idx: Tensor, keys: Tensor | None = None) -> Tensor:
        """(B, T) → (B, H)."""
        first, *rest = self.layers
        pairs = idx.reshape(-1, 2)  # (B * T/2, 2)
        x = F.embedding_linear(pairs, self.embedding.weight, first.weight)  # (B * T/2, H)
        x = self._activate(x, 0, keys)
        for number, layer in enumerate(rest, start=1):
            x = layer(x.view(-1, 2 * x.shape[1]))  # concatenate two neighbours: (B * t, H) → (B * t/2, H)
            x = self._activate(x, number, keys)
        return x

    def _activate(self, x: Tensor, number: int, keys: Tensor | None) -> Tensor:
        """Norm, tanh and dropout of layer `number`: x (B * t, H), keys (B,) → (B * t, H)."""
        if keys is not None:
            positions = torch.arange(len(x) // len(keys), device=x.device)
            keys = (keys[:, None] + positions * POSITION).flatten()
        return self.dropouts[number](torch.tanh(self.norms[number](x)), keys)
