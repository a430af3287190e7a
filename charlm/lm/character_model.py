"""A trained model with its vocabulary: text in, surprisals and texts out.

The surprisal of character x_t is -log p(x_t | x_<t). In line format a text is one item, and its end is predicted
too; in running text the characters before the first are imagined newlines. So the surprisals of a split's items
add up to what `charlm eval` averages.

A character outside the vocabulary is an error, or is escaped. With escapes a position is coded in two steps:
escape or not, with probability ε or 1 - ε; then a token of the model, or one of the M - |chars| code points that
are no characters of the vocabulary, each as probable as the next:

    known     -log(1 - ε) - log p(x_t | x_<t)
    unknown   -log ε + log(M - |chars|)             M = 0x110000 code points

The probabilities of a position add up to 1, so the sum is the length of a code that can be decoded (Cover and
Thomas 2006, chapter 5), in bits after division by log 2. It costs a known character 0.0004 bits. What follows an
escape sees the padding token in its place.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import Config
from charlm.lm.errors import UserError
from charlm.lm.evaluate import CHUNK, surprisals
from charlm.lm.examples import in_windows, sequences_of, text_examples, text_windows
from charlm.lm.models import LanguageModel
from charlm.lm.sample import SamplingOptions, sample
from charlm.lm.vocabulary import UNKNOWN, Vocabulary

UNITS = {"nats": 1.0, "bits": math.log(2)}
PREDICTED_AT_ONCE = 1 << 21  # tokens seen by all predictions of a step, a few times 8 bytes each
ITEM_CHARACTERS = 1_000_000  # of a line in a text that comes in pieces


class CharacterModel:
    """What `charlm.load` returns.

    model:      the network, in evaluation mode.
    vocabulary: its characters and their tokens.
    config:     how it was trained.
    format:     "line", where a text is one item and has an end, or "text".
    """

    def __init__(self, checkpoint: Checkpoint, device: torch.device | str = "cpu") -> None:
        self.model: LanguageModel = checkpoint.build_model(device)
        self.vocabulary: Vocabulary = checkpoint.vocabulary
        self._escaping = replace(self.vocabulary, escapes=True)
        self.config: Config = checkpoint.config
        self.device = torch.device(device)
        self.best_nats: float | None = checkpoint.best_nats

    def __repr__(self) -> str:
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        file = self.config.input_file
        data = {None: "the names that ship with charlm", "-": "standard input"}.get(file, repr(file))
        loss = "" if self.best_nats is None else f", {self.best_nats:.4f} nats on dev"
        return (
            f"<charlm {self.config.label}: {parameters:,} parameters, {len(self.vocabulary)} tokens, "
            f"{self.format} format, {data}{loss}>"
        )

    @property
    def format(self) -> str:
        return "line" if self.vocabulary.separator else "text"

    def encode(self, text: str) -> Tensor:
        """The tokens of `text`: (n,) uint8, or int32 where there are more than 256 of them.

        Raises:
            UserError: a character is not in the vocabulary; the text names it and its position.
        """
        return self.vocabulary.encode(text)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """The text of tokens (n,) of any integer dtype; the separator of items is printed "."."""
        return self.vocabulary.decode(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def surprisal(
        self, text: str, *, unit: str = "nats", unknown: str = "error", protocol: str | None = None
    ) -> Tensor:
        """-log p of each character of `text` given those before it.

        Args:
            text: one item in line format, else any text; n characters.
            unit: "nats" or "bits".
            unknown: what a character outside the vocabulary is: an "error", or an "escape" at the cost that the
                     head of this file derives, which then costs every other character 0.0004 bits as well.
            protocol: of running text "sliding", each character given the block_size before it, or "fixed", given those
                      before it in windows of block_size side by side, as nanoGPT has it, which costs a gpt one pass.

        Returns:
            float64 on the CPU: (n + 1,) in line format, the last one of the item's end; (n,) in running text.

        Raises:
            UserError: an unknown character, named with its position; a `unit`, `unknown` or `protocol` that
                       does not exist.
        """
        return self.surprisals([text], unit=unit, unknown=unknown, protocol=protocol)[0]

    def surprisals(
        self, texts: Sequence[str], *, unit: str = "nats", unknown: str = "error", protocol: str | None = None
    ) -> list[Tensor]:
        """`surprisal` of each of `texts`, none of which sees another."""
        if isinstance(texts, str):
            raise TypeError("surprisals() takes a sequence of texts, not str: surprisal() takes one text")
        each = "item" if self.format == "line" else "text"
        names = ["the text"] if len(texts) == 1 else [f"{each} {number}" for number in range(1, len(texts) + 1)]
        return self._surprisals(texts, names, unit, unknown, protocol)

    def total_surprisal(
        self, pieces: Iterable[str], *, unit: str = "nats", unknown: str = "error", protocol: str | None = None
    ) -> tuple[float, int]:
        """The sum of `surprisal` over a text of any length, and how many predictions it has.

        pieces: the text, cut anywhere; in line format every line is an item. The memory taken does not grow with it.

        Raises:
            UserError: as `surprisal`; a line of more than ITEM_CHARACTERS.
        """
        total, count, seen = [], 0, 0
        if self.format == "line":
            for items in _items_of(pieces):
                names = [f"item {number}" for number in range(seen + 1, seen + len(items) + 1)]
                nats = torch.cat(self._surprisals(items, names, unit, unknown, protocol))
                seen, count = seen + len(items), count + len(nats)
                total.append(nats.sum().item())
            return math.fsum(total), count
        _check_choice("unit", unit, tuple(UNITS))
        _check_choice("unknown", unknown, UNKNOWN)
        protocol = self.protocol(protocol)
        before = torch.empty(0, dtype=torch.long)
        for piece in _cut(pieces, self._at_once):
            tokens, escaped = self._tokens(piece, unknown, "the text", count)
            nats = _running_surprisals(self.model, before, tokens, protocol, self.device)
            total.append(self._coded(nats, escaped, unit, unknown).sum().item())
            before = torch.cat([before, tokens])[-self.model.block_size :]
            count += len(tokens)
        return math.fsum(total), count

    def protocol(self, protocol: str | None = None) -> str:
        """What a prediction of `surprisal` sees: "items", or of running text `protocol`, "sliding" if None."""
        if self.format == "line":
            if protocol not in (None, "items"):
                raise UserError(f"protocol {protocol!r} is for running text: items are predicted each on its own")
            return "items"
        if protocol not in (None, "sliding", "fixed"):
            raise UserError(f"unknown protocol {protocol!r} of running text: it is fixed or sliding")
        return protocol or "sliding"

    def _surprisals(
        self, texts: Sequence[str], names: Sequence[str], unit: str, unknown: str, protocol: str | None
    ) -> list[Tensor]:
        _check_choice("unit", unit, tuple(UNITS))
        _check_choice("unknown", unknown, UNKNOWN)
        protocol = self.protocol(protocol)
        encoded = [self._tokens(text, unknown, name) for text, name in zip(texts, names, strict=True)]
        found: list[Tensor] = []
        for batch in _batches([tokens for tokens, _ in encoded], self._at_once):
            if protocol != "fixed" and len(batch) > 1:
                found += _token_surprisals(self.model, batch, self.device)
            else:
                found += [self._in_pieces(tokens, protocol) for tokens in batch]
        return [self._coded(nats, escaped, unit, unknown) for nats, (_, escaped) in zip(found, encoded, strict=True)]

    @property
    def _at_once(self) -> int:
        """How many tokens are predicted at once, a whole number of windows."""
        size = self.model.block_size
        return max(1, PREDICTED_AT_ONCE // (size * size if self.model.predicts_every_position else size)) * size

    def _in_pieces(self, tokens: Tensor, protocol: str) -> Tensor:
        """The surprisals (n,) of one item or text."""
        before, found = tokens[:0], []
        for piece in tokens.split(self._at_once):
            found.append(_running_surprisals(self.model, before, piece, protocol, self.device))
            before = torch.cat([before, piece])[-self.model.block_size :]
        return torch.cat(found)

    def _coded(self, nats: Tensor, escaped: Tensor, unit: str, unknown: str) -> Tensor:
        """The model's surprisals (n,) in `unit`, as the code with escapes has them if `unknown` says so."""
        return (self.vocabulary.with_escapes(nats, escaped) if unknown == "escape" else nats) / UNITS[unit]

    def log_prob(self, text: str, *, unit: str = "nats", unknown: str = "error") -> float:
        """log p(text): the sum of `surprisal`, negated; in line format of the whole item, its end included."""
        return -self.surprisal(text, unit=unit, unknown=unknown).sum().item()

    def generate(
        self,
        prompt: str = "",
        num_samples: int = 20,
        *,
        max_new_tokens: int | None = None,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int = 1337,
    ) -> list[str]:
        """Texts drawn from the model, each beginning with `prompt`; the options are those of `SamplingOptions`.

        Raises:
            UserError: an option out of its range, or a character of the prompt that is not in the vocabulary.
        """
        options = SamplingOptions(num_samples, prompt, max_new_tokens, temperature, top_k, top_p, seed)
        return sample(self.model, self.vocabulary, options, self.device)

    def _tokens(self, text: str, unknown: str, name: str, first: int = 0) -> tuple[Tensor, Tensor]:
        """(n,) or (n + 1,) int64 tokens to predict, and which of them are escapes, which are padding tokens."""
        vocabulary = self._escaping if unknown == "escape" else self.vocabulary
        tokens = vocabulary.encode(text, name, first).long()
        escaped = ~vocabulary.known(text) if vocabulary.escapes else torch.zeros(len(text), dtype=torch.bool)
        if vocabulary.stop_token is not None:
            tokens = torch.cat([tokens, tokens.new_tensor([vocabulary.stop_token])])
            escaped = torch.cat([escaped, escaped.new_tensor([False])])
        return tokens, escaped


