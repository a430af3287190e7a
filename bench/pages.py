"""Fresh memory as our own large outputs get it: new pages, and huge ones where Linux gives them on request."""

from __future__ import annotations

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

HUGE_PAGES_FROM = 4 << 20  # bytes of an output


def fresh_like(tensor: Tensor) -> Tensor:
    """An uninitialised tensor; from 4 MiB on, its pages are advised to be huge."""
    fresh = torch.empty_like(tensor)
    advise = _huge_page_advice()
    if advise is not None and fresh.nbytes >= HUGE_PAGES_FROM:
        start = -(-fresh.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        length = (fresh.data_ptr() + fresh.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
        advise(start, length, mmap.MADV_HUGEPAGE)  # a refusal costs time and nothing else
    return fresh


@functools.cache
def _huge_page_advice() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return madvise
