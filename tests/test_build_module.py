"""The compiled module as a shared object: its C++ and OpenMP runtimes are torch's, whatever compiled it."""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from setup_module import build

from charlm import _C

ROOT = Path(__file__).resolve().parent.parent
THROWS = "int throws(int x) { if (x) throw x; return x; }"
# The time on a processor of each thread but the first, around each of three calls; and the OpenMP runtimes in memory.
TWO_THREADS = """
import json, os, re, torch
from charlm import functional

def worker_times():
    tasks = [task for task in os.listdir("/proc/self/task") if int(task) != os.getpid()]
    return {task: int(open(f"/proc/self/task/{task}/schedstat").read().split()[0]) for task in tasks}

logits, target = torch.zeros(60_000, 257), torch.zeros(60_000, dtype=torch.int64)
times = []
for n_threads in (1, 2, 1):
    torch.set_num_threads(n_threads)
    before = worker_times()
    functional.cross_entropy(logits, target)
    times.append(sum(after - before.get(task, 0) for task, after in worker_times().items()))
runtimes = set(re.findall(r"\\S*/lib(?:g|i)?omp[^/\\s]*", open("/proc/self/maps").read()))
print(json.dumps({"times": times, "runtimes": sorted(runtimes)}))
"""


def link(folder, *flags, compiler=("c++",), source=THROWS):
    """A shared object of `source`, linked with `flags`."""
    module = folder / "module.so"
    subprocess.run(
        [*compiler, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(module), *flags],
        input=source,
        text=True,
        check=True,
    )
    return module


@pytest.fixture
def static_compiler(tmp_path):
    """A script called g++ that links the C++ runtime's archive, as some toolchains do by themselves."""
    script = tmp_path / "g++"
    script.write_text(f'#!/bin/sh\nexec {shutil.which("c++")} "$@" -static-libstdc++\n')
    script.chmod(0o755)
    return (str(script),)


@pytest.fixture(scope="module")
def two_threads():
    """What TWO_THREADS prints. Waiting threads sleep, so that the time of a thread is time of work."""
    env = {**os.environ, "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "2"}
    printed = subprocess.run([sys.executable, "-c", TWO_THREADS], env=env, capture_output=True, text=True, check=True)
    return json.loads(printed.stdout)


# --- the C++ runtime ----------------------------------------------------------------------------------------


def test_the_module_throws_through_the_shared_cxx_runtime():
    build.check_cxx_runtime(Path(_C.__file__))


def test_a_module_with_a_cxx_runtime_of_its_own_is_refused_and_removed(tmp_path, static_compiler):
    module = link(tmp_path, compiler=static_compiler)
    assert "__cxa_throw" in build.elf.read_dynamic_section(module).defined
    with pytest.raises(build.BuildError, match=r"runtime into module\.so, .*\n.*-static-libstdc\+\+.*CXX="):
        build.check_cxx_runtime(module)
    assert not module.exists()


def test_a_hidden_cxx_runtime_is_refused_as_well(tmp_path, static_compiler):
    module = link(tmp_path, "-Wl,--exclude-libs,ALL", "-s", compiler=static_compiler)
    assert "__cxa_throw" not in build.elf.read_dynamic_section(module).defined
    with pytest.raises(build.BuildError, match="put a static C\\+\\+ runtime into"):
        build.check_cxx_runtime(module)


def test_our_link_flags_find_the_shared_cxx_runtime_where_the_compiler_links_the_static_one(tmp_path, static_compiler):
    module = link(tmp_path, *build.LINK_FLAGS, compiler=static_compiler)
    build.check_cxx_runtime(module)
    assert module.exists()


def test_our_link_flags_find_the_shared_cxx_runtime_where_its_development_link_dangles(tmp_path):
    (tmp_path / "libstdc++.so").symlink_to(tmp_path / "nowhere")
    archive = subprocess.run(["c++", "-print-file-name=libstdc++.a"], capture_output=True, text=True, check=True).stdout
    (tmp_path / "libstdc++.a").symlink_to(archive.strip())
    flags = (f"-L{tmp_path}",)
    assert "libstdc++.so.6" not in build.elf.read_dynamic_section(link(tmp_path, *flags)).needed
    build.check_cxx_runtime(link(tmp_path, *flags, *build.LINK_FLAGS))


def test_what_is_no_shared_object_is_said_to_be_none(tmp_path):
    path = tmp_path / "module.so"
    path.write_bytes(b"\x7fELF\x01 of 32 bits")
    with pytest.raises(ValueError, match=r"module\.so is not a 64-bit ELF file"):
        build.elf.read_dynamic_section(path)


# --- setup.py, on two small sources -------------------------------------------------------------------------

SMALL_SOURCES = {
    "csrc/cpu/kernels.cpp": "#define NAME_(isa) isa##_kernels\n#define NAME(isa) NAME_(isa)\nint NAME(CHARLM_ISA);",
    "csrc/sum.cpp": """#include <ATen/Parallel.h>
extern "C" __attribute__((visibility("default"))) int64_t add_up(int64_t n) {
  if (n < 0) throw n;
  std::atomic<int64_t> sum{0};
  at::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { sum += end - begin; });
  return sum;
}
""",
}


@pytest.fixture
def small_tree(tmp_path):
    """A source folder whose extension takes seconds to build. Its path has what a command line has to quote."""
    tree = tmp_path / 'it\'s a "naïve" folder'
    for name in ("setup.py", "pyproject.toml", "README.md", "scripts", "charlm/_version.py", "csrc/cpu/gomp.h"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, tree / name)
    for name, source in SMALL_SOURCES.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(source)
    (tree / "charlm" / "__init__.py").touch()
    return tree


def build_in(tree, compiler):
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    env = {**os.environ, "CXX": compiler, "FORCE_CUDA": "0"}
    return subprocess.run(command, cwd=tree, env=env, capture_output=True, text=True, check=False)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    "compiler",
    [
        *filter(shutil.which, ("g++", "clang++")),
        "env LC_ALL=C c++ -O1",
    ],
)
def test_a_folder_with_spaces_quotes_and_other_letters_builds(small_tree, compiler):
    built = build_in(small_tree, compiler)
    assert built.returncode == 0, built.stdout + built.stderr
    (module,) = (small_tree / "charlm").glob("_C.*.so")
    record = json.loads((module.parent / "_build_config.json").read_text())
    assert ("clang" in record["compiler"]) == (compiler == "clang++")
    assert ctypes.CDLL(str(module)).add_up(1000) == 1000
    assert "libgomp.so.1" in build.elf.read_dynamic_section(module).needed


