"""The networks of charlm in plain torch: mlp, wavenet, bow, rnn, gru, lstm, gpt.

This file needs torch alone. `charlm export` puts it beside the weights. Each network maps tokens to logits:

    tokens (B, t) int64  →  (B, t, V), in [:, i] the logits of the token after tokens[:, : i + 1]

A network sees the last block_size tokens T. A text begins with the start token, which also fills the windows of mlp and
wavenet before the text. These two take any t; the others at most T, and `logits_of` slides them over longer texts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, pad, scaled_dot_product_attention

WINDOWS = 64  # that `logits_of` computes at once


class Network(nn.Module):
    """What all networks have: the arguments that the others call `shared`, and the embedding."""

    any_length = False

    def __init__(self, vocab_size: int, block_size: int, start_token: int, n_embd: int) -> None:
        super().__init__()
        self.vocab_size, self.block_size, self.start_token = vocab_size, block_size, start_token
        self.embedding = nn.Embedding(vocab_size, n_embd)


class MLP(Network):
    """An embedded window, a tanh layer and a softmax layer (Bengio et al. 2003)."""

    any_length = True

    def __init__(self, n_embd: int, n_hidden: int, batch_norm: bool, **shared: int) -> None:
        super().__init__(n_embd=n_embd, **shared)
        self.hidden = nn.Linear(self.block_size * n_embd, n_hidden, bias=not batch_norm)
        self.norm = nn.BatchNorm1d(n_hidden) if batch_norm else nn.Identity()
        self.head = nn.Linear(n_hidden, self.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        B, t = tokens.shape
        T = self.block_size
        at = torch.arange(t, device=tokens.device)[:, None] + torch.arange(T, device=tokens.device)  # (t, T)
        windows = pad(tokens, (T - 1, 0), value=self.start_token)[:, at]  # (B, t, T)
        x = self.embedding(windows).view(B * t, -1)  # (B * t, T * D)
        return self.head(torch.tanh(self.norm(self.hidden(x)))).view(B, t, -1)


class WaveNet(Network):
    """A binary tree of tanh layers over the window, whose nodes neighbouring windows share: a dilated convolution."""

    any_length = True

    def __init__(self, n_embd: int, n_hidden: int, **shared: int) -> None:
        super().__init__(n_embd=n_embd, **shared)
        widths = [n_embd, *[n_hidden] * (self.block_size.bit_length() - 2)]  # block_size is 2 ** len(widths)
        self.layers = nn.ModuleList(nn.Linear(2 * width, n_hidden, bias=False) for width in widths)
        self.norms = nn.ModuleList(nn.BatchNorm1d(n_hidden) for _ in widths)
        self.head = nn.Linear(n_hidden, self.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(pad(tokens, (self.block_size - 1, 0), value=self.start_token))  # (B, T - 1 + t, D)
        for number, (layer, norm) in enumerate(zip(self.layers, self.norms, strict=True)):
            distance = 2**number
            x = layer(torch.cat([x[:, :-distance], x[:, distance:]], dim=2))  # shorter by `distance`; t in the end
            x = torch.tanh(norm(x.transpose(1, 2)).transpose(1, 2))  # (B, …, H)
        return self.head(x)


class BoW(Network):
    """A bag of words: the mean of the embeddings so far, then an MLP, as in makemore."""

    def __init__(self, n_embd: int, n_hidden: int, **shared: int) -> None:
        super().__init__(n_embd=n_embd, **shared)
        self.position = nn.Embedding(self.block_size, n_embd)
        self.expand = nn.Linear(n_embd, n_hidden)
        self.contract = nn.Linear(n_hidden, n_embd)
        self.head = nn.Linear(n_embd, self.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embedding(tokens) + self.position(positions)  # (B, t, D)
        y = x + x.cumsum(1) / (positions + 1)[:, None]
        return self.head(y + self.contract(torch.tanh(self.expand(y))))


class Recurrent(Network):
    """torch's recurrent layers, of type "rnn", "gru" or "lstm", which begin with a learned state."""

    def __init__(self, type: str, n_embd: int, n_hidden: int, n_layer: int, **shared: int) -> None:
        super().__init__(n_embd=n_embd, **shared)
        layers = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[type]
        self.layers = layers(n_embd, n_hidden, n_layer, batch_first=True)
        self.start = nn.Parameter(torch.zeros(2 if type == "lstm" else 1, n_layer, n_hidden))  # h, and c of the lstm
        self.head = nn.Linear(n_hidden, self.vocab_size)

    def forward(self, tokens: Tensor) -> Tensor:
        B = tokens.shape[0]
        states = [state[:, None].expand(-1, B, -1).contiguous() for state in self.start]  # (n_layer, B, H) each
        x, _ = self.layers(self.embedding(tokens), tuple(states) if len(states) == 2 else states[0])
        return self.head(x)  # (B, t, H) → (B, t, V)


class Block(nn.Module):
    """Causal self-attention, then an MLP; pre-norm, with residual connections."""

    def __init__(self, n_embd: int, n_head: int) -> None:
        super().__init__()
        self.n_head = n_head
        self.norm_1, self.norm_2 = nn.LayerNorm(n_embd, bias=False), nn.LayerNorm(n_embd, bias=False)
        self.qkv = nn.Linear(n_embd, 3 * n_embd, bias=False)
        self.proj = nn.Linear(n_embd, n_embd, bias=False)
        self.expand = nn.Linear(n_embd, 4 * n_embd, bias=False)
        self.contract = nn.Linear(4 * n_embd, n_embd, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        B, t, D = x.shape
        q, k, v = self.qkv(self.norm_1(x)).view(B, t, 3, self.n_head, -1).permute(2, 0, 3, 1, 4)  # 3 × (B, heads, t, d)
        y = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.proj(y.transpose(1, 2).reshape(B, t, D))
        return x + self.contract(gelu(self.expand(self.norm_2(x))))


class GPT(Network):
    """A transformer as in nanoGPT, without biases; the head and the embedding share one weight."""

    def __init__(self, n_layer: int, n_head: int, n_embd: int, **shared: int) -> None:
        super().__init__(n_embd=n_embd, **shared)
        self.position = nn.Embedding(self.block_size, n_embd)
        self.blocks = nn.ModuleList(Block(n_embd, n_head) for _ in range(n_layer))
        self.norm = nn.LayerNorm(n_embd, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position(torch.arange(tokens.shape[1], device=tokens.device))  # (B, t, D)
        for block in self.blocks:
            x = block(x)
        return linear(self.norm(x), self.embedding.weight)


def build_network(type: str, **arguments: Any) -> Network:
    """Builds a network of `type` with new weights; the arguments are those of its class and of Network."""
    if type in ("rnn", "gru", "lstm"):
        return Recurrent(type=type, **arguments)
    return {"mlp": MLP, "wavenet": WaveNet, "bow": BoW, "gpt": GPT}[type](**arguments)


def logits_of(network: Network, tokens: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """The logits of `network` for tokens (B, t) of any t: (B, t, V). Behind block_size each position has its window.

    `run` computes in place of the network.
    """
    T, run = network.block_size, run or network
    if network.any_length or tokens.shape[1] <= T:
        return run(tokens)
    windows = tokens.unfold(1, T, 1)[:, 1:].flatten(0, 1)  # (B * (t - T), T)
    last = torch.cat([run(part)[:, -1] for part in windows.split(WINDOWS)])  # (B * (t - T), V)
    return torch.cat([run(tokens[:, :T]), last.view(len(tokens), -1, last.shape[1])], dim=1)
