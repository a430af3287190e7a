"""Atomic file writes, which leave the old file intact after a crash or on a full disk; hashes; the lock of a folder."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from charlm._errors import UserError

LOCK = ".lock"
HASHED_BYTES = 1 << 20  # read at a time


def write_atomically(path: Path, data: bytes | Iterable[bytes], mode: int | None = None) -> None:
    """Writes `data`, or its pieces, to a temporary file beside `path`, syncs it to disk and renames it to `path`.

    `mode` is the file's permissions, from before its first byte; None takes those of a new file.

    Raises:
        OSError: `path` is a device, a pipe or a socket, which would be replaced, or cannot be written. The error names
            it; the temporary file is removed, as it is for an error that the pieces raise.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # rename reports a folder
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    path = path.resolve() if path.is_symlink() else path  # the file that it names is replaced, and the link stays
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with naming(path):
        try:
            with temporary.open("wb") as file:
                if mode is not None:
                    os.fchmod(file.fileno(), mode)
                file.writelines([data] if isinstance(data, bytes) else data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)


def sha256_of(path: Path, on_bytes: Callable[[int], object] = lambda done: None) -> str:
    """The sha256 of a file in hexadecimal; `on_bytes` is called with the number of bytes that are read so far."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(HASHED_BYTES):
            digest.update(block)
            on_bytes(file.tell())
    return digest.hexdigest()


class LockedError(UserError):
    """Another process holds the lock of a folder."""


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Sets the file name of an OSError raised inside to `path`; write() and fsync() raise errors without one."""
    try:
        yield
    except OSError as error:
        error.filename = str(path)
        raise


@contextmanager
def locked(directory: Path, work: str = "is training in") -> Iterator[None]:
    """Locks `directory` for writing by this process, and creates it if needed. Readers need no lock.

    The kernel holds the lock, on a file in the folder, and releases it when the process ends for any reason. Folders
    that were created are removed again if they are still empty. `work` is what another process is doing, in the error.

    Raises:
        LockedError: Another process holds the lock; nothing was changed.
        OSError: The folder or the lock file cannot be written; the error names it.
    """
    created = [path for path in (directory, *directory.parents) if not path.exists()]  # the innermost first
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / LOCK
    file = _acquire(path, work)
    try:
        yield
    finally:
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):  # not another process's
            path.unlink()
        file.close()
        with suppress(OSError):  # raised by the first folder that is not empty
            for folder in created:
                folder.rmdir()


def _acquire(path: Path, work: str) -> BinaryIO:
    """The file at `path`, open and locked."""
    while True:
        with naming(path), ExitStack() as stack:
            file = stack.enter_context(path.open("ab"))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockedError(
                    f"another charlm {work} {path.parent}: wait until it ends, or choose another folder"
                ) from None
            # The previous holder may have removed the file between open and flock. Then the lock protects nothing, and
            # the file is created again.
            if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
                stack.pop_all()
                return file


def _sync_directory(directory: Path) -> None:
    """Syncs the directory's entries to disk; without this a crash may undo a rename."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