@pytest.mark.exhaustive
def test_setup_leaves_no_module_that_has_a_cxx_runtime_of_its_own(small_tree, tmp_path):
    script = tmp_path / "g++"
    drop = 'for flag; do shift; [ "$flag" = -l:libstdc++.so.6 ] || set -- "$@" "$flag"; done'
    script.write_text(f'#!/bin/sh\n{drop}\nexec {shutil.which("c++")} "$@" -static-libstdc++\n')
    script.chmod(0o755)
    built = build_in(small_tree, str(script))
    assert built.returncode == 1
    assert "charlm cannot be built: the linker put a static C++ runtime into _C." in built.stderr
    assert not list(small_tree.rglob("_C.*.so"))
    assert not list(small_tree.rglob("_build_config.json"))


# --- the OpenMP runtime -------------------------------------------------------------------------------------


def test_one_openmp_runtime_is_loaded_and_it_is_torchs(two_threads):
    (runtime,) = two_threads["runtimes"]
    assert Path(runtime).name.startswith("libgomp")


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one processor")
def test_an_op_uses_as_many_threads_as_torch_set_num_threads_says(two_threads):
    before, two, after = two_threads["times"]
    assert two > 2_000_000, f"the second thread worked for {two} ns"
    assert before < two / 20
    assert after < two / 20


def test_clang_gets_no_openmp_of_its_own():
    flags = build.compiler_flags(clang=True)
    assert not [flag for flag in (*flags.kernels, *flags.sources, *flags.link) if "openmp" in flag]
    assert "-include" not in flags.kernels  # no header of torch may be compiled for an instruction set


def test_gcc_compiles_torchs_own_loop():
    flags = build.compiler_flags(clang=False)
    assert flags.sources == flags.kernels == build.CXX_FLAGS
    assert "-fopenmp" in flags.sources
    assert "-fopenmp" in flags.link


def test_clang_is_known_by_its_macros_whatever_its_name(tmp_path):
    script = tmp_path / "a c++"
    script.write_text("#!/bin/sh\necho '#define __clang__ 1'\n")
    script.chmod(0o755)
    assert build.is_clang(f"env LC_ALL=C '{script}' -O1")
    assert not build.is_clang("c++ -O1")
