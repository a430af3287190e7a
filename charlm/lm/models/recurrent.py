"""Recurrent networks: a state that each token changes, from which the next token is predicted.

    a      = W x_t + b + U h_{t-1}                        one row block of W, b and U per gate
    RNN    h_t = tanh(a)
    GRU    h_t = (1 - z) n + z h_{t-1}                    r, z = sigmoid(a_r, a_z)
           n   = tanh(W_n x_t + b_n + r U_n h_{t-1})
    LSTM   h_t = o tanh(c_t)                              i, f, o = sigmoid(a_i, a_f, a_o)
           c_t = f c_{t-1} + i tanh(a_g)
    logits = h_t V + d

x_t is an embedding, or the state of the layer below. Each row of a batch begins with a learned state, and sees no other
row. Elman (1990), "Finding Structure in Time"; Cho et al. (2014), "Learning Phrase Representations using RNN
Encoder–Decoder", with the reset gate r behind the product U_n h as in torch.nn.GRU, so that a step is one product (in
makemore it is before: U_n (r h)); Hochreiter and Schmidhuber (1997), "Long Short-Term Memory", with the forget gate of
Gers et al. (2000).

The products W x_t of all positions are one op, in the first layer a gather of rows of the product of W and the
embedding. The loop over time is ours: on one CPU core it takes 0.75 of the time of torch.nn.GRU, forward and backward,
for 256 names and 192 units, and as long for 32 names and 64 units.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import charlm.functional as F
from charlm.lm.models.dropout import Dropout
from charlm.lm.models.sequence import SequenceModel, keys_at
from charlm.nn import Embedding

INPUT_GAIN = 0.5  # so that the gates begin half open

State = tuple[Tensor, ...]  # each (B, H); the first is the output


class Steps(NamedTuple):
    """The positions of a batch (B, t) that are computed, n of them: those of the first step, then of the second, …

    A batch of names is padded to its longest name, which doubles the number of positions. In each step the rows are in
    the same order, longest first, so that those that go on are the first ones.
    """

    where: Tensor  # (n,) int64 places among the B * t positions
    sizes: list[int]  # the number of positions of each step
    places: Tensor  # (len(at),) int64 where each place of `at` is among the n

    @classmethod
    def of(cls, at: Tensor, B: int, t: int, whole: bool = False) -> Steps:
        """Each row up to the last of its places `at`; all of it if `whole`, or on a GPU, which would wait for it."""
        if whole or not at.is_cpu:
            every = torch.arange(B * t, device=at.device)
            return cls(every.view(B, t).t().flatten(), [B] * t, at % t * B + at // t)
        lengths = torch.ones(B, dtype=torch.int64).scatter_reduce(0, at // t, at % t + 1, "amax")
        lengths, order = lengths.sort(descending=True, stable=True)
        inside = torch.arange(t)[:, None] < lengths  # (t, B)
        step, rank = inside.nonzero().unbind(1)  # (n,) each
        sizes = inside.sum(1)
        begins = sizes.cumsum(0) - sizes
        places = begins[at % t] + order.argsort()[at // t]
        return cls(order[rank] * t + step, sizes.tolist(), places)


class Cell(nn.Module):
    """One layer: `gates` products of the width H of the state, of the input and of the last output.

    Args:
        n_input: Width D of the input.
        n_hidden: Width H of the state.
    """

    gates = 1
    states = 1

    def __init__(self, n_input: int, n_hidden: int) -> None:
        super().__init__()
        self.input = nn.Linear(n_input, self.gates * n_hidden)
        self.recurrent = nn.Linear(n_hidden, self.gates * n_hidden, bias=False)
        self.start = nn.Parameter(torch.zeros(self.states, n_hidden))

    def step(self, x: Tensor, u: Tensor, state: State) -> State:
        """The next state from W x + b and U h, (B, gates * H) each, and the last state."""
        raise NotImplementedError

    def forward(self, x: Tensor, sizes: list[int], state: State | None = None) -> tuple[Tensor, State]:
        """The outputs of all steps, (n, H), and the state after the last one.

        Args:
            x: (n, gates * H) the products W x + b of the first step's rows, then those of the second's, …
            sizes: The number of rows of each step, which does not increase; their sum is n.
            state: The state before the first step; None is the learned one.
        """
        state = state or tuple(start.expand(sizes[0], -1) for start in self.start)
        outputs = []
        for rows in x.to(self.start.dtype).split(sizes):  # (B_t, gates * H), float32 under autocast too
            state = tuple(part[: len(rows)] for part in state)
            state = self.step(rows, self.recurrent(state[0]).to(rows.dtype), state)
            outputs.append(state[0])
        return torch.cat(outputs), state


class RNNCell(Cell):
    """The layer of Elman (1990)."""

    def step(self, x: Tensor, u: Tensor, state: State) -> State:
        return (torch.tanh(x + u),)


class GRUCell(Cell):
    """The layer of Cho et al. (2014), gates r, z, n; that of torch.nn.GRU whose bias_hh is 0."""

    gates = 3

    def step(self, x: Tensor, u: Tensor, state: State) -> State:
        H = x.shape[1] // 3
        r, z = torch.sigmoid(x[:, : 2 * H] + u[:, : 2 * H]).chunk(2, dim=1)
        n = torch.tanh(torch.addcmul(x[:, 2 * H :], r, u[:, 2 * H :]))
        return (torch.lerp(n, state[0], z),)


class LSTMCell(Cell):
    """The layer of Hochreiter and Schmidhuber (1997), gates i, f, o, g; its state is h and c."""

    gates = 4
    states = 2

    def step(self, x: Tensor, u: Tensor, state: State) -> State:
        a = x + u
        H = a.shape[1] // 4
        i, f, o = torch.sigmoid(a[:, : 3 * H]).chunk(3, dim=1)
        c = torch.addcmul(f * state[1], i, torch.tanh(a[:, 3 * H :]))
        return o * torch.tanh(c), c


class Recurrent(SequenceModel):
    """A recurrent network of n_layer layers; the subclass says of which.

    Args:
        vocab_size, block_size, pad_token: As in `LanguageModel`.
        n_embd: Width D of an embedding.
        n_hidden: Width H of the state.
        n_layer: Number of layers.
        dropout: Dropout probability of the output of each layer; the state that it goes on with is whole.
    """

    cell: type[Cell]

    def __init__(
        self,
        vocab_size: int,
        block_size: int,
        pad_token: int = 0,
        *,
        n_embd: int,
        n_hidden: int,
        n_layer: int = 1,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(vocab_size, block_size, pad_token)
        self.embedding = Embedding(vocab_size, n_embd)
        self.layers = nn.ModuleList(self.cell(n_hidden if i else n_embd, n_hidden) for i in range(n_layer))
        self.dropouts = nn.ModuleList(Dropout(dropout, layer) for layer in range(n_layer))
        self.head = nn.Linear(n_hidden, vocab_size)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initializes embeddings from N(0, 1), the input with a small gain, the softmax layer with 1, and biases 0.

        U is orthogonal for each gate (Saxe et al. 2014). The bias of the forget gate is 1 (Gers et al. 2000).
        """
        nn.init.normal_(self.embedding.weight)
        for layer in self.layers:
            nn.init.normal_(layer.input.weight, std=INPUT_GAIN * layer.input.in_features**-0.5)
            nn.init.zeros_(layer.input.bias)
            nn.init.zeros_(layer.start)
            for gate in layer.recurrent.weight.data.chunk(layer.gates):
                nn.init.orthogonal_(gate)
            if isinstance(layer, LSTMCell):
                nn.init.ones_(layer.input.bias.data.chunk(4)[1])
        nn.init.normal_(self.head.weight, std=self.head.in_features**-0.5)
        nn.init.zeros_(self.head.bias)

    def features(
        self, idx: Tensor, at: Tensor, keys: Tensor | None = None, state: dict[str, Any] | None = None
    ) -> Tensor:
        """As `SequenceModel.features`; a row is computed up to the last of its places `at`."""
        steps = Steps.of(at, *idx.shape, whole=state is not None)
        keys = keys_at(keys, steps.where, idx.shape[1])
        first = self.layers[0].input
        x = F.embedding_linear(idx.flatten()[steps.where][:, None], self.embedding.weight, first.weight, first.bias)
        befores = state["layers"] if state else [None] * len(self.layers)
        ends = []
        for number, (layer, dropout, before) in enumerate(zip(self.layers, self.dropouts, befores, strict=True)):
            x, end = layer(layer.input(x) if number else x, steps.sizes, before)
            x = dropout(x, keys)  # (n, H)
            ends.append(end)
        if state is not None:
            state["layers"] = ends
        return x[steps.places]


class RNN(Recurrent):
    """A simple recurrent network."""

    cell = RNNCell


class GRU(Recurrent):
    """A network of gated recurrent units."""

    cell = GRUCell


class LSTM(Recurrent):
    """A network of long short-term memory."""

    cell = LSTMCell
