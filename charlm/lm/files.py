"""Writing files so that a crash, a signal or a full disk leaves the old one whole."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def write_atomically(path: Path, data: bytes) -> None:
    """Writes `data` beside `path`, forces it to disk, and renames it into place.

    Raises:
        OSError: naming `path`; nothing of `data` is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Lets an OSError inside name `path`: one of write() or fsync(), as on a full disk, names no file."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


def _sync_directory(directory: Path) -> None:
    """Forces the directory's entries to disk: a rename that is not may be undone by a crash."""
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
