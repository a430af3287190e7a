"""The corpora that `charlm train` prepared by itself from large files: in $XDG_CACHE_HOME/charlm/corpora.

<key>/           a prepared corpus; the key is a hash of the text's sha256 and of the options
files/<key>      the sha256 of a file, found by its path, size and times, so that a file is hashed once
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from charlm import _ext
from charlm._errors import UserError
from charlm.lm import shards
from charlm.lm.files import LockedError, sha256_of, write_atomically
from charlm.lm.prepare import Options, identify, prepare, unchanged
from charlm.lm.shard_writer import Report, changed
from charlm.lm.shards import ShardedCorpus
from charlm.lm.sources import DEFAULT_COLUMN, reads_as

SHA256 = re.compile(rb"[0-9a-f]{64}")
MOST_REMOVALS = 3  # of a damaged corpus that comes back
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
    column: str = DEFAULT_COLUMN,
    announce: Callable[[Path], None],
    report: Report = lambda stage, done, total: None,
) -> ShardedCorpus:
    """The corpus of a file, prepared once for its content and `options`.

    `announce` is called with the folder before it is prepared. Of several processes that call it at the same time one
    prepares the corpus, and the others wait.

    Raises:
        UserError: As `prepare`, or the file changed while it was read.
    """
    found = identify(path)
    kind, compression = reads_as(path)
    of_column = {"column": column} if kind else {}
    content = {"bytes": found["bytes"], "sha256": _content(path, found, report)}
    sources = [{**content, "reads_as": [kind, compression], **of_column}]
    directory = folder() / _key([shards.FORMAT_VERSION, sources, asdict(options)])
    announce, damaged = functools.cache(announce), 0  # it is announced once
    text = functools.partial(unchanged, [path], {path: found}, column)
    while True:
        if directory.exists():
            try:
                return shards.load(directory)
            except UserError as error:  # damaged: prepare it again
                shutil.rmtree(directory, ignore_errors=True)  # another process may do so too
                damaged += 1
                if damaged > MOST_REMOVALS:
                    raise UserError(f"{directory} cannot be used or removed ({error}): remove it by hand") from error
        announce(directory)
        try:
            prepare(text, directory, options, name=str(path), sources=sources, report=report)
        except LockedError:  # another process prepares it, such as another rank
            time.sleep(SECONDS_BETWEEN_LOOKS)
        except UserError:
            if not directory.exists():
                raise


def _key(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]


def _content(path: Path, found: dict[str, Any], report: Report) -> str:
    """The sha256 of a file, kept until the file changes."""
    known = folder() / "files" / _key(found)
    with suppress(OSError):
        if SHA256.fullmatch(text := known.read_bytes()):
            return text.decode()
    try:
        content = sha256_of(path, lambda done: report("hashing", done, found["bytes"]))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if identify(path) != found:
        raise changed(str(path))
    with suppress(OSError):  # then it is hashed again next time
        known.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(known, content.encode())
    return content


def clear() -> int:
    """Removes the cache; returns the bytes that it took."""
    files = [path for path in folder().rglob("*") if path.is_file()] if folder().exists() else []
    size = sum(path.stat().st_size for path in files)
    shutil.rmtree(folder(), ignore_errors=True)
    return size
