"""The corpora that `charlm train` prepared by itself from large files: in $XDG_CACHE_HOME/charlm/corpora."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from charlm import _ext
from charlm._errors import UserError
from charlm.lm import shards
from charlm.lm.files import LockedError
from charlm.lm.prepare import Options, Report, identify, prepare
from charlm.lm.shards import ShardedCorpus
from charlm.lm.sources import text_of

MIN_BYTES = 64_000_000  # a smaller file is read into memory
SECONDS_BETWEEN_LOOKS = 0.1  # at a corpus that another process prepares


def folder() -> Path:
    """The folder of the cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "charlm", "corpora")


def is_worth_it(path: Path) -> bool:
    """Whether the file at `path` is so large that it is prepared."""
    return _ext._C is not None and path.is_file() and path.stat().st_size >= MIN_BYTES


def cached_corpus(
    path: Path,
    options: Options,
    *,
    announce: Callable[[Path], None],
    report: Report = lambda stage, done, total: None,
) -> ShardedCorpus:
    """The corpus of a plain text file, prepared once for its path, size, time of change and `options`.

    Of several processes that call it at the same time one prepares the corpus, and the others wait.

    Args:
        path: The file.
        options: How it is split.
        announce: Called with the folder before it is prepared.
        report: Called with the progress.

    Raises:
        UserError: As `prepare`.
    """
    sources = [identify(path)]
    key = json.dumps([shards.FORMAT_VERSION, sources, asdict(options)], sort_keys=True)
    directory = folder() / hashlib.sha256(key.encode()).hexdigest()[:32]
    announced = False
    while True:
        if directory.exists():
            try:
                return shards.load(directory)
            except UserError:  # damaged: prepare it again
                shutil.rmtree(directory, ignore_errors=True)  # another process may do so too
        if not announced:
            announce(directory)
        announced = True
        try:
            prepare(lambda: text_of([path]), directory, options, name=str(path), sources=sources, report=report)
        except LockedError:  # another process prepares it, such as another rank
            time.sleep(SECONDS_BETWEEN_LOOKS)
        except UserError:
            if not directory.exists():
                raise


def clear() -> int:
    """Removes the cache; returns the bytes that it took."""
    files = [path for path in folder().rglob("*") if path.is_file()] if folder().exists() else []
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder(), ignore_errors=True)
    return size
