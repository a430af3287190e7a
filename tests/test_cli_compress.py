"""`charlm compress` and `decompress`: no loss, no wrong byte, and nothing half-written."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import json
import lzma
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_support import fails, run, succeeds

from charlm import UserError, _ext
from charlm.data import __path__ as data_folder
from charlm.lm import compression
from charlm.lm.compression import HEADER_BYTES, MAGIC, compress, decoded, decompress, weighed
from charlm.lm.files import write_atomically
from charlm.reference.byte_model import TOTAL, ByteModel

pytest.importorskip("constriction")

RECORDED = (
    "8c636861726c6d01d098bda3ede633b6db6553f68381a62140010000000000000cd67ea0a9891ad7cf17b488e6f1558af3"
    "06ee0e52b3d79b518346d63d1741af23"
)
TEXT = "To be, or not to be: that is the question — whether 'tis nobler in the mind to suffer\n".encode() * 3
NOISE = random.Random(0).randbytes(3000)
CASES = {
    "empty": b"",
    "one_byte": b"\x00",
    "every_byte": bytes(range(256)),
    "random": NOISE,
    "repeated": NOISE[:50] * 40,
    "text": TEXT,
    "zeros": bytes(50_000),
}


def read_names() -> bytes:
    with open(f"{data_folder[0]}/names.txt", "rb") as file:
        return file.read()


def bits_of_the_model(data: bytes, packed: bytes) -> float:
    bits = 0.0
    for nibbles, weights, _ in weighed(data, packed[HEADER_BYTES - 17]):
        chosen = weights[np.arange(len(nibbles)), nibbles].astype(np.float64)
        bits -= np.log2((chosen + 1) / 2**24).sum()
    return bits


def resealed(packed: bytes) -> bytes:
    """`packed` with the right checksum of its fields, as a hostile file has."""
    body = packed[len(MAGIC) + 16 :]
    return MAGIC + hashlib.sha256(body).digest()[:16] + body


@pytest.mark.parametrize("case", CASES)
def test_any_bytes_come_back_and_the_file_has_the_models_own_bits(case):
    data = CASES[case]
    packed = compress(data)
    assert decompress(packed) == data
    assert 8 * len(packed) <= bits_of_the_model(data, packed) * 1.001 + 8 * 64


@pytest.mark.exhaustive
def test_a_megabyte_of_zeros_is_smaller_than_300_bytes():
    packed = compress(bytes(1_000_000))
    assert len(packed) < 300
    assert 8 * len(packed) <= bits_of_the_model(bytes(1_000_000), packed) * 1.001 + 8 * 64


def test_names_are_smaller_than_with_gzip_bz2_and_xz():
    data = read_names()[:100_000]
    packed = compress(data)
    others = [gzip.compress(data, 9), bz2.compress(data), lzma.compress(data, preset=9 | lzma.PRESET_EXTREME)]
    assert len(packed) < 0.95 * min(map(len, others))
    assert 8 * len(packed) <= bits_of_the_model(data, packed) * 1.001 + 8 * 64


@pytest.mark.parametrize("data", [TEXT + NOISE[:300], read_names()[:700], bytes(200)], ids=["mixed", "names", "zeros"])
def test_the_kernel_and_the_reference_give_the_same_integers(data):
    for table_bits in (3, 14):  # with 8 buckets, contexts replace each other all the time
        rows = []
        for model in (_ext._C.ByteModel(table_bits), ByteModel(table_bits)):
            nibbles, weights = np.empty(2 * len(data), np.int32), np.empty((2 * len(data), 16), np.float32)
            model.encode(np.frombuffer(data, np.uint8), nibbles, weights)
            rows.append((nibbles, weights))
        assert np.array_equal(rows[0][0], rows[1][0])
        assert np.array_equal(rows[0][1], rows[1][1])
        assert (rows[0][1].sum(1, dtype=np.float64) == TOTAL).all()
        assert rows[0][1].min() >= 0


def test_the_reference_reads_what_the_kernel_wrote(monkeypatch):
    packed = compress(TEXT)
    monkeypatch.setattr(_ext, "_C", None)
    assert decompress(packed) == TEXT
    assert compress(TEXT[:200]) == compress(TEXT[:200])


def test_the_coder_uses_exactly_the_integers_of_the_model():
    """A range coder in exact integers, as in constriction's documentation, gives the words of constriction."""
    nibbles, weights, _ = next(weighed(TEXT, 12))
    low, width, words = 0, 2**64 - 1, []
    digits = 0  # words of the exact number that `low` is
    for nibble, row in zip(nibbles, weights.astype(np.int64) + 1, strict=True):
        scale = width >> 24
        low += scale * int(row[:nibble].sum())
        width = scale * int(row[nibble])
        if width < 2**32:
            low, width, digits = low << 32, width << 32, digits + 1
    packed = compress(TEXT)
    words = np.frombuffer(packed[HEADER_BYTES:], "<u4")
    written = int.from_bytes(words.astype(">u4").tobytes(), "big")
    shift = 32 * (digits + 2 - len(words))
    first = written << shift if shift >= 0 else written >> -shift
    assert low <= first < low + width


