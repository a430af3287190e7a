"""Compiles emulated kernels, plain or with sanitizers, and gives the command and environment that run them.

A flavour is "plain", "address" (AddressSanitizer and UndefinedBehaviorSanitizer) or "thread" (ThreadSanitizer).
Results are cached in build/cuda_emulator under a hash of all their inputs, so that tests, processes and later runs
share them.

    library = build(["kernels.cu"], "address", uninstrumented=["adapter.cpp"], flags=torch_flags)
    subprocess.run(command("address", sys.executable, "script.py", library), env=environment("address"))
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

EMULATOR = Path(__file__).resolve().parent
ROOT = EMULATOR.parents[1]
CACHE = ROOT / "build" / "cuda_emulator"

# The exit status of a process that a sanitizer ends.
SANITIZER_EXIT_STATUS = 66

# -Og compiles in half the time of -O1, and small kernels run nearly as fast.
FLAVOURS = {
    "plain": ["-Og"],
    "address": ["-Og", "-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-Og", "-g1", "-fsanitize=thread"],
}
FLAGS = [
    *("-std=c++20", "-x", "c++", "-fPIC", "-fvisibility=hidden", "-fno-strict-aliasing"),
    *("-Wall", "-Wextra", "-Wno-unknown-pragmas"),  # nvcc's #pragma unroll
]
_RUNTIME = {"address": "libasan.so", "thread": "libtsan.so"}

PathLike = str | os.PathLike[str]


def compiler() -> list[str]:
    return shlex.split(os.environ.get("CXX", "c++"))


def build(
    sources: Sequence[PathLike],
    flavour: str,
    *,
    executable: bool = False,
    flags: Sequence[str] = (),
    include_dirs: Sequence[PathLike] = (),
    uninstrumented: Sequence[PathLike] = (),
    link_flags: Sequence[str] = (),
) -> Path:
    """Builds a shared library or an executable from `sources`, compiled in a flavour, and plain `uninstrumented` ones.

    Sources that include torch's headers should be uninstrumented: they are then compiled once for all flavours. The key
    of the cache covers `flags`, which go to every compilation, and the contents (not the names) of the sources and of
    the files that they include by quotes, from their own directory, `include_dirs` or the emulator's.
    """
    includes = [*map(Path, include_dirs), EMULATOR]
    jobs = [(Path(source), [*FLAGS, *FLAVOURS[flavour], *flags]) for source in sources]
    jobs += [(Path(source), [*FLAGS, *FLAVOURS["plain"], *flags]) for source in uninstrumented]
    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
        objects = list(pool.map(lambda job: _compile(*job, includes), jobs))
    link = [*FLAVOURS[flavour], *([] if executable else ["-shared"])]
    key = _hash(*link, *link_flags, *(o.name for o in objects))
    return _make(CACHE / (key if executable else f"{key}.so"), [*link, *map(str, objects), *link_flags])


def environment(flavour: str, **variables: str) -> dict[str, str]:
    """The environment of a process of that flavour: this one's, one OS thread, sanitizer options and `variables`."""
    options = {
        "address": {
            "ASAN_OPTIONS": {
                "detect_leaks": 0,  # Python's own
                "malloc_fill_byte": 255,  # NaN: a number that was never written shows in the result
                "max_malloc_fill_size": 1 << 26,
                "exitcode": SANITIZER_EXIT_STATUS,
            },
            "UBSAN_OPTIONS": {"print_stacktrace": 1, "exitcode": SANITIZER_EXIT_STATUS},
        },
        "thread": {
            "TSAN_OPTIONS": {
                # memcpy() and free() in libraries whose synchronisation ThreadSanitizer does not see
                "ignore_interceptors_accesses": 1,
                "detect_deadlocks": 0,  # the same
                "halt_on_error": 1,
                "atexit_sleep_ms": 0,
                "exitcode": SANITIZER_EXIT_STATUS,
            }
        },
    }.get(flavour, {})
    sanitizers = {name: ":".join(f"{k}={v}" for k, v in values.items()) for name, values in options.items()}
    return {**os.environ, "OMP_NUM_THREADS": "1", **sanitizers, **variables}


def command(flavour: str, *arguments: PathLike) -> list[str]:
    """The command for a program that was not built in that flavour but loads a library that was."""
    if flavour == "plain":
        return [*map(str, arguments)]
    # AddressSanitizer looks for __cxa_throw when it starts, before Python has loaded the C++ library.
    preloaded = " ".join(_library(name) for name in (_RUNTIME[flavour], "libstdc++.so.6"))
    return [*command_prefix(flavour), "env", f"LD_PRELOAD={preloaded}", *map(str, arguments)]


@functools.cache
def command_prefix(flavour: str) -> tuple[str, ...]:
    """The prefix of a command: ThreadSanitizer needs addresses that are not randomised."""
    prefix = ("setarch", platform.machine(), "-R")
    if flavour != "thread":
        return ()
    try:
        allowed = subprocess.run([*prefix, "true"], capture_output=True, check=False, timeout=10).returncode == 0
    except FileNotFoundError:
        return ()
    return prefix if allowed else ()


@functools.cache
def _library(name: str) -> str:
    found = subprocess.run(
        [*compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True, timeout=60
    ).stdout.strip()
    if not os.path.isabs(found):
        raise RuntimeError(f"{shlex.join(compiler())} comes without {name}: install GCC's sanitizer runtimes")
    return os.path.realpath(found)


@functools.cache
def _toolchain() -> str:
    version = subprocess.run([*compiler(), "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    try:
        return version + importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return version


def _hash(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in (_toolchain(), *parts):
        data = part.encode() if isinstance(part, str) else part
        digest.update(b"%d:" % len(data) + data)
    return digest.hexdigest()[:32]


def _with_includes(path: Path, include_dirs: Sequence[Path], seen: set[Path]) -> Iterator[bytes]:
    """The contents of a file and of the files that it includes by quotes, each once."""
    path = path.resolve()
    if path in seen:
        return
    seen.add(path)
    content = path.read_bytes()
    yield content
    for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', content, re.MULTILINE):
        candidates = (folder / os.fsdecode(name) for folder in (path.parent, *include_dirs))
        if found := next((c for c in candidates if c.is_file()), None):
            yield from _with_includes(found, include_dirs, seen)


def _compile(source: Path, flags: Sequence[str], include_dirs: Sequence[Path]) -> Path:
    key = _hash(*flags, *_with_includes(source, include_dirs, set()))
    includes = [f"-I{folder}" for folder in include_dirs]
    return _make(CACHE / f"{key}.o", [*flags, *includes, "-c", str(source)])


def _make(target: Path, arguments: Sequence[str]) -> Path:
    if target.exists():
        return target
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as folder:  # another process may be making the same
        made = Path(folder) / target.name
        done = subprocess.run(
            [*compiler(), *arguments, "-o", str(made)], capture_output=True, text=True, check=False, timeout=600
        )
        if done.returncode != 0:
            raise RuntimeError(f"{shlex.join([*compiler(), *arguments])}\n{done.stderr}")
        made.replace(target)
    return target
