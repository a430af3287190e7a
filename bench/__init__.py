"""The benchmark: `python -m bench`. Every op is checked against float64, then timed beside its peers.

__main__.py   the command line
cases.py      what is timed on each device, and the goal of each case
ops/          the tensors, the providers and the check of each op
providers.py  charlm, torch eager, torch.compile, JAX, Liger, CCE and quack as calls without arguments
timer.py      interleaved samples on a CPU and on a GPU
measure.py    one case: check, time, ratios, memory
record.py     the JSON of a run
report.py     tables and the chart, from that JSON
gpu.py        `make gpu`: builds, tests, checks and times on a machine with a GPU
studies/      measurements that answer one question each
results/      what was recorded; README, docs and NOTES.md cite these files
"""
