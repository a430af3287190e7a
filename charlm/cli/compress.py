"""`charlm compress` and `charlm decompress`: files by an adaptive n-gram model and arithmetic coding, without loss."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from charlm._errors import UserError

SUFFIX = ".charlm"
STREAM = Path("-")
Input = Annotated[Path, typer.Argument(help="File, which is kept; - reads standard input.")]
Output = Annotated[
    Path | None,
    typer.Option("-o", "--output", help="Output; - is standard output. Default: FILE.charlm, or FILE without it."),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output file if it exists.")]


def compress(file: Input, output: Output = None, overwrite: Overwrite = False) -> None:
    """Compress a file of any kind without loss.

    The output is decoded and compared before it is written. A table shows its bits per byte beside gzip, bz2, xz, zstd.

    Needs the extra compress. Takes about 10 seconds a megabyte; memory is the file, and at most 300 MB.
    """
    from charlm.lm.compression import compress
    from charlm.lm.display import progress_bar

    target = _checked_target(file, output or (STREAM if file == STREAM else Path(f"{file}{SUFFIX}")), overwrite)
    data, mode = _read(file)
    with progress_bar(target.name) as report:
        packed = compress(data, report)
    _write(target, [packed], mode)
    _show(data, packed, on_stderr=target == STREAM)


def decompress(file: Input, output: Output = None, overwrite: Overwrite = False) -> None:
    """Restore a file that `charlm compress` wrote.

    A damaged file is refused.

    Needs the extra compress. Takes about 5 seconds a megabyte; the output appears when its checksum is right.
    """
    from charlm.lm.compression import decoded
    from charlm.lm.data import data_name

    if output is None and file != STREAM and file.suffix != SUFFIX:
        raise UserError(f"the name {file} does not end with {SUFFIX}: name the output with -o")
    target = _checked_target(file, output or (STREAM if file == STREAM else file.with_suffix("")), overwrite)
    data, mode = _read(file)
    _write(target, decoded(data, data_name(file)), mode)


def _checked_target(file: Path, target: Path, overwrite: bool) -> Path:
    if target == STREAM:
        if sys.stdout.isatty():
            raise UserError("standard output is a terminal: name a file with -o")
    elif target.is_dir():
        raise UserError(f"{target} is a folder: name a file with -o")
    elif target.exists():
        if not target.is_file():
            raise UserError(f"{target} is not a regular file: name another with -o, or - for standard output")
        if file != STREAM and file.exists() and target.samefile(file):
            raise UserError(f"{target} is the input itself: name another output with -o")
        if not overwrite:
            raise UserError(f"{target} already exists: add --overwrite to replace it, or name another with -o")
    return target


def _read(file: Path) -> tuple[bytes, int | None]:
    """The content and the permissions of a file; None for those of standard input."""
    from charlm.lm.data import opened

    with opened(file) as stream:
        mode = None if file == STREAM else os.fstat(stream.fileno()).st_mode & 0o777
        return stream.read(), mode


def _write(target: Path, pieces: Iterable[bytes], mode: int | None) -> None:
    from charlm.lm.files import write_atomically

    if target == STREAM:
        with tempfile.TemporaryFile() as file:  # until all are decoded, and the checksum is right
            file.writelines(pieces)
            file.seek(0)
            shutil.copyfileobj(file, sys.stdout.buffer)
        sys.stdout.buffer.flush()
    else:
        write_atomically(target, pieces, mode)


def _show(data: bytes, packed: bytes, on_stderr: bool) -> None:
    """Prints the table of compressors; bits per character only where the file is UTF-8."""
    from charlm.lm.compression import peer_sizes
    from charlm.lm.terminal import SafeConsole, print_line, print_table

    console = SafeConsole(stderr=on_stderr, highlight=False, markup=False, emoji=False)
    sizes = {"none": len(data), "charlm": len(packed)} | peer_sizes(data)
    columns = {"compressor": list(sizes), "bytes": [f"{size:,}" for size in sizes.values()]}
    units = {"byte": len(data)}
    with suppress(UnicodeDecodeError):
        units["character"] = len(data.decode())
    for unit, count in units.items():
        if count:
            columns[f"bits per {unit}"] = [f"{8 * size / count:.4f}" for size in sizes.values()]
    print_table(console, columns, folded="compressor")
    if "zstd -19" not in sizes:
        print_line(console, "zstd is left out: pip install zstandard")
