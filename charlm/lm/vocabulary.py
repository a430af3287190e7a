"""The characters of a corpus and their tokens."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from charlm.lm.errors import UserError

SEPARATOR = 0  # token of the separator in line format
SEPARATOR_GLYPH = "."  # how it is printed
UNKNOWN = ("error", "escape")  # what a character outside a vocabulary may be
CODE_POINTS = 0x110000
ESCAPE_PROBABILITY = 2.0**-12  # ε: an escape costs 12 bits and about 20 for its code point
NAMED = 10  # unknown characters that an error names
SUGGESTED = 40  # characters of a text that an error suggests in lower or upper case
ENCODED_AT_ONCE = 1 << 20  # characters: encoding takes 30 bytes for each, and a text may have 10⁹


class UnknownCharacterError(UserError):
    """A text holds a character that is in no vocabulary of the model."""


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a corpus, sorted by code point, and their tokens.

    With a separator the characters are tokens 1, 2, …; without one 0, 1, …. `chars` and `separator` are all there is
    to save. With `escapes` it encodes every text: an unknown character becomes the padding token, at a cost that
    `with_escapes` adds.
    """

    chars: str
    separator: bool
    escapes: bool = False
    stoi: dict[str, int] = field(init=False, repr=False, compare=False)
    _table: np.ndarray = field(init=False, repr=False, compare=False)  # (largest code point + 1,) token, or -1

    def __post_init__(self) -> None:
        first = int(self.separator)
        object.__setattr__(self, "stoi", {char: first + i for i, char in enumerate(self.chars)})
        table = np.full(ord(self.chars[-1]) + 1 if self.chars else 1, -1, dtype=np.int32)
        table[[ord(char) for char in self.chars]] = np.arange(first, first + len(self.chars))
        object.__setattr__(self, "_table", table)

    @classmethod
    def of(cls, text: str, *, separator: bool) -> Vocabulary:
        """The vocabulary of `text`; the newlines between items are no characters of theirs."""
        chars = set(text)
        return cls("".join(sorted(chars - {"\n"} if separator else chars)), separator)

    def __len__(self) -> int:
        return len(self.chars) + self.separator

    @property
    def itos(self) -> list[str]:
        """What each token is printed as."""
        return [SEPARATOR_GLYPH, *self.chars] if self.separator else list(self.chars)

    @property
    def pad_token(self) -> int:
        """What fills a context where nothing comes before: the separator, else the newline (else token 0)."""
        return SEPARATOR if self.separator else self.stoi.get("\n", 0)

    @property
    def stop_token(self) -> int | None:
        """The token that ends a sample; None in running text."""
        return SEPARATOR if self.separator else None

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that holds every token: tokens of most character models fit a byte."""
        return torch.uint8 if len(self) <= 256 else torch.int32

    def encode(self, text: str, what: str = "the text", first: int = 0) -> Tensor:
        """The tokens of `text`, (len(text),) of `self.dtype`; `first` is the position in `what` of its first character.

        Raises:
            UserError: a character is not in the vocabulary, which does not escape; the text names it, its position in
                       `what`, and the other unknown characters.
        """
        encoded = torch.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), ENCODED_AT_ONCE):
            tokens = self._lookup(text[start : start + ENCODED_AT_ONCE])
            if (tokens < 0).any():
                if not self.escapes:
                    raise UnknownCharacterError(
                        self._unknown_characters(text, start + int((tokens < 0).argmax()), what, first)
                    )
                tokens = np.where(tokens < 0, self.pad_token, tokens)
            encoded[start : start + len(tokens)] = torch.from_numpy(tokens)
        return encoded

    def known(self, text: str) -> Tensor:
        """Which characters of `text` are in the vocabulary: (len(text),) bool."""
        pieces = [self._lookup(text[at : at + ENCODED_AT_ONCE]) >= 0 for at in range(0, len(text), ENCODED_AT_ONCE)]
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=bool), *pieces]))

    def with_escapes(self, nats: Tensor, escaped: Tensor) -> Tensor:
        """A model's surprisals (n,) as the code with escapes has them, derived in `charlm.lm.character_model`."""
        cost = math.log((CODE_POINTS - len(self.chars)) / ESCAPE_PROBABILITY)
        return torch.where(escaped, cost, nats - math.log1p(-ESCAPE_PROBABILITY))

    def _unknown_characters(self, text: str, position: int, what: str, first: int) -> str:
        """The sentence about the characters of `text` that are unknown, of which the first stands at `position`."""
        others = sorted(set(text) - set(self.chars) - {text[position]})
        more = f" and {len(others) - NAMED} others" if len(others) > NAMED else ""
        also = f" (nor are {', '.join(map(repr, others[:NAMED]))}{more})" if others else ""
        return (
            f"character {text[position]!r} at position {first + position} of {what} (the first is 0) "
            f"is not in the model's vocabulary{also}{self._case_hint(text)}"
        )

    def _case_hint(self, text: str) -> str:
        """Says that all letters of the vocabulary are of one case, where `text` in that case is known."""
        for case, convert, other in (("lower", str.lower, str.isupper), ("upper", str.upper, str.islower)):
            if not any(map(other, self.chars)) and set(convert(text)) <= set(self.chars):
                meant = f": did you mean {convert(text)!r}?" if len(text) <= SUGGESTED else ""
                return f", whose letters are all {case} case{meant}"
        return ""

    def _lookup(self, text: str) -> np.ndarray:
        """(len(text),) int32 tokens, -1 for an unknown character."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        known = points < len(self._table)
        return np.where(known, self._table[np.where(known, points, 0)], np.int32(-1))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; a separator is printed "."."""
        itos = self.itos
        return "".join(itos[token] for token in tokens)
