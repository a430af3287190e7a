"""Builds charlm._C with torch's BuildExtension and ninja; static metadata is in pyproject.toml.

Each .cpp under csrc/ is compiled once, except csrc/cpu/kernels.cpp: it is compiled once per instruction set, so
that one portable binary has fast loops for every machine (no -march=native). If torch was built for CUDA and a
toolkit is found, csrc/cuda/ is built too: its .cpp by the C++ compiler and each .cu by nvcc, whether or not the
machine has a GPU. The build writes charlm/_build_config.json beside the module; `import charlm` compares it with
the installed torch before it loads the module.

Environment: CXX (compiler), MAX_JOBS (compilers at once; at most 4 unless set), FORCE_CUDA (1: fail where CUDA
cannot be built, 0: do not build it), CUDA_HOME (the toolkit), TORCH_CUDA_ARCH_LIST.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import zlib
from collections.abc import Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from setuptools import Extension, setup

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "scripts"))  # pip runs this file without its folder on the path

import cuda_toolkit  # noqa: E402
import elf  # noqa: E402

if TYPE_CHECKING:
    from types import ModuleType

CSRC = ROOT / "csrc"
ISA_SOURCE = "csrc/cpu/kernels.cpp"
MIN_TORCH = "2.11"
RUNTIME_REQUIREMENTS = ["numpy"]  # in addition to torch; the extras are in pyproject.toml
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
NVCC_FLAGS = ["-O3", "-Xcompiler", "-fvisibility=hidden"]
# Named by its file, the C++ runtime is the shared one that torch uses, even where the toolchain would link a static
# one (-static-libstdc++, or a libstdc++.so that is a dangling link). torch cannot catch what a static runtime throws,
# so that an IndexError would end the process. The -lstdc++ that GCC and Clang append then resolves no symbol.
CXX_RUNTIME = "libstdc++.so.6"
LINK_FLAGS = [f"-l:{CXX_RUNTIME}"] if sys.platform == "linux" else []
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",  # GCC 12 warns of its own avx512fintrin.h (GCC bug 105593)
]

# Commands that need no torch: they neither compile nor write the metadata of a wheel.
TORCH_FREE_COMMANDS = {"sdist", "egg_info", "clean", "--name", "--version", "--help", "--help-commands"}


class BuildError(SystemExit):
    """Ends the build with a message: the problem, then its cure."""

    def __init__(self, problem: str, cure: str) -> None:
        super().__init__(f"\ncharlm cannot be built: {problem}\n  {cure}\n")


def first_command(argv: list[str]) -> str:
    """The command of a setup.py call, or its first option if there is no command."""
    return next((argument for argument in argv if not argument.startswith("-")), argv[0] if argv else "")


def isa_flags(machine: str) -> dict[str, list[str]]:
    """The instruction sets compiled for `machine` (from platform.machine()), slowest first, with their flags."""
    if machine.lower() in ("x86_64", "amd64"):
        return {"baseline": [], "avx2": AVX2_FLAGS, "avx512": AVX512_FLAGS}
    return {"baseline": []}  # on Arm the baseline is NEON


def max_jobs(env: Mapping[str, str], cpus: int | None) -> int:
    """How many compilers run at once: MAX_JOBS, or at most 4, since each takes about a gigabyte."""
    text = env.get("MAX_JOBS", "")
    if not text:
        return min(4, cpus or 1)
    if not text.isdigit() or int(text) < 1:
        raise BuildError(f"MAX_JOBS={text!r} is not a positive number.", "Set it to a number, or unset it.")
    return int(text)


def import_torch() -> ModuleType:
    """Imports torch, at least MIN_TORCH."""
    try:
        import torch
    except ImportError as error:
        raise BuildError(
            f"torch cannot be imported by {sys.executable} ({error}).",
            f"Install it first: pip install 'torch>={MIN_TORCH}', then pip install --no-build-isolation .",
        ) from None
    version = torch.__version__
    if numbers(version) < numbers(MIN_TORCH):
        raise BuildError(f"torch {version} is too old.", f"Install a newer one: pip install 'torch>={MIN_TORCH}'")
    return torch


def numbers(version: str) -> tuple[int, ...]:
    """Major and minor: 2.13.0+cpu → (2, 13)."""
    return tuple(map(int, re.findall(r"\d+", version)[:2]))


def public_version(version: str) -> str:
    """The version as on a package index, without its local part: 2.13.0+cpu → 2.13.0."""
    return version.partition("+")[0]


def find_compiler(command: str) -> str:
    """The first line of the C++ compiler's --version."""
    arguments = shlex.split(command)
    if not arguments or shutil.which(arguments[0]) is None:
        raise BuildError(
            f"the C++ compiler {command!r} was not found.",
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX to it.",
        )
    printed = subprocess.run([*arguments, "--version"], capture_output=True, text=True, check=False).stdout
    return (printed.splitlines() or [command])[0]


