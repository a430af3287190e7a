"""A decoder-only transformer with the architecture of GPT-2, as in nanoGPT.

    x_t    = C[token_t] + P[t]                                    token and position embeddings
    x     += Attention(LayerNorm(x)),  x += MLP(LayerNorm(x))     n_layer times
    logits = LayerNorm(x) C^T                                     the head shares its weight with the embedding C

Every position predicts the next token. There are no biases, dropout follows both attention and MLP, and the layers that
write to the residual stream x are initialized with 1 / sqrt(2 n_layer) of the usual standard deviation. Radford et al.
(2019), "Language Models are Unsupervised Multitask Learners"; weight tying: Press and Wolf (2017).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm.lm.examples import is_target
from charlm.lm.models.base import LanguageModel
from charlm.lm.models.dropout import HEAD, POSITION, Dropout
from charlm.nn import Embedding

INITIAL_STD = 0.02


class Packed(NamedTuple):
    """The positions of a batch (B, t) up to the last target of each row, packed into one dimension.

    A batch of names is padded to its longest name, which doubles the number of positions. Packing skips the padding in
    every layer but attention, which needs whole rows.
    """

    where: Tensor  # (n,) int64 indices into the B * t positions
    shape: tuple[int, int]  # B, t

    @classmethod
    def of(cls, targets: Tensor) -> Packed | None:
        """Packs a batch with these targets; None if all positions are needed, or on a GPU or under torch.compile.

        The number of positions depends on the data: it would synchronize a GPU and break a compiled graph.
        """
        if not targets.is_cpu or torch.compiler.is_compiling():
            return None
        counted = is_target(targets)
        if counted[:, -1].all():
            return None
        needed = counted.flip(1).cumsum(1).flip(1) > 0  # a target depends on all positions before it
        return cls(needed.flatten().nonzero().flatten(), tuple(targets.shape))

    def pack(self, x: Tensor) -> Tensor:
        """(B, t, …) → (n, …)."""
        return x.flatten(0, 1).index_select(0, self.where)

    def pad(self, x: Tensor) -> Tensor:
        """(n, D) → (B, t, D)."""
        B, t = self.shape
        return x.new_zeros(B * t, x.shape[1]).index_copy(0, self.where, x).view(B, t, -1)


class Attention(nn.Module):
    """Causal self-attention with `n_head` heads: (B, t, D) → (B, t, D), or (n, D) → (n, D) if packed."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, layer: int = 0) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = Dropout(dropout, layer)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(
        self,
        x: Tensor,
        cache: dict[str, Tensor] | None = None,
        packed: Packed | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """`cache` holds the keys and values of earlier positions, and those of x are appended to it.

        `keys` (B, t) int64 are those of dropout.
        """
        qkv = self.qkv(x)
        if packed is not None:
            qkv = packed.pad(qkv)
        B, t, width = qkv.shape
        q, k, v = qkv.view(B, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # 3 × (B, heads, t, d)
        if cache is not None:
            if cache:
                k, v = torch.cat([cache["k"], k], dim=2), torch.cat([cache["v"], v], dim=2)
            cache["k"], cache["v"] = k, v
        dropout = self.dropout.p if self.training else 0.0
        if dropout and keys is not None:
            y = self._attend(q, k, v, keys)
        else:  # with a cache, t is 1 after the prompt, and a single new token attends to every position
            y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=t > 1, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, t, width // 3)  # (B, heads, t, d) → (B, t, D)
        return self.proj(y if packed is None else packed.pack(y))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, keys: Tensor) -> Tensor:
        """Causal attention with dropout that is a function of `keys` (B, t): 3 × (B, heads, t, d) → the same.

        On the CPU, scaled_dot_product_attention with dropout computes the same steps.
        """
        t = q.shape[2]
        future = torch.ones(t, t, dtype=torch.bool, device=q.device).triu_(1)
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])  # (B, heads, t, t)
        heads = torch.arange(self.n_head, device=q.device)[:, None] * HEAD
        weights = self.dropout(scores.masked_fill(future, -math.inf).softmax(dim=-1), keys[:, None] + heads)
        return weights @ v


