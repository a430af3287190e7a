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
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import Config
from charlm.lm.errors import UserError
from charlm.lm.evaluate import CHUNK, surprisals
from charlm.lm.examples import sequences_of
from charlm.lm.models import LanguageModel
from charlm.lm.sample import SamplingOptions, sample
from charlm.lm.vocabulary import Vocabulary

CODE_POINTS = 0x110000
ESCAPE_PROBABILITY = 2.0**-12  # ε: an escape costs 12 bits and about 20 for its code point
UNITS = {"nats": 1.0, "bits": math.log(2)}
UNKNOWN = ("error", "escape")


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
        self.config: Config = checkpoint.config
        self.device = torch.device(device)

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

    def surprisal(self, text: str, *, unit: str = "nats", unknown: str = "error") -> Tensor:
        """-log p of each character of `text` given those before it.

        Args:
            text: one item in line format, else any text; n characters.
            unit: "nats" or "bits".
            unknown: what a character outside the vocabulary is: an "error", or an "escape" at the cost that the
                     head of this file derives, which then costs every other character 0.0004 bits as well.

        Returns:
            float64 on the CPU: (n + 1,) in line format, the last one of the item's end; (n,) in running text.

        Raises:
            UserError: an unknown character, named with its position; a `unit` or `unknown` that does not exist.
        """
        return self.surprisals([text], unit=unit, unknown=unknown)[0]

    def surprisals(self, texts: Sequence[str], *, unit: str = "nats", unknown: str = "error") -> list[Tensor]:
        """`surprisal` of each of `texts`, none of which sees another."""
        _check_choice("unit", unit, tuple(UNITS))
        _check_choice("unknown", unknown, UNKNOWN)
        each = "item" if self.format == "line" else "text"
        names = ["the text"] if len(texts) == 1 else [f"{each} {number}" for number in range(1, len(texts) + 1)]
        encoded = [self._tokens(text, unknown, name) for text, name in zip(texts, names, strict=True)]
        found = _token_surprisals(self.model, [tokens for tokens, _ in encoded], self.device)
        if unknown == "escape":
            found = [self._with_escapes(nats, escaped) for nats, (_, escaped) in zip(found, encoded, strict=True)]
        return [nats / UNITS[unit] for nats in found]

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

    def _tokens(self, text: str, unknown: str, name: str) -> tuple[Tensor, Tensor]:
        """(n,) or (n + 1,) int64 tokens to predict, and which of them are escapes, which are padding tokens."""
        vocabulary = self.vocabulary
        known = torch.tensor([char in vocabulary.stoi for char in text], dtype=torch.bool)
        if unknown == "error" or bool(known.all()):
            tokens = vocabulary.encode(text, name).long()
        else:
            tokens = torch.tensor([vocabulary.stoi.get(char, vocabulary.pad_token) for char in text])
        if vocabulary.stop_token is not None:
            tokens = torch.cat([tokens, tokens.new_tensor([vocabulary.stop_token])])
            known = torch.cat([known, known.new_tensor([True])])
        return tokens, ~known

    def _with_escapes(self, nats: Tensor, escaped: Tensor) -> Tensor:
        """The model's surprisals (n,) as the code with escapes has them."""
        others = CODE_POINTS - len(self.vocabulary.chars)
        return torch.where(escaped, math.log(others / ESCAPE_PROBABILITY), nats - math.log1p(-ESCAPE_PROBABILITY))


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
