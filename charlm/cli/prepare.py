"""`charlm prepare`: writes vocabulary and tokens of texts of any size into a folder that `charlm train -i` reads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from charlm._errors import UserError
from charlm.cli.common import new_console
from charlm.lm.config import Config


def prepare(
    files: Annotated[
        list[str] | None,
        typer.Argument(
            help="Text files, globs, or - for standard input: UTF-8 text, .jsonl, .parquet, .csv or .tsv, also as "
            ".gz or .zst."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Folder to create.")] = None,
    format: Annotated[
        str | None, typer.Option(help="Data format: line (one item per line) or text. Default: guessed.")
    ] = None,
    split_seed: Annotated[int, typer.Option(help="Random seed of the 80/10/10 split.")] = Config.split_seed,
    dedup: Annotated[bool, typer.Option("--dedup", help="Keep only the first of equal items.")] = Config.dedup,
    column: Annotated[
        str, typer.Option(help="Column of .jsonl, .parquet, .csv and .tsv files; without a header its number.")
    ] = "text",
    document_separator: Annotated[
        str,
        typer.Option(
            help="Text between two documents, where the first does not end with it. Default: a newline.",
            show_default=False,
        ),
    ] = "\n",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the corpus in the folder.")] = False,
    check: Annotated[
        Path | None, typer.Option(help="Only compare the files in this prepared folder with their checksums.")
    ] = None,
    clear_cache: Annotated[
        bool, typer.Option("--clear-cache", help="Only remove the corpora that `charlm train` prepared by itself.")
    ] = False,
) -> None:
    """Prepare texts of any size for training.

    Write vocabulary, split and tokens into a folder, in little memory. `charlm train -i DIR` then starts at once.

    An interrupted call goes on where it stopped if it is repeated.
    """
    from charlm.lm import cache
    from charlm.lm.display import progress_bar
    from charlm.lm.memory import format_bytes
    from charlm.lm.prepare import Options, prepare, unchanged
    from charlm.lm.shards import load, verify
    from charlm.lm.sources import find_inputs

    if check is not None:
        with progress_bar(check.name) as report:
            size = verify(check, report)
        new_console().print(f"{check}: ok, {format_bytes(size)}", soft_wrap=True)
        return
    if clear_cache:
        size = cache.clear()
        new_console().print(f"removed {cache.folder()} ({format_bytes(size) if size else 'it was empty'})")
        return
    if not files or output is None:
        raise UserError("give the files to prepare, and the folder to create with -o")
    paths = find_inputs(files)
    with _readable_twice(paths, output) as (readable, sources), progress_bar(output.name) as report:
        files_found = dict(zip(paths, sources, strict=True)) if readable == paths else {}  # a stream has been copied
        prepare(
            partial(unchanged, readable, files_found, column, document_separator),
            output,
            Options(format, split_seed, dedup),
            name=", ".join(files[:3]) + (" …" if len(files) > 3 else ""),
            sources=[source | {"column": column, "separator": document_separator} for source in sources],
            overwrite=overwrite,
            report=report,
        )
    corpus = load(output)
    unit = "items" if corpus.format == "line" else "characters"
    counts = ", ".join(f"{split} {size:,}" for split, size in corpus.sizes.items())
    tokens = corpus.manifest["tokens"]
    new_console().print(
        f"{output}: {sum(corpus.sizes.values()):,} {unit} ({corpus.format} format); {counts}; "
        f"{len(corpus.vocabulary):,} tokens in {tokens['dtype']}, {len(tokens['shards'])} shards; train with:\n"
        f"charlm train -i {output}",
        soft_wrap=True,
    )


@contextmanager
def _readable_twice(paths: list[Path], output: Path) -> Iterator[tuple[list[Path], list[dict[str, Any]]]]:
    """The files, and what the manifest says of them; a stream is copied to a file without a name beside `output`."""
    from charlm.lm.prepare import identify, spooled

    if all(path.is_file() for path in paths):
        yield paths, [identify(path) for path in paths]
        return
    path = next(path for path in paths if not path.is_file())
    if len(paths) > 1:
        raise UserError(f"{path} is not a file: only a single stream can be prepared")
    with spooled(_blocks(path), output) as (copy, size, sha256):
        yield [copy], [{"path": str(path), "bytes": size, "sha256": sha256}]


def _blocks(path: Path) -> Iterator[bytes]:
    from charlm.lm.data import opened

    with opened(path) as stream:
        while block := stream.read(1 << 20):
            yield block