def test_a_file_is_the_same_on_every_machine_thread_count_and_instruction_set():
    chosen, threads = _ext._C.cpu_isa(), torch.get_num_threads()
    try:
        for isa in _ext._C.supported_isas():
            for count in (1, 2):
                _ext._C.set_cpu_isa(isa)
                torch.set_num_threads(count)
                assert compress(b"emma olivia ava " * 20).hex() == RECORDED
    finally:
        _ext._C.set_cpu_isa(chosen)
        torch.set_num_threads(threads)


def test_every_changed_missing_or_added_byte_is_refused():
    packed = compress(b"emma\nolivia\nava\n")
    for at in range(len(packed)):
        for bit in range(8):
            with pytest.raises(UserError):
                decompress(packed[:at] + bytes([packed[at] ^ 1 << bit]) + packed[at + 1 :])
        with pytest.raises(UserError, match=r"damaged|not written"):
            decompress(packed[:at])
    for extra in (b"\0", b"\0" * 4, packed):
        with pytest.raises(UserError, match="damaged"):
            decompress(packed + extra)


def with_length(size: int) -> bytes:
    packed = compress(b"emma\nolivia\nava\n")
    at = len(MAGIC) + 16
    return resealed(packed[:at] + size.to_bytes(8, "little") + packed[at + 8 :])


@pytest.mark.parametrize("size", [0, 15, 17, 50_000, 2**40, 2**64 - 1])
def test_a_hostile_length_is_refused(size):
    with pytest.raises(UserError, match="does not decode"):
        decompress(with_length(size))


def test_a_hostile_length_takes_no_memory():
    pieces = decoded(with_length(10_000_000), "the data")
    assert [len(next(pieces)) for _ in range(2)] == [compression.CHUNK] * 2


@pytest.mark.parametrize("bits", [0, 11, 24, 63, 255])
def test_a_hostile_table_is_refused(bits):
    packed = bytearray(compress(b"emma"))
    packed[32] = bits
    with pytest.raises(UserError, match="damaged"):
        decompress(resealed(bytes(packed)))


def test_words_that_decode_to_other_bytes_are_refused():
    packed = compress(TEXT)
    for at in range(HEADER_BYTES, len(packed), 9):
        changed = packed[:at] + bytes([packed[at] ^ 0x10]) + packed[at + 1 :]
        with pytest.raises(UserError, match="does not decode"):
            decompress(resealed(changed))


def test_another_version_is_named():
    with pytest.raises(UserError, match="has format 2, but this charlm reads format 1"):
        decompress(MAGIC[:-1] + b"\x02" + bytes(60))


