"""The characters of a corpus and their tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from charlm.lm.errors import UserError

SEPARATOR = 0  # token of the separator in line format
SEPARATOR_GLYPH = "."  # how it is printed
ENCODED_AT_ONCE = 1 << 20  # characters: encoding takes 30 bytes for each, and a text may have 10⁹


@dataclass(frozen=True)
class Vocabulary:
    """The characters of a corpus, sorted by code point, and their tokens.

    With a separator the characters are tokens 1, 2, …; without one 0, 1, …. `chars` is all there is to save.
    """

    chars: str
    separator: bool
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

    def encode(self, text: str, what: str = "the text") -> Tensor:
        """The tokens of `text`, (len(text),) of `self.dtype`.

        Raises:
            UserError: a character is not in the vocabulary; the text names it and its position in `what`.
        """
        encoded = torch.empty(len(text), dtype=self.dtype)
        for start in range(0, len(text), ENCODED_AT_ONCE):
            tokens = self._lookup(text[start : start + ENCODED_AT_ONCE])
            if (tokens < 0).any():
                position = start + int((tokens < 0).argmax())
                raise UserError(
                    f"character {text[position]!r} at position {position} of {what} (the first is 0) "
                    "is not in the model's vocabulary"
                )
            encoded[start : start + len(tokens)] = torch.from_numpy(tokens)
        return encoded

    def _lookup(self, text: str) -> np.ndarray:
        """(len(text),) int32 tokens, -1 for an unknown character."""
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
        known = points < len(self._table)
        return np.where(known, self._table[np.where(known, points, 0)], np.int32(-1))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of `tokens`; a separator is printed "."."""
        itos = self.itos
        return "".join(itos[token] for token in tokens)
