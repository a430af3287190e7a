"""Runs the benchmark of this source folder on the charlm that is installed: `python scripts/benchmark.py --quick`.

`python -m bench` in the source folder imports the charlm that stands beside it, in which `pip install .` built nothing.
Here the source folder is last on sys.path: what is installed comes first, with or without -e.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    folder = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry).resolve() != folder] + [str(folder.parent)]
    runpy.run_module("bench", run_name="__main__", alter_sys=True)