class Flags(NamedTuple):
    """The compiler's flags for csrc/cpu/kernels.cpp, for all other sources, and for linking."""

    kernels: list[str]
    sources: list[str]
    link: list[str]


def compiler_flags(clang: bool) -> Flags:
    """Flags with which at::parallel_for uses torch's OpenMP runtime, libgomp.

    GCC's -fopenmp uses it. Clang's uses another runtime, so csrc/cpu/gomp.h replaces it.
    """
    if not (clang and sys.platform == "linux"):
        return Flags(CXX_FLAGS, CXX_FLAGS, ["-fopenmp", *LINK_FLAGS])
    kernels = [flag for flag in CXX_FLAGS if flag != "-fopenmp"] + ["-Wno-unknown-warning-option"]
    return Flags(kernels, [*kernels, "-include", "cpu/gomp.h"], ["-l:libgomp.so.1", *LINK_FLAGS])


def is_clang(command: str) -> bool:
    """Whether the C++ compiler is Clang, whatever its name is."""
    macros = [*shlex.split(command), "-dM", "-E", "-x", "c++", os.devnull]
    return "#define __clang__ " in subprocess.run(macros, capture_output=True, text=True, check=False).stdout


def name_compiler(command: str, folder: Path, env: MutableMapping[str, str]) -> None:
    """Sets CXX to one word, since torch 2.13 quotes it: a command with arguments becomes a script in `folder`."""
    words = shlex.split(command)
    if words == [command]:
        return
    script = folder / f"cxx-{zlib.crc32(command.encode()):08x}"  # a new name makes ninja recompile
    folder.mkdir(parents=True, exist_ok=True)
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n', encoding="utf-8")
    script.chmod(0o755)
    env["PATH"] = os.pathsep.join([str(folder), env.get("PATH", "")])
    env["CXX"] = script.name
    env["TORCH_NO_COMPILER_WRAPPER"] = "1"  # torch would prepend ccache to the script, which may call ccache itself


def check_cxx_runtime(module: Path) -> None:
    """Checks that the linked module throws through the shared C++ runtime; otherwise removes it and ends the build."""
    linked = elf.read_dynamic_section(module)
    if CXX_RUNTIME in linked.needed and "__cxa_throw" in linked.undefined:
        return
    module.unlink()
    raise BuildError(
        f"the linker put a static C++ runtime into {module.name}, which must take __cxa_throw from {CXX_RUNTIME}. "
        "Every error that such a module raises would end the process, so it was removed.",
        "Remove -static-libstdc++ and -nostdlib++ from CXX, CXXFLAGS and LDFLAGS, or set CXX to a compiler that links "
        "the shared runtime (CXX=/usr/bin/g++), then build again.",
    )


def find_python_headers(include: str) -> None:
    """Checks that Python.h is installed: distributions ship it in a separate package."""
    if not Path(include, "Python.h").exists():
        raise BuildError(
            f"Python's headers are not in {include}.",
            "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel).",
        )


def find_ninja(env: MutableMapping[str, str]) -> None:
    """Puts ninja on PATH: without activation of the environment it is only beside the python executable."""
    if shutil.which("ninja", path=env.get("PATH")) is None:
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    if shutil.which("ninja", path=env["PATH"]) is None:
        raise BuildError("ninja was not found.", "Install it: pip install ninja")


class Cuda(NamedTuple):
    """The CUDA build: its toolkit and architectures, or the reason why there is none."""

    toolkit: Path | None
    nvcc: str | None  # its release
    architectures: list[str]  # "8.0", "12.0+PTX": as in TORCH_CUDA_ARCH_LIST
    why_not: str | None


