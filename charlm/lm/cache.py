"""The corpora that `charlm train` prepared by itself from large files: in $XDG_CACHE_HOME/charlm/corpora."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from charlm._errors import UserError
from charlm.lm import shards
from charlm.lm.prepare import Options, Report, identify, prepare
from charlm.lm.shards import ShardedCorpus
from charlm.lm.sources import text_of

MIN_BYTES = 64_000_000  # a smaller file is read into memory


def folder() -> Path:
    """The folder of the cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base, "charlm", "corpora")


def is_worth_it(path: Path) -> bool:
    """Whether the file at `path` is so large that it is prepared."""
    return path.is_file() and path.stat().st_size >= MIN_BYTES


def cached_corpus(
    path: Path,
    options: Options,
    *,
    announce: Callable[[Path], None],
    report: Report = lambda stage, done, total: None,
) -> ShardedCorpus:
    """The corpus of a plain text file, prepared once for its path, size, time of change and `options`.

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
    if directory.exists():
        try:
            return shards.load(directory)
        except UserError:  # damaged: prepare it again
            shutil.rmtree(directory)
    announce(directory)
    prepare(lambda: text_of([path]), directory, options, name=str(path), sources=sources, report=report)
    return shards.load(directory)


def clear() -> int:
    """Removes the cache; returns the bytes that it took."""
    files = [path for path in folder().rglob("*") if path.is_file()] if folder().exists() else []
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder(), ignore_errors=True)
    return size