def test_a_file_and_its_table(tmp_path):
    path, data = tmp_path / "verse.txt", TEXT * 4
    path.write_bytes(data)
    printed = succeeds("compress", path)
    packed = tmp_path / "verse.txt.charlm"
    assert path.read_bytes() == data
    for word in ("gzip -9", "bz2 -9", "xz -9e", "zstd", "bits per byte", "bits per character"):
        assert word in printed
    assert f"{packed.stat().st_size:,}" in printed
    assert f"{8 * packed.stat().st_size / len(data.decode()):.4f}" in printed
    assert "already exists: add --overwrite" in fails("decompress", packed)
    path.unlink()
    succeeds("decompress", packed)
    assert path.read_bytes() == data
    assert sorted(tmp_path.iterdir()) == [path, packed]


def test_a_damaged_file_leaves_the_old_output_and_no_other(tmp_path):
    packed = tmp_path / "x.charlm"
    changed = bytearray(compress(TEXT))
    changed[-5] ^= 1
    packed.write_bytes(resealed(bytes(changed)))
    (tmp_path / "x").write_bytes(b"old")
    assert "x.charlm is damaged" in fails("decompress", packed, "--overwrite")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert len(list(tmp_path.iterdir())) == 2


def test_names_that_do_not_fit_are_refused(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"a")
    assert "does not end with .charlm" in fails("decompress", path)
    assert "a.txt is the input itself" in fails("compress", path, "-o", path, "--overwrite")
    assert "is a folder" in fails("compress", path, "-o", tmp_path)
    assert "cannot read" in fails("compress", tmp_path / "none")
    assert "was not written by `charlm compress`" in fails("decompress", path, "-o", tmp_path / "b")
    assert sorted(tmp_path.iterdir()) == [path]


def test_streams_carry_bytes():
    packed = run("compress", "-", input=NOISE)
    assert packed.exit_code == 0
    assert "gzip -9" in packed.stderr
    assert "bits per character" not in packed.stderr  # NOISE is not UTF-8
    back = run("decompress", "-", input=packed.stdout_bytes)
    assert (back.exit_code, back.stdout_bytes) == (0, NOISE)
    bad = run("decompress", "-", input=packed.stdout_bytes[:-1])
    assert (bad.exit_code, bad.stdout_bytes) == (2, b"")


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(UserError, match="needs constriction"):
        compress(b"a")


def test_the_page_has_the_recorded_table():
    root = Path(__file__).parents[1]
    page = (root / "docs/language_model.md").read_text(encoding="utf-8")
    for name, record in json.loads((root / "bench/results/compression.json").read_text(encoding="utf-8")).items():
        size, *others = record["sizes"].values()
        assert f"| {name}, {size:,} bytes | {' | '.join(f'{8 * other / size:.3f}' for other in others)} |" in page
        assert record["sizes"]["charlm"] < record["sizes"]["xz -9e"]


def test_the_output_has_the_permissions_of_the_input(tmp_path):
    secret, packed, restored = tmp_path / "a", tmp_path / "a.charlm", tmp_path / "b"
    secret.write_bytes(b"secret")
    secret.chmod(0o600)
    succeeds("compress", secret)
    succeeds("decompress", packed, "-o", restored)
    assert [path.stat().st_mode & 0o777 for path in (packed, restored)] == [0o600, 0o600]


def test_a_pipe_or_a_device_is_not_replaced(tmp_path):
    (tmp_path / "a").write_bytes(b"text")
    os.mkfifo(tmp_path / "pipe")
    assert "pipe is not a regular file" in fails("compress", tmp_path / "a", "-o", tmp_path / "pipe", "--overwrite")
    with pytest.raises(OSError, match="it is not a regular file"):  # as the other commands write
        write_atomically(tmp_path / "pipe", b"text")
    assert (tmp_path / "pipe").is_fifo()


def test_a_link_stays_and_the_file_that_it_names_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"old")
    (tmp_path / "link").symlink_to("file")
    write_atomically(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"


@pytest.mark.parametrize("bits", [-1, 0, 24, 64])
def test_a_table_of_another_size_is_refused(bits):
    with pytest.raises(ValueError, match="table_bits must be from 1 to 23"):
        _ext._C.ByteModel(bits)
