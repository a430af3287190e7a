"""The characters of a corpus and their tokens."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from charlm._errors import UserError

SEPARATOR = 0  # token of the separator in line format
SEPARATOR_GLYPH = "."  # the printed form of the separator
UNKNOWN = ("error", "escape")  # treatments of a character outside the vocabulary
CODE_POINTS = 0x110000
ESCAPE_PROBABILITY = 2.0**-12  # ε: an escape costs 12 bits, plus about 20 for its code point
MAX_NAMED_CHARACTERS = 10  # unknown characters that an error message lists
MAX_SUGGESTED_CHARACTERS = 40  # length of the longest text that an error message repeats in another case
ENCODE_CHUNK = 1 << 20  # characters: encoding takes 30 bytes for each, and a text may have 10⁹


class UnknownCharacterError(UserError):
    """A text contains a character outside the vocabulary of the model."""


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises UserError unless `value` is one of `choices`."""
    if value not in choices:
        raise UserError(f"{name} is {value!r}, but must be {' or '.join(choices)}")


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a corpus, sorted by code point, and their tokens.

    With a separator the characters are tokens 1, 2, …; without one they are tokens 0, 1, …. A checkpoint stores only
    `chars` and `separator`. With `escapes` every text can be encoded: an unknown character becomes the padding token,
    and `with_escapes` adds its cost.
    """

    chars: str
    separator: bool
    escapes: bool = False
    stoi: dict[str, int] = field(init=False, repr=False, compare=False)
    # The token of each code point, -1 for one outside the vocabulary: (largest code point + 1,) int32.
    table: np.ndarray = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        first = int(self.separator)
        object.__setattr__(self, "stoi", {char: first + i for i, char in enumerate(self.chars)})
        table = np.full(ord(self.chars[-1]) + 1 if self.chars else 1, -1, dtype=np.int32)
        table[[ord(char) for char in self.chars]] = np.arange(first, first + len(self.chars))
        object.__setattr__(self, "table", table)

    @classmethod
    def of(cls, text: str, *, separator: bool) -> Vocabulary:
        """The vocabulary of `text`; with a separator, newlines delimit the items and are not characters."""
        chars = set(text)
        return cls("".join(sorted(chars - {"\n"} if separator else chars)), separator)

    def __len__(self) -> int:
        return len(self.chars) + self.separator

    @property
    def itos(self) -> list[str]:
        """The printed form of each token."""
        return [SEPARATOR_GLYPH, *self.chars] if self.separator else list(self.chars)

    @property
    def pad_token(self) -> int:
        """The token that fills a context before the first character: the separator, the newline, or else token 0."""
        return SEPARATOR if self.separator else self.stoi.get("\n", 0)

    @property
    def stop_token(self) -> int | None:
        """The token that ends a sample; None in running text."""
        return SEPARATOR if self.separator else None

    @property
    def dtype(self) -> torch.dtype:
        """The smallest dtype that holds every token: uint8 for most character models, otherwise int32."""
        return torch.uint8 if len(self) <= 256 else torch.int32

    def encode(self, text: str, what: str = "the text", first: int = 0) -> Tensor:
        """Encodes `text` as tokens.

        Args:
            text: The text.
            what: What an error message calls the text.
            first: The position of the first character of `text` in `what`, for error messages.

        Returns:
            (len(text),) of `self.dtype`.

        Raises:
            UserError: A character is not in the vocabulary, and `escapes` is off. The message names the character,
                its position in `what`, and the other unknown characters.
        """
        encoded = torch.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), ENCODE_CHUNK):
            tokens = self._lookup(text[start : start + ENCODE_CHUNK])
            if (tokens < 0).any():
                if not self.escapes:
                    raise UnknownCharacterError(
                        self._unknown_message(text, start + int((tokens < 0).argmax()), what, first)
                    )
                tokens = np.where(tokens < 0, self.pad_token, tokens)
            encoded[start : start + len(tokens)] = torch.from_numpy(tokens)
        return encoded

    def known(self, text: str) -> Tensor:
        """Mask of the characters of `text` that are in the vocabulary: (len(text),) bool."""
        pieces = [self._lookup(text[at : at + ENCODE_CHUNK]) >= 0 for at in range(0, len(text), ENCODE_CHUNK)]
        return torch.from_numpy(np.concatenate([np.empty(0, dtype=bool), *pieces]))

    def with_escapes(self, nats: Tensor, escaped: Tensor) -> Tensor:
        """Adds the cost of escapes to a model's surprisals (n,), as derived in `charlm.lm.character_model`."""
        cost = math.log((CODE_POINTS - len(self.chars)) / ESCAPE_PROBABILITY)
        return torch.where(escaped, cost, nats - math.log1p(-ESCAPE_PROBABILITY))

    def _unknown_message(self, text: str, position: int, what: str, first: int) -> str:
        """The error message about the unknown characters of `text`, the first of which is at `position`."""
        others = sorted(set(text) - set(self.chars) - {text[position]})
        more = f" and {len(others) - MAX_NAMED_CHARACTERS} others" if len(others) > MAX_NAMED_CHARACTERS else ""
        also = f" (nor are {', '.join(map(repr, others[:MAX_NAMED_CHARACTERS]))}{more})" if others else ""
        return (
            f"character {text[position]!r} at position {first + position} of {what} (the first is 0) "
            f"is not in the model's vocabulary{also}{self._case_hint(text)}"
        )

    def _case_hint(self, text: str) -> str:
        """A hint that all letters of the vocabulary have one case, if `text` in that case could be encoded."""
        for case, convert, other in (("lower", str.lower, str.isupper), ("upper", str.upper, str.islower)):
            if not any(map(other, self.chars)) and set(convert(text)) <= set(self.chars):
                suggestion = f": did you mean {convert(text)!r}?" if len(text) <= MAX_SUGGESTED_CHARACTERS else ""
                return f", whose letters are all {case} case{suggestion}"
        return ""

    def _lookup(self, text: str) -> np.ndarray:
        """(len(text),) int32 tokens, -1 for an unknown character."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        known = points < len(self.table)
        return np.where(known, self.table[np.where(known, points, 0)], np.int32(-1))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; a separator becomes "."."""
        itos = self.itos
        return "".join(itos[token] for token in tokens)
