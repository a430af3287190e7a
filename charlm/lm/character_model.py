"""A trained model together with its vocabulary: it takes text and returns surprisals and samples.

The surprisal of character x_t is -log p(x_t | x_<t). In line format a text is one item, and its end is predicted as
well. In running text, newlines stand in for the missing context of the first characters. The mean surprisal over the
items of a split is therefore the loss that `charlm eval` reports.

A character outside the vocabulary is an error unless escapes are enabled. With escapes, a position is coded in two
steps: first whether it is an escape, with probability ε, or not, with probability 1 - ε; then a token of the model, or
one of the M - |chars| code points outside the vocabulary, all equally probable:

    known     -log(1 - ε) - log p(x_t | x_<t)
    unknown   -log ε + log(M - |chars|)             M = 0x110000 code points

The probabilities at each position sum to 1, so the total is the length of a decodable code (Cover and Thomas 2006,
chapter 5), in bits after division by log 2. Escapes cost each known character 0.0004 bits. In the contexts of later
characters, the padding token replaces an escaped character.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from charlm._errors import UserError
from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import Config
from charlm.lm.data import split_items
from charlm.lm.evaluate import surprisals
from charlm.lm.examples import in_windows, item_examples, item_sequences, resolve_protocol, text_examples, text_windows
from charlm.lm.models import LanguageModel
from charlm.lm.sample import SamplingOptions, sample
from charlm.lm.stream import Stream
from charlm.lm.vocabulary import UNKNOWN, Vocabulary, check_choice

UNITS = {"nats": 1.0, "bits": math.log(2)}
MAX_CONTEXT_TOKENS = 1 << 21  # context tokens of all predictions in one step; each takes a few times 8 bytes
MAX_ITEM_CHARACTERS = 1_000_000  # length limit of a line in a streamed text


class CharacterModel:
    """A trained model, as `charlm.load` returns it.

    Attributes:
        model: The network or count model, in evaluation mode.
        vocabulary: The characters and their tokens.
        config: The configuration of the training run.
        format: "line", where a text is one item and has an end, or "text" for running text.
        best_nats: The best loss on dev in nats per character, or None before the first evaluation.
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
        data = {None: "the names shipped with charlm", "-": "standard input"}.get(file, repr(file))
        loss = "" if self.best_nats is None else f", {self.best_nats:.4f} nats on dev"
        return (
            f"<charlm {self.config.label}: {parameters:,} parameters, {len(self.vocabulary)} tokens, "
            f"{self.format} format, {data}{loss}>"
        )

    @property
    def format(self) -> str:
        return "line" if self.vocabulary.separator else "text"

    def encode(self, text: str) -> Tensor:
        """Encodes `text` as tokens.

        Returns:
            (n,) uint8, or int32 for a vocabulary of more than 256 tokens.

        Raises:
            UserError: A character is not in the vocabulary; the message names it and its position.
        """
        return self.vocabulary.encode(text)

    def decode(self, tokens: Tensor | Sequence[int]) -> str:
        """Decodes tokens, (n,) of any integer dtype; the separator of items becomes "."."""
        return self.vocabulary.decode(tokens.tolist() if isinstance(tokens, Tensor) else tokens)

    def surprisal(
        self, text: str, *, unit: str = "nats", unknown: str = "error", protocol: str | None = None
    ) -> Tensor:
        """Computes -log p of each character of `text`, given the characters before it.

        Args:
            text: One item in line format, otherwise any text; n characters.
            unit: "nats" or "bits".
            unknown: How to treat a character outside the vocabulary: as an "error", or as an "escape" with the cost
                derived in the docstring of this module. Escapes add 0.0004 bits to every known character.
            protocol: For running text only. "sliding", the default, predicts each character from the block_size
                characters before it. "fixed" predicts within consecutive windows of block_size, as nanoGPT does; for
                a GPT this takes a single pass.

        Returns:
            float64 on the CPU: (n + 1,) in line format, where the last element is the end of the item; (n,) in running
            text.

        Raises:
            UserError: A character is unknown (the message names it and its position), or `unit`, `unknown` or
                `protocol` is not one of its values.
        """
        return self.surprisals([text], unit=unit, unknown=unknown, protocol=protocol)[0]

    def surprisals(
        self, texts: Sequence[str], *, unit: str = "nats", unknown: str = "error", protocol: str | None = None
    ) -> list[Tensor]:
        """Computes `surprisal` of each of `texts`, independently of the others."""
        if isinstance(texts, str):
            raise TypeError("surprisals() takes a sequence of texts, not str: surprisal() takes one text")
        noun = "item" if self.format == "line" else "text"
        names = ["the text"] if len(texts) == 1 else [f"{noun} {number}" for number in range(1, len(texts) + 1)]
        return self._surprisals(texts, names, unit, unknown, protocol)

    def total_surprisal(
        self, pieces: Iterable[str], *, unit: str = "nats", unknown: str = "error", protocol: str | None = None
    ) -> tuple[float, int]:
        """Sums `surprisal` over a streamed text of any length, in constant memory.

        Args:
            pieces: The text, split at any place. In line format every line is an item.
            unit, unknown, protocol: As in `surprisal`.

        Returns:
            The sum, and the number of predictions.

        Raises:
            UserError: As `surprisal`, or a line has more than MAX_ITEM_CHARACTERS.
        """
        total, count, seen = [], 0, 0
        if self.format == "line":
            for items in _stream_items(pieces):
                names = [f"item {number}" for number in range(seen + 1, seen + len(items) + 1)]
                nats = torch.cat(self._surprisals(items, names, unit, unknown, protocol))
                seen, count = seen + len(items), count + len(nats)
                total.append(nats.sum().item())
            return math.fsum(total), count
        check_choice("unit", unit, UNITS)
        check_choice("unknown", unknown, UNKNOWN)
        protocol = self.protocol(protocol)
        before = torch.empty(0, dtype=torch.long)
        for piece in _rechunk(pieces, self._tokens_per_step):
            tokens, escaped = self._encode(piece, unknown, "the text", count)
            nats = _piece_surprisals(self.model, before, tokens, protocol, self.device)
            total.append(self._convert(nats, escaped, unit, unknown).sum().item())
            before = torch.cat([before, tokens])[-self.model.block_size :]
            count += len(tokens)
        return math.fsum(total), count

    def protocol(self, protocol: str | None = None) -> str:
        """The protocol that `surprisal` uses: "items" in line format, otherwise `protocol`, by default "sliding"."""
        return resolve_protocol(protocol, self.format, "sliding")

    def continued_surprisal(self, before: str, text: str, *, unit: str = "nats", unknown: str = "error") -> Tensor:
        """Computes `surprisal` of `text` after `before`, the beginning of the same item or text.

        Returns:
            float64 on the CPU, as of `surprisal`: (n,), or (n + 1,) in line format, for n characters of `text`.

        Raises:
            UserError: As of `surprisal`; of `before`, only the last block_size characters are read.
        """
        check_choice("unit", unit, UNITS)
        check_choice("unknown", unknown, UNKNOWN)
        skipped = max(0, len(before) - self.model.block_size)
        tokens, escaped = self._encode((before + text)[skipped:], unknown, "the text", skipped)
        n = len(before) - skipped
        nats = _piece_surprisals(self.model, tokens[:n], tokens[n:], self.protocol(), self.device)
        return self._convert(nats, escaped[n:], unit, unknown)

    @torch.no_grad()
    def next_log_probs(self, before: str, *, unknown: str = "error") -> Tensor:
        """Computes log p of each token after `before`, the beginning of an item or of a text; an escape is no token.

        Returns:
            (V,) float64 on the CPU, in nats.

        Raises:
            UserError: As of `surprisal`; of `before`, only the last block_size characters are read.
        """
        check_choice("unknown", unknown, UNKNOWN)
        vocabulary = self._escaping if unknown == "escape" else self.vocabulary
        skipped = max(0, len(before) - self.model.block_size)
        tokens = vocabulary.encode(before[skipped:], first=skipped).long().to(self.device)
        return self.model.next_logits(tokens[None], {})[0].double().log_softmax(0).cpu()

    def log_prob(self, text: str, *, unit: str = "nats", unknown: str = "error") -> float:
        """Computes log p(text), the negated sum of `surprisal`; in line format this includes the end of the item."""
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
        """Samples texts that begin with `prompt`; the options are those of `SamplingOptions`.

        Raises:
            UserError: An option is out of its range, or a character of the prompt is not in the vocabulary.
        """
        options = SamplingOptions(num_samples, prompt, max_new_tokens, temperature, top_k, top_p, seed)
        return sample(self.model, self.vocabulary, options, self.device)

    def _surprisals(
        self, texts: Sequence[str], names: Sequence[str], unit: str, unknown: str, protocol: str | None
    ) -> list[Tensor]:
        check_choice("unit", unit, UNITS)
        check_choice("unknown", unknown, UNKNOWN)
        protocol = self.protocol(protocol)
        encoded = [self._encode(text, unknown, name) for text, name in zip(texts, names, strict=True)]
        found: list[Tensor] = []
        for batch in _batches([tokens for tokens, _ in encoded], self._tokens_per_step):
            if protocol != "fixed" and len(batch) > 1:
                found += _token_surprisals(self.model, batch, self.device)
            else:
                found += [self._long_surprisals(tokens, protocol) for tokens in batch]
        return [self._convert(nats, escaped, unit, unknown) for nats, (_, escaped) in zip(found, encoded, strict=True)]

    @property
    def _tokens_per_step(self) -> int:
        """The number of tokens to predict in one step, a multiple of block_size."""
        size = self.model.block_size
        return max(1, MAX_CONTEXT_TOKENS // (size * size if self.model.predicts_every_position else size)) * size

    def _long_surprisals(self, tokens: Tensor, protocol: str) -> Tensor:
        """The surprisals (n,) of one item or text, computed piece by piece."""
        before, found = tokens[:0], []
        for piece in tokens.split(self._tokens_per_step):
            found.append(_piece_surprisals(self.model, before, piece, protocol, self.device))
            before = torch.cat([before, piece])[-self.model.block_size :]
        return torch.cat(found)

    def _convert(self, nats: Tensor, escaped: Tensor, unit: str, unknown: str) -> Tensor:
        """Converts the model's surprisals (n,) to `unit`, with the cost of escapes where `unknown` is "escape"."""
        return (self.vocabulary.with_escapes(nats, escaped) if unknown == "escape" else nats) / UNITS[unit]

    def _encode(self, text: str, unknown: str, name: str, first: int = 0) -> tuple[Tensor, Tensor]:
        """The tokens to predict, (n,) or (n + 1,) int64, and a mask of those that are escapes (padding tokens)."""
        vocabulary = self._escaping if unknown == "escape" else self.vocabulary
        tokens = vocabulary.encode(text, name, first).long()
        escaped = ~vocabulary.known(text) if vocabulary.escapes else torch.zeros(len(text), dtype=torch.bool)
        if vocabulary.stop_token is not None:
            tokens = torch.cat([tokens, tokens.new_tensor([vocabulary.stop_token])])
            escaped = torch.cat([escaped, escaped.new_tensor([False])])
        return tokens, escaped


def _piece_surprisals(
    model: LanguageModel, before: Tensor, tokens: Tensor, protocol: str, device: torch.device
) -> Tensor:
    """-log p of every token of a piece of text: (n,) → (n,) float64 nats on the CPU.

    `before` holds the tokens preceding the piece, at most block_size. With "fixed" a window starts with the piece.
    """
    if not len(tokens):
        return torch.empty(0, dtype=torch.float64)
    if protocol != "fixed":
        return _token_surprisals(model, [torch.cat([before, tokens])], device)[0][len(before) :]
    before = before[-(1 + model.tokens_before_window) :]
    stream = Stream(torch.cat([before, tokens]).int(), model.pad_token, start=len(before))
    if model.predicts_every_position:
        nats = surprisals(model, text_windows(stream, model.block_size, model.tokens_before_window).to(device))
    else:
        nats = surprisals(model, in_windows(text_examples(stream, model.block_size)).to(device))
    return nats.double().cpu()


def _rechunk(pieces: Iterable[str], size: int) -> Iterator[str]:
    """The text of `pieces` in chunks of `size` characters; the last one may be shorter."""
    rest = ""
    for piece in pieces:
        rest += piece
        whole = len(rest) // size * size
        yield from (rest[at : at + size] for at in range(0, whole, size))
        rest = rest[whole:]
    if rest:
        yield rest


def _stream_items(pieces: Iterable[str]) -> Iterator[list[str]]:
    """The items of a streamed text; each list holds the items that end within one piece."""
    rest = ""
    for piece in pieces:
        *lines, rest = (rest + piece).split("\n")
        if max(map(len, [*lines, rest])) > MAX_ITEM_CHARACTERS:
            raise UserError(f"a line has more than {MAX_ITEM_CHARACTERS:,} characters, too many for an item")
        if items := [item for line in lines if (item := line.strip())]:
            yield items
    if items := split_items(rest):
        yield items


def _batches(sequences: list[Tensor], size: int) -> Iterator[list[Tensor]]:
    """Groups consecutive `sequences` into batches of at most `size` tokens; a longer sequence is a batch of its own."""
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


def _token_surprisals(model: LanguageModel, sequences: list[Tensor], device: torch.device) -> list[Tensor]:
    """-log p of every token of each sequence: (n_i,) tokens → (n_i,) float64 nats on the CPU."""
    lengths = [len(tokens) for tokens in sequences]
    ends = torch.tensor(lengths).cumsum(0)
    stream = Stream(torch.cat(sequences).int(), model.pad_token, ends=ends, separators_end_items=False)
    make = text_examples if len(sequences) == 1 else item_examples  # of a single sequence the same, and faster
    if model.predicts_every_position:
        make = item_sequences
    return list(surprisals(model, make(stream, model.block_size).to(device)).double().cpu().split(lengths))
