"""Builds charlm._C with torch's BuildExtension and ninja; everything static stands in pyproject.toml.

Every .cpp under csrc/ is one object, except csrc/cpu/kernels/isa.cpp: it is compiled once for each
instruction set, so that one portable binary holds a fast loop for every machine (DESIGN: no -march=native).
Beside the module goes charlm/_build_config.json, which says what it was built with: `import charlm` compares
it with the torch that is running before it loads anything.

Environment: CXX (compiler), MAX_JOBS (compilers at once; at most 4 unless set), FORCE_CUDA.
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
from collections.abc import Mapping, MutableMapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from setuptools import Extension, setup

if TYPE_CHECKING:
    from types import ModuleType

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ISA_SOURCE = "csrc/cpu/kernels/isa.cpp"
MIN_TORCH = "2.11"
RUNTIME_REQUIREMENTS = ["numpy", "safetensors", "typer", "rich"]
CXX_FLAGS = ["-O3", "-g0", "-fopenmp", "-fvisibility=hidden"]
AVX2_FLAGS = ["-mavx2", "-mfma", "-mf16c"]
AVX512_FLAGS = [
    *AVX2_FLAGS,
    *("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    "-mprefer-vector-width=512",
    "-Wno-maybe-uninitialized",
    "-Wno-uninitialized",  # GCC 12 warns of its own avx512fintrin.h (GCC bug 105593)
]

# Commands that neither compile nor write a wheel's metadata: the only ones that do without torch.
TORCH_FREE_COMMANDS = {"sdist", "egg_info", "clean", "--name", "--version", "--help", "--help-commands"}


class BuildError(SystemExit):
    """Ends the build with a sentence that says what is wrong, then what to do about it."""

    def __init__(self, problem: str, cure: str) -> None:
        super().__init__(f"\ncharlm cannot be built: {problem}\n  {cure}\n")


def first_command(argv: list[str]) -> str:
    """The command of a setup.py call, or its first option where there is none."""
    return next((argument for argument in argv if not argument.startswith("-")), argv[0] if argv else "")


def isa_flags(machine: str) -> dict[str, list[str]]:
    """The instruction sets compiled for `machine` (as platform.machine() says it), slowest first."""
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
    """torch, at least MIN_TORCH."""
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
    """A version without its local part, as a package index knows it: 2.13.0+cpu → 2.13.0."""
    return version.partition("+")[0]


def find_compiler(command: str) -> str:
    """The first line of the C++ compiler's --version."""
    arguments = shlex.split(command)
    if not arguments or shutil.which(arguments[0]) is None:
        raise BuildError(
            f"the C++ compiler {command!r} is not there.",
            "Install one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++), or set CXX to it.",
        )
    printed = subprocess.run([*arguments, "--version"], capture_output=True, text=True, check=False).stdout
    return (printed.splitlines() or [command])[0]


def find_python_headers(include: str) -> None:
    """Checks that Python.h is there: distributions ship it in a package of its own."""
    if not Path(include, "Python.h").exists():
        raise BuildError(
            f"python's headers are not in {include}.",
            "Install them (Debian, Ubuntu: apt install python3-dev; Fedora: dnf install python3-devel).",
        )


def find_ninja(env: MutableMapping[str, str]) -> None:
    """Puts ninja on PATH: an environment that was not activated has it only beside its python."""
    if shutil.which("ninja", path=env.get("PATH")) is None:
        env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    if shutil.which("ninja", path=env["PATH"]) is None:
        raise BuildError("ninja is not there.", "Install it: pip install ninja")


def nvcc_release(cuda_home: str | None) -> str | None:
    """The release of the toolkit's nvcc, such as "13.0"; None without a toolkit."""
    nvcc = Path(cuda_home or "", "bin", "nvcc")
    if cuda_home is None or not nvcc.exists():
        return None
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"release (\d+\.\d+)", printed)
    return found.group(1) if found else None


