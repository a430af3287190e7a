"""Sizes of files under `charlm compress`, gzip, bz2, xz and zstd: bench/results/compression.json and its table.

    python -m bench.studies.compression FILE... [--json FILE]

Seconds are processor time, for coding, decoding and comparing. Needs the extras compress and data.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from charlm.lm.compression import compress, peer_sizes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    records = {}
    for file in options.files:
        data = file.read_bytes()
        start = time.process_time()
        packed = compress(data)
        seconds = time.process_time() - start
        sizes = {"none": len(data), "charlm": len(packed)} | peer_sizes(data)
        records[file.name] = {"sizes": sizes, "us_per_byte": round(1e6 * seconds / len(data), 1)}
    if options.json:
        options.json.write_text(json.dumps(records, indent=2) + "\n", encoding="utf-8")
    names = next(iter(records.values()))["sizes"]
    print(f"| bits per byte | {' | '.join(list(names)[1:])} |\n|{'---|' * len(names)}")
    for name, record in records.items():
        size, *others = record["sizes"].values()
        print(f"| {name}, {size:,} bytes | {' | '.join(f'{8 * other / size:.3f}' for other in others)} |")


if __name__ == "__main__":
    main()
