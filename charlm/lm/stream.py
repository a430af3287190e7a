"""The tokens of a split: a piece of one sequence of tokens, in memory or mapped from a file, and windows of it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from charlm import _ext

CPU = torch.device("cpu")
SCANNED_ITEMS = 1 << 20  # items whose length is compared at a time
GPU_SHARE = 0.5  # of the free memory of a GPU that the tokens may take; otherwise they stay on the CPU


@dataclass(frozen=True)
class Stream:
    """The tokens of a split, and those before it that its predictions may use.

    Attributes:
        tokens: (S,) uint8, int32 or another integer dtype; int16 holds unsigned numbers of 16 bits.
        pad_token: The token that stands for what is before the first token; in line format the separator.
        start: The index of the first token of the split, which ends with the tokens.
        ends: In line format the index behind the separator of each item, plus `ends_from`: (n,) int64, or int32 that
            holds unsigned numbers of 32 bits; on the CPU.
        ends_from: The number of tokens before the first of `tokens` in the numbering of `ends`.
        separators_end_items: Whether the separator occurs only behind items, and not in place of unknown characters.
        device: Where windows are made.
    """

    tokens: Tensor
    pad_token: int
    start: int = 0
    ends: Tensor | None = None
    ends_from: int = 0
    separators_end_items: bool = True
    device: torch.device = CPU

    def __len__(self) -> int:
        """The number of tokens of the split."""
        return len(self.tokens) - self.start

    def to(self, device: torch.device | str) -> Stream:
        """The stream for windows on `device`. The tokens move there if they fit, otherwise each window does."""
        device = torch.device(device)
        if device.type == "cuda" and self.tokens.nbytes > GPU_SHARE * torch.cuda.mem_get_info(device)[0]:
            return replace(self, device=device)
        return replace(self, tokens=self.tokens.to(device), device=device)

    def part(self, start: int, stop: int) -> Tensor:
        """tokens[start:stop], on the stream's device."""
        return _widened(self.tokens[start:stop]).to(self.device)

    def at(self, index: Tensor) -> Tensor:
        """tokens[index] for index (B,) int64 on the CPU, each within the tokens."""
        return _widened(self.tokens.index_select(0, index.to(self.tokens.device))).to(self.device)

    def windows(self, first: Tensor, width: int, by_item: bool = False) -> Tensor:
        """Windows of the tokens, padded outside of these with `pad_token`.

        Args:
            first: The index of each window's first token, (B,) int64 on the CPU; it may be negative.
            width: Their width W.
            by_item: Whether a window sees only the item of the token behind it, and everything before is padding.

        Returns:
            (B, W) of the tokens' dtype, or int32 for int16, on the stream's device.
        """
        if by_item and not self.separators_end_items:
            assert self.ends is not None
            begin = self.items(self.item_of(first + width))[0]
            hidden = first[:, None] + torch.arange(width) < begin[:, None]  # (B, W)
            return self.windows(first, width).masked_fill(hidden.to(self.device), self.pad_token)
        if self._is_native:
            return self._native(first, 0, width, by_item, 0)[0]
        return self._windows_by_torch(first, width, by_item)

    def examples(self, index: Tensor, width: int, by_item: bool = False) -> tuple[Tensor, Tensor]:
        """`windows` of the tokens before each of `index`, and `at` of these: (B, width) and (B,)."""
        if self._is_native and not (by_item and not self.separators_end_items):
            return self._native(index, width, width, by_item, len(index))
        return self.windows(index - width, width, by_item), self.at(index)

    @property
    def _is_native(self) -> bool:
        return self.tokens.device.type == "cpu" and self.tokens.dtype in _NATIVE_DTYPES and _ext._C is not None

    def _native(self, index: Tensor, before: int, width: int, by_item: bool, n_at: int) -> tuple[Tensor, Tensor]:
        """Windows that begin `before` tokens before each of `index`, and the tokens at the first `n_at` of these."""
        dtype, tokens = _NATIVE_DTYPES[self.tokens.dtype], self.tokens.numpy()
        if self.tokens.dtype == torch.int16:
            tokens = tokens.view("uint16")
        found, at = torch.empty(len(index), width, dtype=dtype), torch.empty(n_at, dtype=dtype)
        separator = self.pad_token if by_item else -1
        _ext._C.token_windows(
            tokens, index.contiguous().numpy(), before, self.pad_token, separator, found.numpy(), at.numpy()
        )
        return (found, at) if self.device.type == "cpu" else (found.to(self.device), at.to(self.device))

    def _windows_by_torch(self, first: Tensor, width: int, by_item: bool) -> Tensor:
        device = self.tokens.device
        at = first.to(device)[:, None] + torch.arange(width, device=device)  # (B, W)
        inside = (at >= 0) & (at < len(self.tokens))
        found = _widened(self.tokens[at.clamp(0, max(0, len(self.tokens) - 1))]).masked_fill(~inside, self.pad_token)
        if by_item:
            alive = found.ne(self.pad_token).flip(1).cumprod(1, dtype=torch.int32).flip(1)
            found = torch.where(alive.bool(), found, self.pad_token)
        return found.to(self.device)

    # ---- items

    @property
    def n_items(self) -> int:
        """The number of items; 0 in running text."""
        return 0 if self.ends is None else len(self.ends)

    def items(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """The index of the first token of each of `items` (B,), and that behind its separator: two of (B,) int64.

        The number of items is also taken: both its indices are the end of the tokens.
        """
        assert self.ends is not None
        if not len(self.ends):
            return torch.zeros_like(items), torch.zeros_like(items)
        last = len(self.ends) - 1
        end = _unsigned(self.ends[items.clamp(max=last)]) - self.ends_from
        before = _unsigned(self.ends[(items - 1).clamp(min=0)]) - self.ends_from
        return torch.where(items > 0, before, self.start), end

    def item_of(self, index: Tensor) -> Tensor:
        """The item of each token, (B,) int64, by bisection: `ends` may be too long for a copy in another dtype."""
        assert self.ends is not None
        low, high = torch.zeros_like(index), torch.full_like(index, len(self.ends) - 1)
        while bool((low < high).any()):
            middle = (low + high) // 2
            is_behind = _unsigned(self.ends[middle]) - self.ends_from <= index
            low, high = torch.where(is_behind, middle + 1, low), torch.where(is_behind, high, middle)
        return low

    def items_longer_than(self, size: int) -> Tensor:
        """The numbers of the items of more than `size` tokens, separators included: (L,) int64, increasing."""
        found = [torch.empty(0, dtype=torch.int64)]
        for start in range(0, self.n_items, SCANNED_ITEMS):
            items = torch.arange(start, min(start + SCANNED_ITEMS, self.n_items))
            begin, end = self.items(items)
            found.append(items[end - begin > size])
        return torch.cat(found)


_NATIVE_DTYPES = {torch.uint8: torch.uint8, torch.int16: torch.int32, torch.int32: torch.int32}


def _widened(tokens: Tensor) -> Tensor:
    """Unsigned tokens of 16 bits as int32; others as they are."""
    return tokens.view(torch.uint16).to(torch.int32) if tokens.dtype == torch.int16 else tokens


def _unsigned(ends: Tensor) -> Tensor:
    """Unsigned numbers of 32 bits, or int64, as int64."""
    return ends.view(torch.uint32).to(torch.int64) if ends.dtype == torch.int32 else ends