def choose_cuda(env: Mapping[str, str], torch: ModuleType) -> Cuda:
    """Whether to build for CUDA, and for which architectures; the machine need not have a GPU."""
    toolkit = cuda_toolkit.find_toolkit(env)
    nvcc = cuda_toolkit.nvcc_release(toolkit)
    why_not = why_no_cuda(env, torch.__version__, torch.version.cuda, nvcc)
    if why_not:
        return Cuda(None, None, [], why_not)
    requested = env.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    known = cuda_toolkit.known_architectures(toolkit)
    return Cuda(toolkit, nvcc, requested or cuda_toolkit.default_architectures(known), None)


def why_no_cuda(env: Mapping[str, str], torch_version: str, torch_cuda: str | None, nvcc: str | None) -> str | None:
    """The reason why no CUDA kernels are built, or None if they are; BuildError if FORCE_CUDA=1 requires them.

    torch_cuda is torch.version.cuda (None in a CPU build); nvcc is the release of the toolkit.
    """
    forced = env.get("FORCE_CUDA", "")
    if forced not in ("", "0", "1"):
        raise BuildError(
            f"FORCE_CUDA={forced!r} is neither 0 nor 1.",
            "Set it to 1 (build for CUDA or fail) or 0 (build for the CPU only), or unset it.",
        )
    if forced == "0":
        return "FORCE_CUDA=0"
    major = (torch_cuda or "").partition(".")[0]
    if torch_cuda is None:
        problem = f"torch {torch_version} is a CPU build"
        cure = "Install a CUDA build of torch (see pytorch.org)"
    elif nvcc is None:
        named = cuda_toolkit.named_home(env)
        place = f" in {named}" if named else ""
        problem = f"there is no CUDA toolkit{place} (torch was built with CUDA {torch_cuda})"
        cure = f"Install a CUDA {major} toolkit and set CUDA_HOME to its folder"
    elif nvcc.partition(".")[0] != major:
        problem = f"nvcc is of CUDA {nvcc}, but torch {torch_version} was built with CUDA {torch_cuda}"
        cure = f"Point CUDA_HOME at a CUDA {major} toolkit, or install a torch built with CUDA {nvcc.partition('.')[0]}"
    else:
        return None
    if forced:
        raise BuildError(f"FORCE_CUDA=1, but {problem}.", f"{cure}, or unset FORCE_CUDA to build for the CPU alone.")
    return problem


def extension(isas: Mapping[str, list[str]], cuda: Cuda) -> Extension:
    """charlm._C: all sources of csrc/ except kernels.cpp, with macros for the instruction sets."""
    if cuda.toolkit:
        # Otherwise torch takes the folder of a script called nvcc for the toolkit, and compiles for visible GPUs only.
        os.environ.update(CUDA_HOME=str(cuda.toolkit), TORCH_CUDA_ARCH_LIST=" ".join(cuda.architectures))
    from torch.utils import cpp_extension

    paths = sorted(CSRC.rglob("*.cpp"))
    macros = [f"CHARLM_HAVE_{isa.upper()}" for isa in isas if isa != "baseline"]
    if cuda.toolkit:
        new_extension = cpp_extension.CUDAExtension
        paths += sorted(CSRC.rglob("*.cu"))
    else:
        new_extension = cpp_extension.CppExtension
        paths = [path for path in paths if CSRC / "cuda" not in path.parents]
    sources = [path.relative_to(ROOT).as_posix() for path in paths]
    return new_extension(
        "charlm._C",
        [source for source in sources if source != ISA_SOURCE],
        include_dirs=[str(CSRC)],
        define_macros=[(macro, None) for macro in macros],
        extra_compile_args={"cxx": [], "nvcc": list(NVCC_FLAGS)},  # cxx: see compiler_flags
    )


def longest_first(sources: list[str]) -> list[str]:
    """Orders the slowest sources first, so that none runs alone at the end: .cu files, then module.cpp."""
    return sorted(sources, key=lambda source: (not source.endswith(".cu"), source != "csrc/module.cpp", source))