def _running_surprisals(
    model: LanguageModel, before: Tensor, tokens: Tensor, protocol: str, device: torch.device
) -> Tensor:
    """-log p of every token of a piece of text: (n,) → (n,) float64 nats on the CPU.

    before: the tokens in front of the piece, all of them up to block_size. With "fixed" the piece begins a window.
    """
    if not len(tokens):
        return torch.empty(0, dtype=torch.float64)
    if protocol != "fixed":
        return _token_surprisals(model, [torch.cat([before, tokens])], device)[0][len(before) :]
    stream, start = torch.cat([before[-1:], tokens]), len(before[-1:])
    if model.predicts_every_position:
        asked = text_windows(stream.int(), start, model.block_size, model.pad_token)
    else:
        asked = in_windows(text_examples(stream, start, model.block_size, model.pad_token), model.pad_token)
    return surprisals(model, asked.to(device)).double().cpu()


def _cut(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The text of `pieces`, `size` characters at a time."""
    rest = ""
    for piece in pieces:
        rest += piece
        whole = len(rest) // size * size
        yield from (rest[at : at + size] for at in range(0, whole, size))
        rest = rest[whole:]
    if rest:
        yield rest


def _items_of(pieces: Iterable[str]) -> Iterator[list[str]]:
    """The items of a text that comes in pieces: those that end in a piece together."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        if max(map(len, [*lines, rest])) > ITEM_CHARACTERS:
            raise UserError(f"a line has more than {ITEM_CHARACTERS:,} characters: it is no item")
        if items := [item for line in lines if (item := line.strip())]:
            yield items
    if item := rest.strip():
        yield [item]


def _batches(sequences: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """`sequences` in their order, side by side as long as they have at most `size` tokens together."""
    batch: list[Tensor] = []
    taken = 0
    for tokens in sequences:
        if batch and taken + len(tokens) > size:
            yield batch
            batch, taken = [], 0
        batch.append(tokens)
        taken += len(tokens)
    if batch:
        yield batch


@torch.no_grad()
def _token_surprisals(model: LanguageModel, sequences: list[Tensor], device: torch.device) -> list[Tensor]:
    """-log p of every token of each sequence: (n_i,) tokens → (n_i,) float64 nats on the CPU."""
    if not sequences:
        return []
    lengths = [len(tokens) for tokens in sequences]
    if model.predicts_every_position:
        runs = sequences_of(
            torch.cat(sequences).numpy(), np.array(lengths), model.block_size, model.pad_token, "sliding"
        )
        return list(surprisals(model, runs.to(device)).double().cpu().split(lengths))
    before = model.block_size
    padding = torch.full((before,), model.pad_token)
    stream = torch.cat([part for tokens in sequences for part in (padding, tokens)])  # (Σ (T + n_i),)
    marks = [part for tokens in sequences for part in (torch.zeros(before), torch.ones(len(tokens)))]
    targets = torch.cat(marks).nonzero().squeeze(1)  # (N,) where each target stands in the stream
    contexts = stream.unfold(0, before, 1)  # row i ends before i + T
    nats = [
        model.loss(contexts[chunk - before].to(device), stream[chunk].to(device), reduction="none").double().cpu()
        for chunk in targets.split(CHUNK)
    ]
    return list(torch.cat(nats).split(lengths))


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"{name} is {value!r}, but must be {' or '.join(choices)}")
