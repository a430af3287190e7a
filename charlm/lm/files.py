"""Writing files so that a crash, a signal, a full disk or another process leaves the old one whole."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from charlm.lm.errors import UserError

LOCK = ".lock"


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


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Inside, this process is the one that writes to `directory`, made if need be.

    The lock is the kernel's, on a file in the folder: it ends with the process, however that ends. Reading needs none.

    Raises:
        UserError: another process holds it; nothing was changed.
        OSError: naming what cannot be written.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]  # the innermost first
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    descriptor = _take(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(descriptor)
        with suppress(OSError):  # as soon as one holds anything
            for folder in made:
                folder.rmdir()


def _take(path: Path) -> int:
    """The descriptor of the lock file at `path`, locked."""
    while True:
        with naming(path):
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            with naming(path):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # The one who held it removed it between our opening and our locking: then it locks nothing.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            raise UserError(
                f"another charlm is training in {path.parent}: wait for its end, or give another folder"
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _sync_directory(directory: Path) -> None:
    """Forces the directory's entries to disk: a rename that is not may be undone by a crash."""
    if os.name != "posix":  # elsewhere a directory cannot be opened
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
