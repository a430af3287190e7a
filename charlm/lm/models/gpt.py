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

from charlm.lm.models.dropout import HEAD, POSITION, Dropout
from charlm.lm.models.sequence import SequenceModel
from charlm.nn import Embedding

INITIAL_STD = 0.02


class Packed(NamedTuple):
    """The positions of a batch (B, t) that are computed, n of them, as rows of one matrix.

    A batch of names is padded to its longest name, which doubles the number of positions. Packing skips the padding in
    every layer but attention, which needs whole rows.
    """

    where: Tensor | None  # (n,) int64 indices into the B * t positions, increasing; None for all of them
    shape: tuple[int, int]  # B, t

    @classmethod
    def of(cls, at: Tensor, B: int, t: int) -> Packed:
        """Each row up to the last of its places `at`; all of it on a GPU or under torch.compile.

        The number of positions depends on the data: it would synchronize a GPU and break a compiled graph.
        """
        if not at.is_cpu or torch.compiler.is_compiling():
            return cls(None, (B, t))
        lengths = torch.zeros(B, dtype=torch.int64).scatter_reduce(0, at // t, at % t + 1, "amax")
        inside = torch.arange(t) < lengths[:, None]  # (B, t)
        return cls(None if inside.all() else inside.flatten().nonzero().flatten(), (B, t))

    def pack(self, x: Tensor) -> Tensor:
        """(B, t, …) → (n, …)."""
        x = x.flatten(0, 1)
        return x if self.where is None else x.index_select(0, self.where)

    def pad(self, x: Tensor) -> Tensor:
        """(n, D) → (B, t, D)."""
        B, t = self.shape
        if self.where is not None:
            x = x.new_zeros(B * t, x.shape[1]).index_copy(0, self.where, x)
        return x.view(B, t, -1)


class Attention(nn.Module):
    """Causal self-attention with `n_head` heads: (n, D) → (n, D)."""

    def __init__(self, n_embd: int, n_head: int, dropout: float, layer: int = 0) -> None:
        super().__init__()
        self.n_head = n_head
        self.dropout = Dropout(dropout, layer)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)

    def forward(self, x: Tensor, packed: Packed, cache: dict[str, Tensor] | None, keys: Tensor | None) -> Tensor:
        """`cache` holds the keys and values of earlier positions, and those of x are appended to it.

        `keys` (B, t) int64 are those of dropout.
        """
        qkv = packed.pad(self.qkv(x))
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
        return self.proj(packed.pack(y))

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

    def forward(self, x: Tensor, packed: Packed, cache: dict[str, Tensor] | None, keys: Tensor | None) -> Tensor:
        """(n, D) → (n, D); `cache` and `keys` as in `Attention`."""
        rows = None if keys is None else packed.pack(keys)  # (n,) the key of each row of x
        x = x + self.dropout_1(self.attention(self.norm_1(x), packed, cache, keys), rows)
        return x + self.dropout_2(self.contract(nn.functional.gelu(self.expand(self.norm_2(x)))), rows)


class GPT(SequenceModel):
    """A GPT whose head and embedding share one weight.

    Args:
        vocab_size, block_size, pad_token: As in `LanguageModel`.
        n_layer: Number of blocks.
        n_head: Number of attention heads, a divisor of n_embd.
        n_embd: Width D of the model.
        dropout: Dropout probability of embeddings, attention weights, and the outputs of attention and MLP.

    Raises:
        ValueError: n_head does not divide n_embd.
    """

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

    @property
    def output(self) -> tuple[Tensor, Tensor | None]:
        return self.embedding.weight, None

    def features(
        self, idx: Tensor, at: Tensor, keys: Tensor | None = None, state: dict[str, Any] | None = None
    ) -> Tensor:
        """As `SequenceModel.features`; the state is the keys and values of attention, and the number of tokens."""
        t = idx.shape[1]
        packed = Packed.of(at, *idx.shape)
        done, caches = 0, [None] * len(self.blocks)
        if state is not None:
            done, caches = state.get("count", 0), state.setdefault("layers", [{} for _ in self.blocks])
            state["count"] = done + t
        if packed.where is None:
            positions = self.position.weight  # (block_size, D)
            if t < self.block_size:
                positions = positions[done : done + t]  # (t, D)
            x = self.embedding(idx).add_(positions).flatten(0, 1)  # (B * t, D)
        else:
            x = self.embedding(packed.pack(idx)) + self.position(packed.where % t)  # (n, D)
        if keys is not None:
            keys = keys[:, None] + torch.arange(t, device=idx.device) * POSITION  # (B, t)
        x = self.dropout(x, None if keys is None else packed.pack(keys))
        for block, cache in zip(self.blocks, caches, strict=True):
            x = block(x, packed, cache, keys)
        x = self.norm(x)
        if len(at) == len(x):
            return x
        return x[at if packed.where is None else torch.searchsorted(packed.where, at)]
