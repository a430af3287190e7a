"""Lossless compression of bytes by an adaptive n-gram model and constriction's range coder.

The model (csrc/ngrams/byte_model.cpp) gives each half byte 16 integer weights that sum to 2²⁴ - 16. constriction adds 1
to each and codes with the result / 2²⁴. All its sums are integers below 2²⁴, which a float32 holds exactly, so that a
file is the same on every machine. A file is

    8 bytes     MAGIC, the last byte of which is the version
    16 bytes    of the sha256 of everything behind them: it is checked before anything is decoded
    8 bytes     the number of bytes of the original, little-endian
    1 byte      log2 of the number of buckets of the model's table, 32 bytes each
    16 bytes    of the sha256 of the original
    the rest    32-bit words of the range coder, little-endian
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import struct
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from charlm import _ext
from charlm._errors import UserError
from charlm._extras import require_packages

MAGIC = b"\x8ccharlm\x01"
FIELDS = struct.Struct("<QB16s")  # length, table bits, digest of the original
DIGEST_BYTES = 16
HEADER_BYTES = len(MAGIC) + DIGEST_BYTES + FIELDS.size
MIN_TABLE_BITS, MAX_TABLE_BITS = 12, 23  # 128 KiB, 256 MiB
CHUNK = 1 << 14  # bytes of the original at a time: 2 MiB of weights
# That the model gives a byte: each of its two halves has a probability of at most 1 - 15/2²⁴.
LEAST_BITS = 2 * 15 / (1 << 24)

Report = Callable[[str, int, int], object]


def compress(data: bytes, report: Report = lambda stage, done, total: None) -> bytes:
    """Compresses `data`, decodes the result and compares it before it is returned.

    Memory is the result, and a table of 128 KiB to 256 MiB, at most 256 bytes for each byte of `data`.

    `report` is called with what is done, the number of bytes that are done, and that of all.

    Raises:
        UserError: The package constriction is not installed.
        RuntimeError: The result does not decode to `data`.

    Example:
        >>> from charlm.lm.compression import compress, decompress
        >>> decompress(compress(b"abracadabra"))
        b'abracadabra'
    """
    stream, family = _constriction()
    table_bits = max(MIN_TABLE_BITS, min((8 * len(data)).bit_length() - 1, MAX_TABLE_BITS))
    coder = stream.RangeEncoder()
    for nibbles, weights, done in weighed(data, table_bits):
        coder.encode(nibbles, family, weights)
        report("compressing", done, len(data))
    words = coder.get_compressed().astype("<u4").tobytes()
    body = FIELDS.pack(len(data), table_bits, _digest(data)) + words
    packed, done = MAGIC + _digest(body) + body, 0
    for chunk in decoded(packed, "the result"):
        if data[done : done + len(chunk)] != chunk:
            raise RuntimeError(f"the compressed data differs from the original behind byte {done}")
        done += len(chunk)
        report("checking", done, len(data))
    return packed


def weighed(data: bytes, table_bits: int) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    """Pieces: half bytes (m,) int32, weights of all values before each (m, 16) float32, and the bytes done so far.

    The probability of a value is (weight + 1) / 2²⁴.
    """
    model, array = _model(table_bits), np.frombuffer(data, np.uint8)
    for start in range(0, len(array), CHUNK):
        chunk = array[start : start + CHUNK]
        nibbles, weights = np.empty(2 * len(chunk), np.int32), np.empty((2 * len(chunk), 16), np.float32)
        model.encode(chunk, nibbles, weights)
        yield nibbles, weights, start + len(chunk)


def decompress(data: bytes) -> bytes:
    """The bytes that `compress` was given.

    Raises:
        UserError: `data` is not complete and undamaged, or the package constriction is not installed.
    """
    return b"".join(decoded(data, "the data"))


def decoded(data: bytes, name: str) -> Iterator[bytes]:
    """The original of `data` in pieces of at most CHUNK bytes; memory does not depend on the length that it claims.

    Errors call the data `name`.

    Raises:
        UserError: `data` is damaged. If the sha256 of the original is wrong, this is raised behind the last piece.
    """
    if not data.startswith(MAGIC[:-1]):
        raise UserError(f"{name} was not written by `charlm compress`")
    if data[len(MAGIC) - 1 : len(MAGIC)] not in (MAGIC[-1:], b""):
        raise UserError(f"{name} has format {data[len(MAGIC) - 1]}, but this charlm reads format {MAGIC[-1]}")
    body = data[len(MAGIC) + DIGEST_BYTES :]
    if len(data) < HEADER_BYTES or _digest(body) != data[len(MAGIC) : len(MAGIC) + DIGEST_BYTES]:
        raise UserError(f"{name} is damaged: its checksum differs; restore the file from a copy")
    damaged = UserError(f"{name} is damaged: it does not decode to what its checksum says; compress the original again")
    size, table_bits, digest = FIELDS.unpack_from(body)
    words = body[FIELDS.size :]
    possible = size * LEAST_BITS <= 8 * len(words) + 64
    if not MIN_TABLE_BITS <= table_bits <= MAX_TABLE_BITS or len(words) % 4 or not possible:
        raise damaged
    stream, family = _constriction()
    weights = np.empty((1, 16), np.float32)
    coder = stream.RangeDecoder(np.frombuffer(words, "<u4").astype(np.uint32))
    next_nibble, model, found = partial(coder.decode, family, weights), _model(table_bits), hashlib.sha256()
    for start in range(0, size, CHUNK):
        try:
            chunk = model.decode(min(CHUNK, size - start), weights, next_nibble)
        except AssertionError:  # constriction's: no encoder writes these words
            raise damaged from None
        found.update(chunk)
        yield chunk
    if found.digest()[:DIGEST_BYTES] != digest:
        raise damaged


def peer_sizes(data: bytes) -> dict[str, int]:
    """Bytes that gzip, bz2, xz and, where it is installed, zstd need for `data`, each at its highest usual level."""
    sizes = {
        "gzip -9": len(gzip.compress(data, compresslevel=9, mtime=0)),
        "bz2 -9": len(bz2.compress(data)),
        "xz -9e": len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)),
    }
    with suppress(ImportError):
        import zstandard

        sizes["zstd -19"] = len(zstandard.ZstdCompressor(level=19).compress(data))
    return sizes


def _digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()[:DIGEST_BYTES]


def _model(table_bits: int) -> Any:
    if _ext._C is not None:
        return _ext._C.ByteModel(table_bits)
    from charlm.reference.byte_model import ByteModel

    return ByteModel(table_bits)


def _constriction() -> tuple[Any, Any]:
    """The module of the range coder, and the family of distributions over 16 values."""
    require_packages("compression", "compress", ["constriction"])
    from constriction import stream

    return stream.queue, stream.model.Categorical(perfect=False)