class Block(nn.Module):
    """Attention, then an MLP with a GELU layer of four times the width; pre-norm, with residual connections."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, layer: int = 0) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(n_embd, bias=False)
        self.attention = Attention(n_embd, n_head, dropout, 3 * layer + 1)
        self.norm_2 = nn.LayerNorm(n_embd, bias=False)
        self.expand = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.contract = nn.Linear(4 * n_embd, n_embd, bias=False)
        self.dropout_1 = Dropout(dropout, 3 * layer + 2)
        self.dropout_2 = Dropout(dropout, 3 * layer + 3)

    def forward(
        self,
        x: Tensor,
        cache: dict[str, Tensor] | None = None,
        packed: Packed | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """x (B, t, D), or (n, D) if packed → the same; keys (B, t) int64 or None."""
        rows = keys if keys is None or packed is None else packed.pack(keys)  # the key of each row of x
        x = x + self.dropout_1(self.attention(self.norm_1(x), cache, packed, keys), rows)
        return x + self.dropout_2(self.contract(nn.functional.gelu(self.expand(self.norm_2(x)))), rows)


class GPT(LanguageModel):
    """A GPT whose head and embedding share one weight.

    Args:
        vocab_size: As in `LanguageModel`.
        block_size: As in `LanguageModel`.
        pad_token: As in `LanguageModel`.
        n_layer: Number of blocks.
        n_head: Number of attention heads, a divisor of n_embd.
        n_embd: Width D of the model.
        dropout: Dropout probability of embeddings, attention weights, and the outputs of attention and MLP.

    Raises:
        ValueError: n_head does not divide n_embd.
    """

    predicts_every_position = True

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        pad_token: int = 0,
        *,
        n_layer: int,
        n_head: int,
        n_embd: int,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, block_size, pad_token)
        if n_embd % n_head:
            raise ValueError(f"n_head is {n_head}, but must divide n_embd, which is {n_embd}")
        self.embedding = Embedding(vocab_size, n_embd)
        self.position = Embedding(block_size, n_embd)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout, layer) for layer in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes weights from N(0, 0.02²), scaled down where a block writes to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("proj.weight", "contract.weight"))
                scale = 1 / math.sqrt(2 * len(self.blocks)) if residual else 1.0
                nn.init.normal_(parameter, std=INITIAL_STD * scale)

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Computes logits and, if `targets` are given, their mean cross-entropy in nats.

        Args:
            idx: (B, t) tokens of any integer dtype, t ≤ block_size.
            targets: (B, t) the next token of each position, where -100 is ignored; or (B,) the token after the last
                position.

        Returns:
            The logits, (B, V) for targets (B,) and otherwise (B, t, V), and the loss, () or None.
        """
        hidden = self._hidden(idx)  # (B, t, D)
        if targets is not None and targets.dim() == 1:
            hidden = hidden[:, -1]  # (B, D)
        logits = nn.functional.linear(hidden, self.embedding.weight)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    def loss(self, idx: Tensor, targets: Tensor, reduction: str = "mean", keys: Tensor | None = None) -> Tensor:
        """As `LanguageModel.loss`, for the targets of `forward`; the logits are never materialized."""
        if targets.dim() == 1:
            return self.loss_of(self._hidden(idx, keys=keys)[:, -1], targets, reduction)
        packed = Packed.of(targets)
        if packed is None:
            return self.loss_of(self._hidden(idx, keys=keys), targets, reduction)
        loss = self.loss_of(self._hidden(idx, packed=packed, keys=keys), packed.pack(targets), reduction)
        return packed.pad(loss[:, None]).view(targets.shape) if reduction == "none" else loss

    def embed(self, idx: Tensor, start: int = 0, packed: Packed | None = None, keys: Tensor | None = None) -> Tensor:
        """The input of the first block: (B, t) at positions start, start + 1, … → (B, t, D), or (n, D) if packed.

        `keys` (B, t) int64 are those of dropout.
        """
        if packed is not None:
            embedded = self.embedding(packed.pack(idx)) + self.position(packed.where % idx.shape[1])
            return self.dropout(embedded, None if keys is None else packed.pack(keys))
        positions = self.position.weight  # (block_size, D)
        if idx.shape[1] < self.block_size:
            positions = positions[start : start + idx.shape[1]]  # (t, D)
        return self.dropout(self.embedding(idx).add_(positions), keys)

    def loss_of(self, hidden: Tensor, targets: Tensor, reduction: str = "mean") -> Tensor:
        """The loss from the output of the last block: hidden (…, D), targets (…) → () or, with "none", (…)."""
        loss = F.linear_cross_entropy(
            hidden.flatten(0, -2), self.embedding.weight, targets.flatten(), reduction=reduction
        )
        return loss.view(targets.shape) if reduction == "none" else loss

    def next_logits(self, sequence: Tensor, cache: dict[str, Any]) -> Tensor:
        """As `LanguageModel.next_logits`. The cache holds keys and values, so that a new token computes one position.

        Once the window is full, each new token shifts every position, and the whole window is computed again.
        """
        start = torch.full((len(sequence), 1), self.pad_token, dtype=torch.int64, device=sequence.device)
        window = torch.cat([start, sequence], dim=1)[:, -self.block_size :]
        if sequence.shape[1] >= self.block_size:
            hidden = self._hidden(window)
        else:
            layers = cache.setdefault("layers", [{} for _ in self.blocks])
            done = cache.get("length", 0)
            cache["length"] = window.shape[1]
            hidden = self._hidden(window[:, done:], layers, done)
        return nn.functional.linear(hidden[:, -1], self.embedding.weight)

    def _hidden(
        self,
        idx: Tensor,
        caches: list[dict[str, Tensor]] | None = None,
        start: int = 0,
        packed: Packed | None = None,
        keys: Tensor | None = None,
    ) -> Tensor:
        """(B, t) tokens at positions start, start + 1, … → (B, t, D), or (n, D) if packed; keys (B,) int64 or None."""
        if keys is not None:
            keys = keys[:, None] + torch.arange(start, start + idx.shape[1], device=idx.device) * POSITION  # (B, t)
        x = self.embed(idx, start, packed, keys)
        for block, cache in zip(self.blocks, caches or [None] * len(self.blocks), strict=True):
            x = block(x, cache, packed, keys)
        return self.norm(x)
