"""Compiles every CUDA kernel for every architecture, and writes its registers and accesses to docs/gpu/RESOURCES.md.

    python scripts/cuda_resources.py            writes the file
    python scripts/cuda_resources.py --check    compares with it; fails if it is stale or a rule is broken
    python scripts/cuda_resources.py --check 9.0    compares the registers on some architectures alone

Needs nvcc and no GPU. nvcc (with warnings as errors) makes one cubin per source and architecture. ptxas prints the
registers and the memory of a kernel; nvdisasm (from the Python package nvidia-cuda-nvdisasm) prints its machine code,
which shows its memory accesses. The rules:

    a kernel declares the threads of a block (__launch_bounds__), so that the registers suffice for every launch;
    no register is spilled, and no kernel uses local memory;
    a kernel loads and stores 128 bits at once, except those in READ_ONLY and NARROW, and never stores them in pieces.

Exit status: 0, 1 if there is a problem, or 77 without nvcc.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from cuda_toolkit import ARCHITECTURES, find_toolkit, nvcc_release

ROOT = Path(__file__).resolve().parent.parent
KERNELS = ROOT / "csrc" / "cuda"
TABLES = ROOT / "docs" / "gpu" / "RESOURCES.md"
SKIPPED = 77  # as in automake
REGISTER_STEP = 8  # the hardware allocates registers to a thread in multiples of 8
NVCC_FLAGS = ("-O3", "-std=c++20", "-Werror", "all-warnings", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}")

# Patterns for the names of kernels that read whole rows and write one number for each.
READ_ONLY = (r"cross_entropy_(chunk_softmax|forward)<", r"(short|long)_rows<", r"kl_div_values<\w+, \d+, \w+, true>")

# Kernels that need not move 128 bits at once, and why.
NARROW = {
    r"cross_entropy_(prepare|join_chunks)<": "a few numbers of each row",
    r"cross_entropy_(words|options)<": "bulk copies through shared memory, from sm_90 on",
    r"cross_entropy_metrics_kernel<": "for logging, not for training",
    r"(short|long|gradient)_rows<.+>, 1\b": "rows that do not start at multiples of 16 bytes",
    r"embedding_copy_rows<unsigned ": "the same",
    r"embedding_sum_(chunks|pieces)<\w+, 1\b": "the same",
    r"embedding_linear_(sum_rows|differentiate)<\w+, 1>": "the same",
    r"kl_div_(values|gradients)<\w+, 1,": "the same",
    r"kl_div_total<": "a few numbers of each block",
    r"embedding_(count_digits|scatter_by_digit)<": "indices and positions, one at a time",
    r"embedding_join_(chunks|parts)<": "neighbouring threads add neighbouring columns",
    r"embedding_(linear_)?fill_tables<": "a thread sums a column: a warp reads 32 neighbours",
    r"embedding_linear_(forward|multiply_table|join_shares)<": "the same",
}


@dataclass(frozen=True)
class Limits:
    """Resources of a multiprocessor: CUDA programming guide, "Technical specifications per compute capability"."""

    threads: int
    blocks: int
    shared: int  # bytes
    registers: int = 65536


LIMITS = {
    "8.0": Limits(threads=2048, blocks=32, shared=164 << 10),
    "8.6": Limits(threads=1536, blocks=16, shared=100 << 10),
    "8.9": Limits(threads=1536, blocks=24, shared=100 << 10),
    "9.0": Limits(threads=2048, blocks=32, shared=228 << 10),
    "10.0": Limits(threads=2048, blocks=32, shared=228 << 10),
    "12.0": Limits(threads=1536, blocks=24, shared=100 << 10),
}


@dataclass(frozen=True)
class Figures:
    """Resources that a kernel uses on one architecture."""

    registers: int
    shared: int  # bytes, static
    stack: int  # bytes, in local memory
    spilled: int  # bytes, stored and loaded
    threads: int = 0  # of a block, from __launch_bounds__; 0 without it
    # "LDG", "STG", "LDS", "STS": of 128 bits; "pieces": 128 bits stored in pieces; "local"
    accesses: Mapping[str, int] = field(default_factory=Counter)


Kernels = dict[str, dict[str, Figures]]  # by name, then by architecture


# --- resources of a kernel -----------------------------------------------------------------------------------


def parse_ptxas(text: str) -> dict[str, Figures]:
    """Parses the output of `ptxas -v`: the figures of each kernel, by mangled name."""
    pattern = (
        r"Compiling entry function '(\w+)'.*?Function properties for \1\s+"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)"
    )
    kernels = {}
    for name, stack, stores, loads, registers, rest in re.findall(pattern, text, re.DOTALL):
        uses = {what: int(size) for size, what in re.findall(r"(\d+) bytes ([\w ]+)", rest)}
        deepest = max(int(stack), uses.get("cumulative stack size", 0))
        kernels[name] = Figures(int(registers), uses.get("smem", 0), deepest, int(stores) + int(loads))
    return kernels


def parse_machine_code(text: str) -> dict[str, tuple[int, Counter[str]]]:
    """Parses the output of nvdisasm: for each kernel, the threads of a block and its memory accesses by kind."""
    threads: dict[str, int] = {}
    accesses: dict[str, Counter[str]] = {}
    for section in re.split(r"^\s*\.section\s+\.", text, flags=re.MULTILINE):
        header, _, body = section.partition("\n")
        kind, _, name = header.partition(",")[0].rpartition(".")
        if kind == "text":
            instructions = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", body, re.MULTILINE)
            accesses[name] = Counter(filter(None, map(kind_of_access, instructions)))
            accesses[name].update(pieces=stores_in_pieces(body))
        elif kind == "nv.info" and "EIATTR_MAX_THREADS" in body:
            sizes = re.findall(r"\.word\s+(0x[0-9a-f]+)", body.partition("EIATTR_MAX_THREADS")[2])
            threads[name] = math.prod(int(size, 16) for size in sizes[:3])
    return {name: (threads.get(name, 0), counts) for name, counts in accesses.items()}


def kind_of_access(instruction: str) -> str | None:
    """Returns "LDG" for LDG.E.128, etc.; "local" for accesses to local memory; None for what is not counted."""
    operation, *modifiers = instruction.split(".")
    if operation in ("LDL", "STL"):
        return "local"
    if operation in ("LDG", "STG", "LDS", "STS", "LDGSTS") and {"128", "256"} & set(modifiers):
        return operation[:3]
    return None


def stores_in_pieces(body: str) -> int:
    """Counts 16-byte runs of global memory that narrower instructions store without a branch between them.

    The record of a bad index is not counted; it ends with a store of system scope.
    """
    found = 0
    for block in re.split(r"^\s*\.L_\w+:|\bBRA\b", body, flags=re.MULTILINE):
        if "STRONG.SYS" in block:
            continue
        stores = re.findall(r"\bSTG\.([\w.]+)\s+(?:desc\[\w+\])?\[(.*?)(?:\+(-?0x[0-9a-f]+))?\]", block)
        offsets: dict[str, set[int]] = {}
        for modifiers, base, offset in stores:
            bits = {"64": 64, "128": 0, "U8": 8, "U16": 16}  # no other modifier is a width
            width = next((bits[one] for one in modifiers.split(".") if one in bits), 32) // 8
            first = int(offset or "0", 16)
            offsets.setdefault(base, set()).update(range(first, first + width))
        found += sum(set(range(first, first + 16)) <= bytes_ for bytes_ in offsets.values() for first in bytes_)
    return found


def occupancy(figures: Figures, architecture: str) -> int:
    """Percent of a multiprocessor's threads that can be resident; dynamic shared memory is not counted."""
    limits = LIMITS[architecture]
    warps = -(-figures.threads // 32)
    by_warp = -(-figures.registers * 32 // 256) * 256  # registers are allocated to warps in multiples of 256,
    resident = limits.registers // 4 // by_warp * 4  # by four schedulers, each with a quarter of them
    reserved = 1024  # bytes of each block's shared memory that CUDA reserves
    by_block = -(-(figures.shared + reserved) // 128) * 128
    blocks = min(limits.blocks, limits.threads // (warps * 32), resident // warps, limits.shared // by_block)
    return 100 * blocks * warps * 32 // limits.threads


# --- names --------------------------------------------------------------------------------------------------


def enumerators(sources: Iterable[str]) -> dict[str, list[str]]:
    """The names of the values of every enum class, in order."""
    found = re.findall(r"enum class (\w+)[^{;]*\{([^}]*)\}", "\n".join(sources))
    return {name: re.findall(r"(\w+)\s*(?:,|\Z|=|//|\n)", re.sub(r"//.*", "", values)) for name, values in found}


def short_name(demangled: str, enums: Mapping[str, list[str]]) -> str:
    """The name of a kernel without namespaces, result and arguments: cross_entropy_block<float, kForward, true>."""

    def value(match: re.Match[str]) -> str:
        names = enums.get(match[1].rpartition("::")[2], [])
        index = int(match[2])
        return names[index] if index < len(names) else match[0]

    name = demangled.replace("(anonymous namespace)::", "")
    name = re.sub(r"\(([\w:]+)\)(\d+)", value, name)
    return re.sub(r"\b\w+::", "", name.partition("(")[0].removeprefix("void ")).strip()


# --- compiling ----------------------------------------------------------------------------------------------


def compile_kernels(toolkit: Path, nvdisasm: str, source: Path, architecture: str) -> dict[str, Figures]:
    """Figures of every kernel of a source on one architecture, by mangled name; SystemExit if nvcc fails."""
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        target = f"-arch=sm_{architecture.replace('.', '')}"
        command = [toolkit / "bin" / "nvcc", *NVCC_FLAGS, target, "-cubin", "-o", cubin, source]
        compiled = subprocess.run(command, capture_output=True, text=True, check=False)
        if compiled.returncode:
            raise SystemExit(f"{source.name} does not compile for {architecture}:\n{compiled.stdout}{compiled.stderr}")
        printed = subprocess.run([nvdisasm, "-ndf", cubin], capture_output=True, text=True, check=True).stdout
    machine_code = parse_machine_code(printed)
    print(f"{source.name} for {architecture}: {time.perf_counter() - start:.0f} s", flush=True)
    return {
        name: replace(taken, threads=machine_code[name][0], accesses=machine_code[name][1])
        for name, taken in parse_ptxas(compiled.stdout + compiled.stderr).items()
    }


def measure(toolkit: Path, nvdisasm: str, sources: Iterable[Path], architectures: Sequence[str]) -> dict[str, Kernels]:
    """Figures of every kernel, by the name of its source, its own name, and the architecture."""
    jobs = [(source, architecture) for source in sources for architecture in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(lambda job: compile_kernels(toolkit, nvdisasm, *job), jobs))
    mangled = sorted({name for result in results for name in result})
    filtered = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True).stdout
    headers = [*sorted(KERNELS.glob("*.cuh")), *sorted((ROOT / "csrc" / "ops").glob("*.h"))]
    enums = enumerators(path.read_text(encoding="utf-8") for path in headers)
    names = {name: short_name(demangled, enums) for name, demangled in zip(mangled, filtered.splitlines(), strict=True)}
    measured: dict[str, Kernels] = {}
    for (source, architecture), result in zip(jobs, results, strict=True):
        kernels = measured.setdefault(source.stem, {})
        for name, figures in result.items():
            kernels.setdefault(names[name], {})[architecture] = figures
    return measured


def broken_rules(measured: Mapping[str, Kernels]) -> list[str]:
    """A sentence for each rule that a kernel breaks on an architecture."""
    broken = []
    for kernels in measured.values():
        for name, by_architecture in kernels.items():
            for architecture, figures in by_architecture.items():
                where = f"{name} on {architecture}"
                if not figures.threads:
                    broken.append(f"{where} has no __launch_bounds__")
                if figures.spilled:
                    broken.append(f"{where} spills registers: {figures.spilled} bytes")
                if figures.stack or figures.accesses["local"]:
                    broken.append(f"{where} uses local memory: {figures.stack} bytes")
                broken += [f"{where} has no {kind} of 128 bits" for kind in wide(name) if not figures.accesses[kind]]
                if "STG" in wide(name) and figures.accesses["pieces"]:
                    broken.append(f"{where} stores 128 bits in pieces")
    return broken


def wide(name: str) -> tuple[str, ...]:
    """The kinds of accesses to global memory that a kernel of this name must make with 128 bits."""
    if any(re.match(pattern, name) for pattern in NARROW):
        return ()
    return ("LDG",) if any(re.match(pattern, name) for pattern in READ_ONLY) else ("LDG", "STG")


# --- the file -----------------------------------------------------------------------------------------------


HEADER = """# What the CUDA kernels take

Generated by `python scripts/cuda_resources.py` with nvcc {release}; a test compares 9.0. Without a GPU: registers are
ptxas's, accesses are counted in the machine code, occupancy follows from registers, threads and static shared memory.

- threads: of a block, the most that its launch uses. shared: static shared memory, bytes; the dynamic part, which a
  launch requests, is not counted, and not in the occupancy either.
- 8.0 to 12.0: registers of a thread (resident threads, percent of a multiprocessor's most).
- global, shared accesses: instructions that load / store 128 bits, the fewest of any architecture.

No kernel spills a register or uses local memory.
"""


def render(measured: Mapping[str, Kernels], release: str) -> str:
    """The text of the file: a table for each source."""
    lines = [HEADER.format(release=release)]
    for source, kernels in sorted(measured.items()):
        architectures = next(iter(kernels.values()), ())
        columns = ("kernel", "threads", "shared", *architectures, "global accesses", "shared accesses")
        lines += [f"## {source}", "", f"| {' | '.join(columns)} |", "|---" + "|---:" * (len(columns) - 1) + "|"]
        lines += [row(name, kernels[name]) for name in sorted(kernels)]
        lines.append("")
    return "\n".join(lines)


def row(name: str, by_architecture: Mapping[str, Figures]) -> str:
    figures = by_architecture.values()

    def fewest(loads: str, stores: str) -> str:
        return " / ".join(str(min(one.accesses[kind] for one in figures)) for kind in (loads, stores))

    cells = [
        f"`{name}`",
        str(max(one.threads for one in figures)),
        str(max(one.shared for one in figures)),
        *(f"{one.registers} ({occupancy(one, at)} %)" for at, one in by_architecture.items()),
        fewest("LDG", "STG"),
        fewest("LDS", "STS"),
    ]
    return "| " + " | ".join(cells) + " |"


def read_tables(text: str) -> dict[str, dict[str, str]]:
    """The cells of each kernel's row by column, by "source: kernel"."""
    rows = {}
    for section in text.split("\n## ")[1:]:
        source = section.partition("\n")[0]
        _, *columns = re.findall(r"^\| (kernel .*) \|$", section, re.MULTILINE)[0].split(" | ")
        for line in re.findall(r"^\| (`.*) \|$", section, re.MULTILINE):
            name, *cells = line.split(" | ")
            rows[f"{source}: {name.strip('`')}"] = dict(zip(columns, cells, strict=True))
    return rows


def stale_rows(committed: str, fresh: str) -> list[str]:
    """A sentence for each kernel whose row in the committed file differs from the fresh one.

    Registers may differ by a step; counts of accesses may differ unless one of them is zero. The columns that stand for
    all architectures are compared if the fresh file has all of them.
    """
    old, new = read_tables(committed), read_tables(fresh)
    stale = [f"{name} is not in the file" for name in new if name not in old]
    stale += [f"{name} is in the file, but no kernel" for name in old if name not in new]
    for name in old.keys() & new.keys():
        has_all = new[name].keys() == old[name].keys()
        for column, after in new[name].items():
            before = old[name][column]
            if column in ARCHITECTURES:
                same = abs(int(before.split()[0]) - int(after.split()[0])) <= REGISTER_STEP
            elif not has_all:
                same = True
            elif "accesses" in column:
                same = [count == "0" for count in before.split(" / ")] == [count == "0" for count in after.split(" / ")]
            else:
                same = before == after
            if not same:
                stale.append(f"{name}, {column}: {before} in the file, now {after}")
    return sorted(stale)


# --- the command --------------------------------------------------------------------------------------------


def find_nvdisasm() -> str | None:
    """nvdisasm on PATH, or in its Python package."""
    site = Path(sysconfig.get_paths()["purelib"], "nvidia")
    folders = [os.environ.get("PATH", ""), *map(str, sorted(site.glob("*/bin")))]
    return shutil.which("nvdisasm", path=os.pathsep.join(folders))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--check", nargs="*", metavar="ARCHITECTURE", help="compare with the file instead of writing it"
    )
    arguments = parser.parse_args()
    architectures = arguments.check or ARCHITECTURES
    if unknown := set(architectures) - set(ARCHITECTURES):
        parser.error(f"unknown architecture: {', '.join(sorted(unknown))} (known: {', '.join(ARCHITECTURES)})")

    toolkit = find_toolkit(os.environ)
    if toolkit is None:
        print("No CUDA toolkit: put its nvcc on PATH, or set CUDA_HOME to its folder.")
        return SKIPPED
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        print("nvdisasm was not found. Install it: pip install nvidia-cuda-nvdisasm")
        return 1

    start = time.perf_counter()
    measured = measure(toolkit, nvdisasm, sorted(KERNELS.glob("*.cu")), architectures)
    release = nvcc_release(toolkit)
    fresh = render(measured, release)
    problems = broken_rules(measured)
    if arguments.check is None:
        TABLES.write_text(fresh, encoding="utf-8")
    else:
        committed = TABLES.read_text(encoding="utf-8")
        if f"with nvcc {release};" in committed:
            problems += stale_rows(committed, fresh)
        else:
            print(f"{TABLES.name} is of another nvcc than {release}: not compared.")
    for problem in problems:
        print(problem)
    n_kernels = sum(len(kernels) for kernels in measured.values())
    print(
        f"{n_kernels} kernels for {', '.join(architectures)} with nvcc {release}, "
        f"{time.perf_counter() - start:.0f} s: {len(problems) or 'no'} problems"
    )
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