def why_no_cuda(env: Mapping[str, str], torch_version: str, torch_cuda: str | None, nvcc: str | None) -> str:
    """Why no CUDA kernels are built; a BuildError where FORCE_CUDA=1 asks for them.

    torch_cuda is torch.version.cuda (None in a CPU build), nvcc the toolkit's release. This version has no
    CUDA kernels, so nothing builds them; what is wrong with the toolkit is said first all the same.
    """
    reason = "this version of charlm has no CUDA kernels; CUDA tensors take the reference path"
    if env.get("FORCE_CUDA") != "1":
        return reason
    without = "or unset FORCE_CUDA to build for the CPU alone."
    if torch_cuda is None:
        raise BuildError(
            f"FORCE_CUDA=1, but torch {torch_version} is a CPU build.",
            f"Install a CUDA build of torch (see pytorch.org), {without}",
        )
    major = torch_cuda.partition(".")[0]
    if nvcc is None:
        raise BuildError(
            f"FORCE_CUDA=1, but there is no CUDA toolkit (torch was built with CUDA {torch_cuda}).",
            f"Install a CUDA {major} toolkit and set CUDA_HOME to its folder, {without}",
        )
    if nvcc.partition(".")[0] != major:
        raise BuildError(
            f"nvcc is of CUDA {nvcc}, but torch {torch_version} was built with CUDA {torch_cuda}.",
            f"Point CUDA_HOME at a CUDA {major} toolkit, or install a torch built with CUDA "
            f"{nvcc.partition('.')[0]}, {without}",
        )
    raise BuildError(f"FORCE_CUDA=1, but {reason}.", "Unset FORCE_CUDA.")


def extension(isas: Mapping[str, list[str]]) -> Extension:
    """charlm._C: every .cpp of csrc/ but the per-instruction-set one, with the macros that name the sets."""
    from torch.utils.cpp_extension import CppExtension

    # ops.cpp takes longest (torch/extension.h): started first, it is not what everything waits for in the end.
    paths = sorted(CSRC.rglob("*.cpp"), key=lambda path: (path.name != "ops.cpp", path))
    sources = [path.relative_to(ROOT).as_posix() for path in paths]
    return CppExtension(
        "charlm._C",
        [source for source in sources if source != ISA_SOURCE],
        include_dirs=[str(CSRC)],
        define_macros=[(f"CHARLM_HAVE_{isa.upper()}", None) for isa in isas if isa != "baseline"],
        extra_compile_args={"cxx": list(CXX_FLAGS)},
        extra_link_args=["-fopenmp"],
    )


def build_command(torch: ModuleType, isas: Mapping[str, list[str]]) -> type:
    """The build_ext command: torch's, plus one object per instruction set and the record of the build."""
    from torch.utils import cpp_extension

    class BuildExtension(cpp_extension.BuildExtension):
        """Prints the configuration, compiles, and writes _build_config.json beside the module."""

        def finalize_options(self) -> None:
            super().finalize_options()
            # One folder for every way to build (pip gives each run of -e a temporary one), so that ninja
            # finds its objects again; apart for each python and torch, whose headers differ.
            tag = f"{sys.implementation.cache_tag}-torch-{torch.__version__}"
            self.build_temp = str(ROOT / "build" / tag)

        def run(self) -> None:
            find_ninja(os.environ)
            find_python_headers(sysconfig.get_paths()["include"])
            jobs = max_jobs(os.environ, os.cpu_count())
            os.environ["MAX_JOBS"] = str(jobs)
            cuda = why_no_cuda(os.environ, torch.__version__, torch.version.cuda, nvcc_release(cpp_extension.CUDA_HOME))
            config = {
                "charlm": self.distribution.get_version(),
                "torch": torch.__version__,
                "python": platform.python_version(),
                "compiler": find_compiler(cpp_extension.get_cxx_compiler()),
                "instruction_sets": list(isas),
                "cuda_architectures": [],
                "why_no_cuda": cuda,
            }
            print_configuration(config, jobs)
            self.jobs = jobs
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
                    extra_postargs={"cxx": [*CXX_FLAGS, *isas[isa]]},
                )

            # Each set is a ninja run of its own with one object in it: side by side they use the cores.
            with ThreadPoolExecutor(self.jobs) as pool:
                ext.extra_objects += [obj for objects in pool.map(compile_isa, isas) for obj in objects]
            super().build_extension(ext)

    return BuildExtension


def print_configuration(config: Mapping[str, Any], jobs: int) -> None:
    """One block that says what is about to be built."""
    lines = {
        "charlm": config["charlm"],
        "python": config["python"],
        "torch": config["torch"],
        "compiler": config["compiler"],
        "instruction sets": ", ".join(config["instruction_sets"]),
        "CUDA": f"not built ({config['why_no_cuda']})",
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
        options["ext_modules"] = [extension(isas)]
        options["cmdclass"] = {"build_ext": build_command(torch, isas)}
    setup(license="MIT", install_requires=[torch_requirement, *RUNTIME_REQUIREMENTS], **options)


if __name__ == "__main__":
    main()
