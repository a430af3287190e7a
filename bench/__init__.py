"""The benchmark: `python -m bench`. Every kernel is checked, then timed beside its peers and the machine's floor.

cases.py       what is timed, and the goal that each case has
inputs.py      the tensors of a case, and whether they fit into memory
check.py       ours against float64, before anything is timed
contenders.py  ours, torch eager, torch.compile, JAX and the floors, as calls without arguments
clock.py       interleaved samples; disturbed ones are repeated, a busy machine is refused
memory.py      bytes allocated during one call
measure.py     one case from its inputs to its `Result`
record.py      the JSON: writing, reading, comparing, the README's table
report.py      the printed tables
scaling.py     time against N, V and threads, and its plot
fold.py        embedding_linear's two plans against N: docs/skip_the_matmul.md
units.py       how a time and a ratio are printed
grid.py        many shapes: is any slower than torch?
models.py      what the README says of the trained models (a command of its own)
gpu.py         the command behind `make gpu`: builds, tests, checks and times on a GPU; gpu_*.py are its parts
"""
