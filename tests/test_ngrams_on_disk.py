"""N-gram counts through sorted runs on disk: equal to those in memory, within a bound, and no file is left."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charlm import ngrams
from charlm.reference import ngrams as reference

TINY = [1, 1000, 20_000, 2**20]  # bytes: from one window a run and many merge passes to one run


def assert_equal_levels(ours, theirs):
    assert len(ours) == len(theirs)
    for level, other in zip(ours, theirs, strict=True):
        for array, expected in zip(level, other, strict=True):
            assert array.dtype == expected.dtype
            np.testing.assert_array_equal(array, expected)


@settings(max_examples=60)
@given(
    tokens=st.lists(st.integers(0, 4), max_size=60),
    max_length=st.integers(1, 9),
    share=st.floats(0, 1),
    boundary=st.none() | st.integers(0, 5),
    memory=st.sampled_from(TINY),
    step=st.sampled_from([1, -1, 2]),
)
def test_counts_on_disk_are_those_of_the_reference(tmp_path_factory, tokens, max_length, share, boundary, memory, step):
    array = np.array(tokens, np.uint8)[::step]
    starts = int(share * len(array))
    folder = tmp_path_factory.getbasetemp()
    native = ngrams._count_ngrams(array, max_length, starts, boundary, memory, folder)
    assert_equal_levels(native, reference.count_ngrams(array, max_length, starts, boundary))


@pytest.mark.parametrize("memory", TINY[1:])
@pytest.mark.parametrize("max_length", [1, 2, 5, 8])
@pytest.mark.parametrize("top", [1, 27, 256, 7000, 70_000])
def test_any_vocabulary_and_length_counts_as_in_memory(top, max_length, memory, tmp_path):
    rng = np.random.default_rng(top)
    tokens = rng.integers(0, top + 1, 3000).astype(np.min_scalar_type(top))
    tokens[100:400] = tokens[0]  # one long run
    tokens[500:600] = tokens[600:700]
    for starts, boundary in ((3000, None), (2500, int(tokens[3]))):
        on_disk = ngrams._count_ngrams(tokens, max_length, starts, boundary, memory, tmp_path)
        assert_equal_levels(on_disk, ngrams._count_ngrams(tokens, max_length, starts, boundary, ngrams.BUFFER_BYTES))
    on_disk = ngrams._count_spectra(tokens, max_length, memory, tmp_path)
    for ours, theirs in zip(on_disk, ngrams.count_spectra(tokens, max_length), strict=True):
        assert_equal_levels(ours, theirs)


def test_counts_on_disk_do_not_depend_on_the_threads(n_threads, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 30, 20_000).astype(np.uint8) % 29
    ours = ngrams._count_ngrams(tokens, 6, len(tokens), 3, 2**16, tmp_path)
    assert_equal_levels(ours, reference.count_ngrams(tokens, 6, len(tokens), 3))


def test_a_memory_mapped_file_read_backwards_is_counted_in_place(tmp_path):
    tokens = np.random.default_rng(0).integers(0, 300, 5000).astype(np.uint16)
    tokens.tofile(tmp_path / "tokens.bin")
    mapped = np.memmap(tmp_path / "tokens.bin", np.uint16, "r")[::-1]
    assert ngrams.as_tokens(mapped) is mapped
    assert_equal_levels(
        ngrams.count_ngrams(mapped, 3, memory=2**26, directory=tmp_path), ngrams.count_ngrams(tokens[::-1].copy(), 3)
    )
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin"]


BOUNDED = """
import resource, sys
import numpy as np, torch
from charlm import ngrams

torch.set_num_threads(int(sys.argv[1]))
tokens = np.memmap("tokens.bin", np.uint8, "r")
ngrams.count_ngrams(tokens[:100], 6, memory=2**25, directory=".")  # what the first call allocates once
allocated = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmData"))
stacks = (torch.get_num_threads() - 1) * 2**23
limit = allocated + stacks + 2**25
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
levels = ngrams.count_ngrams(tokens, 6, memory=2**25, directory=".")
print(sum(int(level.count.sum()) for level in levels), len(levels[-1].count))
try:
    ngrams.count_ngrams(tokens, 6)
except MemoryError:
    print("MemoryError")
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize("threads", [1, 2])
def test_counting_in_32_mib_allocates_no_more_than_that(threads, tmp_path):
    size = 3_000_000
    np.random.default_rng(0).integers(0, 27, size).astype(np.uint8).tofile(tmp_path / "tokens.bin")
    result = run_in(tmp_path, BOUNDED, threads)
    total, longest, *refused = result.stdout.split()
    assert int(total) == sum(size - length + 1 for length in range(1, 7))
    assert int(longest) * 20 > 2**25  # the last level alone would not have fitted
    assert refused == ["MemoryError"]


FULL = """
import resource
import numpy as np
from charlm import ngrams

resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
ngrams.count_ngrams(np.memmap("tokens.bin", np.uint8, "r"), 6, memory=2**25, directory=".")
"""

INTERRUPTED = """
import os, signal, threading
import numpy as np
from charlm import ngrams

threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
ngrams._count_ngrams(np.zeros(50_000_000, np.uint8), 6, 50_000_000, None, 1, ".")  # minutes, if it is not interrupted
"""


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("code", "message"),
    [(FULL, "OSError: [Errno 27] counting n-grams on disk: "), (INTERRUPTED, "KeyboardInterrupt")],
    ids=["full", "interrupted"],
)
def test_a_full_disk_and_an_interrupt_leave_no_file(code, message, tmp_path):
    np.random.default_rng(0).integers(0, 27, 1_000_000).astype(np.uint8).tofile(tmp_path / "tokens.bin")
    result = run_in(tmp_path, code, check=False)
    assert result.returncode != 0
    assert result.stderr.splitlines()[-1].startswith(message)
    assert [path.name for path in tmp_path.iterdir()] == ["tokens.bin"]


def test_a_folder_without_room_for_the_runs_is_refused_after_the_first(tmp_path, monkeypatch):
    monkeypatch.setattr(ngrams.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    tokens = np.random.default_rng(0).integers(0, 27, 1000).astype(np.uint8)
    with pytest.raises(OSError, match=r"needs about [\d,]+ bytes on disk, of which 1,000 are free") as caught:
        ngrams._count_ngrams(tokens, 4, 1000, None, 10_000, tmp_path)
    assert caught.value.errno == errno.ENOSPC
    assert caught.value.filename == str(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_and_a_missing_folder_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="memory is 1000 bytes, but must be at least"):
        ngrams.count_ngrams("abab", 2, memory=1000)
    with pytest.raises(ValueError, match="below 16777216, but one is 2000000000"):
        ngrams.count_ngrams(np.array([2_000_000_000], np.uint32), 2, memory=2**30)
    with pytest.raises(FileNotFoundError, match="missing"):
        ngrams.count_ngrams("abab", 2, memory=2**30, directory=tmp_path / "missing")
    monkeypatch.setattr(ngrams._ext, "_C", None)
    with pytest.raises(ValueError, match="CHARLM_BACKEND=reference"):
        ngrams.count_ngrams("abab", 2, memory=2**30)


def run_in(folder: Path, code: str, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=check,
        timeout=60,
    )
