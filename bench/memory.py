"""Peak memory of one call: what torch's allocator gave out during it, less what it took back, at the worst moment."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler writes two lines to stderr for each run below that


def peak_bytes(call: Callable[[], object]) -> int:
    """The largest running sum of the call's allocations and releases; inputs, made before, do not count.

    What a kernel keeps on its threads' stacks, and what it takes from malloc itself, is not seen.
    """
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = call()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8"))
    del result  # alive until here, as an output is
    events = [event for event in trace["traceEvents"] if event.get("name") == "[memory]"]
    total = peak = 0
    for event in sorted(events, key=lambda event: event["ts"]):
        total += event["args"]["Bytes"]
        peak = max(peak, total)
    return peak