def build_command(torch: ModuleType, isas: Mapping[str, list[str]], cuda: Cuda) -> type:
    """The build_ext command: torch's, plus one object per instruction set and the record of the build."""
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        """Prints the configuration, compiles, and writes _build_config.json beside the module."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # One folder for all front ends (pip gives each run of -e a temporary one), so that ninja finds its
            # objects again; separate for each python, torch and nvcc, whose headers differ.
            tag = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
            if cuda.nvcc:
                tag += f"-nvcc-{cuda.nvcc}"
            self.build_temp = str(ROOT / "build" / tag)

        def run(self) -> None:
            find_ninja(os.environ)
            find_python_headers(sysconfig.get_paths()["include"])
            jobs = max_jobs(os.environ, os.cpu_count())
            os.environ["MAX_JOBS"] = str(jobs)
            # --threads: each nvcc compiles for several architectures at once. The flag is not among the flags of the
            # extension, where a change of MAX_JOBS would make ninja recompile everything.
            appended = os.environ.get("NVCC_APPEND_FLAGS", "")
            os.environ["NVCC_APPEND_FLAGS"] = f"{appended} --threads {jobs}".strip()
            compiler = cpp_extension.get_cxx_compiler()
            config = {
                "charlm": self.distribution.get_version(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "compiler": find_compiler(compiler),
                "instruction_sets": list(isas),
                "cuda_architectures": cuda.architectures,
                "why_no_cuda": cuda.why_not,
            }
            print_configuration(config, cuda.nvcc, jobs)
            self.jobs = jobs
            self.flags = compiler_flags(is_clang(compiler))
            name_compiler(compiler, Path(self.build_temp), os.environ)
            super().run()
            self.config_path().write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

        def config_path(self) -> Path:
            """_build_config.json, beside the module: in the build tree, or in charlm/ when built in place."""
            return Path(self.get_ext_fullpath("charlm._C")).with_name("_build_config.json")

        def get_outputs(self) -> list[str]:
            return [*super().get_outputs(), str(self.config_path())]

        def build_extension(self, ext: Extension) -> None:
            def compile_isa(isa: str) -> list[str]:
                return self.compiler.compile(
                    [ISA_SOURCE],
                    output_dir=str(Path(self.build_temp, isa)),
                    macros=[("CHARLM_ISA", isa)],
                    include_dirs=[str(CSRC)],
                    extra_postargs={"cxx": [*self.flags.kernels, *isas[isa]]},
                )

            # A separate ninja run for each instruction set, all at once.
            with ThreadPoolExecutor(self.jobs) as pool:
                ext.extra_objects += [obj for objects in pool.map(compile_isa, isas) for obj in objects]
            compile_sources = self.compiler.compile  # receives the sources sorted by name
            self.compiler.compile = lambda sources, **options: compile_sources(longest_first(sources), **options)
            ext.extra_compile_args["cxx"] += self.flags.sources
            ext.extra_link_args += self.flags.link
            super().build_extension(ext)
            if sys.platform == "linux":
                check_cxx_runtime(Path(self.get_ext_fullpath(ext.name)))

    return BuildExtension


def print_configuration(config: Mapping[str, Any], nvcc: str | None, jobs: int) -> None:
    """Prints what is about to be built, as one block."""
    architectures = ", ".join(config["cuda_architectures"])
    lines = {
        "charlm": config["charlm"],
        "python": config["python"],
        "torch": config["torch"],
        "compiler": config["compiler"],
        "instruction sets": ", ".join(config["instruction_sets"]),
        "CUDA": f"{architectures} (nvcc {nvcc})" if nvcc else f"not built ({config['why_no_cuda']})",
        "jobs": f"{jobs} (MAX_JOBS)",
    }
    print("\ncharlm build configuration")
    print("".join(f"  {name:<17} {value}\n" for name, value in lines.items()), flush=True)


def main() -> None:
    options: dict[str, Any] = {}
    torch_requirement = f"torch>={MIN_TORCH}"
    if first_command(sys.argv[1:]) not in TORCH_FREE_COMMANDS:
        torch = import_torch()
        torch_requirement = f"torch=={public_version(torch.__version__)}"
        isas = isa_flags(platform.machine())
        cuda = choose_cuda(os.environ, torch)
        options["ext_modules"] = [extension(isas, cuda)]
        options["cmdclass"] = {"build_ext": build_command(torch, isas, cuda)}
    setup(license="MIT", install_requires=[torch_requirement, *RUNTIME_REQUIREMENTS], **options)


if __name__ == "__main__":
    main()
