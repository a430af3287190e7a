"""Building, installing and importing charlm, on one wheel that is built from an sdist of this tree.

The build (one to three minutes) happens once, in the `wheel_tree` fixture; the tests of incremental builds go
on in the folder that it leaves behind. What needs no compiler calls setup.py's functions, or runs it with a
torch, a compiler or a setting that is wrong.
"""

from __future__ import annotations

import email
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pybind11
import pytest
import torch
from setup_module import build

from charlm import _extras

ROOT = Path(__file__).resolve().parent.parent
NOT_SOURCE = shutil.ignore_patterns(
    ".git",
    ".venv*",
    "build",
    "dist",
    "out",
    "*.egg-info",
    "*.so",
    "_build_config.json",
    "__pycache__",
    ".*_cache",
)
TORCH_PUBLIC = torch.__version__.partition("+")[0]


def run(*command, cwd, check=True, **env):
    """Runs a command with `env` for charlm's settings, whatever they are in this process; builds are for the CPU."""
    ours = ("CHARLM_BACKEND", "CHARLM_CPU_ISA", "PYTHONPATH", "MAX_JOBS")
    clean = {name: value for name, value in os.environ.items() if name not in ours}
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**clean, "FORCE_CUDA": "0", **env},
        capture_output=True,
        text=True,
        check=False,
    )
    if check and result.returncode:
        pytest.fail(f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}")
    return result


def python(code, site, check=True, **env):
    """Runs code against the charlm in the folder `site`, from a working folder that holds no other charlm."""
    return run(sys.executable, "-c", code, cwd=site.parent, check=check, PYTHONPATH=str(site), **env)


@pytest.fixture(scope="session")
def source_tree(tmp_path_factory):
    """A copy of this checkout without anything that was built in it."""
    tree = tmp_path_factory.mktemp("checkout") / "charlm"
    shutil.copytree(ROOT, tree, ignore=NOT_SOURCE)
    return tree


@pytest.fixture(scope="session")
def sdist(source_tree):
    run(sys.executable, "-m", "build", "--no-isolation", "--sdist", cwd=source_tree)
    (archive,) = (source_tree / "dist").glob("charlm_kernels-*.tar.gz")
    return archive


@pytest.fixture(scope="session")
def wheel_tree(sdist, tmp_path_factory):
    """The unpacked sdist, after a wheel was built in it (into its folder wheels/)."""
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))  # not in 3.11.2
    (tree,) = folder.iterdir()
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-build-isolation",
        "--no-deps",
        "-v",
        "-w",
        "wheels",
        ".",
    ]
    built = run(*command, cwd=tree)
    (tree / "build.log").write_text(built.stdout + built.stderr)  # pip -v shows what setup.py prints on stderr
    return tree


@pytest.fixture(scope="session")
def wheel(wheel_tree):
    (path,) = (wheel_tree / "wheels").glob("charlm_kernels-*.whl")
    return path


@pytest.fixture(scope="session")
def site(wheel, tmp_path_factory):
    """A folder that the wheel is installed into, for PYTHONPATH."""
    site = tmp_path_factory.mktemp("installed") / "site"
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel]
    run(*command, cwd=site.parent)
    return site


@pytest.fixture
def broken_site(site, tmp_path):
    """A copy of the installed package, to be damaged."""
    copy = tmp_path / "site"
    shutil.copytree(site / "charlm", copy / "charlm")
    return copy


@pytest.fixture
def fake_torch(tmp_path):
    """Writes a module `torch` with the given source; returns its folder, for PYTHONPATH."""

    def write(source):
        (tmp_path / "torch.py").write_text(source)
        return str(tmp_path)

    return write


# --- what the archives hold ---------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_sdist_holds_every_source_and_header(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*") if path.is_file()}
    assert any(source.endswith(".h") for source in sources)
    assert sources <= names
    assert {"setup.py", "pyproject.toml", "LICENSE", "README.md", "Makefile", "requirements.txt"} <= names
    documents = {path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").iterdir()}
    assert documents
    assert documents <= names


def test_sdist_holds_nothing_that_was_built(sdist):
    with tarfile.open(sdist) as archive:
        built = [name for name in archive.getnames() if name.endswith((".so", ".o", ".pyc", "_build_config.json"))]
    assert built == []


@pytest.mark.exhaustive
def test_wheel_requires_exactly_the_torch_it_was_built_with(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
    requirements = [line for line in fields.get_all("Requires-Dist") if "extra ==" not in line]
    assert [requirement for requirement in requirements if requirement.startswith("torch")] == [
        f"torch=={TORCH_PUBLIC}"
    ]
    assert set(requirements) == {f"torch=={TORCH_PUBLIC}", "numpy"}
    assert fields.get_all("Provides-Extra") == [
        "lm",
        "data",
        "compress",
        "report",
        "serve",
        "notebooks",
        "tensorboard",
        "hf",
        "onnx",
    ]
    assert fields["Name"] == "charlm-kernels"
    assert fields["Requires-Python"] == ">=3.10"
    assert fields["License"] == "MIT"


@pytest.mark.exhaustive
def test_wheel_holds_the_module_its_record_the_data_and_the_type_marker(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = json.loads(archive.read("charlm/_build_config.json"))
    assert {"charlm/report/page.html", "charlm/report/page.js"} <= names
    assert {f"charlm/serve/page.{kind}" for kind in ("html", "css", "js")} <= names
    assert {"charlm/py.typed", "charlm/data/names.txt", "charlm/lm/__init__.py", "charlm/cli/__init__.py"} <= names
    assert len([name for name in names if re.fullmatch(r"charlm/_C\..*so", name)]) == 1
    assert [name for name in names if name.startswith(("csrc", "tests", "scripts"))] == []
    assert any(name.endswith("LICENSE") for name in names)
    assert record["torch"] == torch.__version__
    assert (record["cuda_architectures"], record["why_no_cuda"]) == ([], "FORCE_CUDA=0")
    assert record["instruction_sets"] == list(build.isa_flags(os.uname().machine))


@pytest.mark.exhaustive
def test_version_stands_the_same_everywhere(wheel, site):
    printed = python("import charlm; print(charlm.__version__)", site).stdout.strip()
    assert (
        wheel.name.split("-")[1] == printed == (build.ROOT / "CHANGELOG.md").read_text().split("## [")[1].split("]")[0]
    )


def test_requirements_pin_one_torch_and_all_that_charlm_needs():
    pinned = dict(re.findall(r"^([a-z0-9-]+)==([\w.]+)", (ROOT / "requirements.txt").read_text(), re.MULTILINE))
    build_requirements = re.search(r"^requires = \[(.*)\]", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    needed = {re.match(r"[a-z0-9-]+", text).group() for text in re.findall(r'"([^"]+)"', build_requirements.group(1))}
    assert needed | {*build.RUNTIME_REQUIREMENTS, *_extras.PACKAGES} <= set(pinned)
    assert build.numbers(pinned["torch"]) >= build.numbers(build.MIN_TORCH)


def test_cuda_check_tests_with_the_same_packages_but_torch():
    def pins(name):
        return set(re.findall(r"^[\w-]+==\S+(?:; [^#\n]+)?", (ROOT / name).read_text(), re.MULTILINE))

    ours = {pin for pin in pins("requirements-cuda.txt") if not pin.startswith("torch==")}
    assert ours <= pins("requirements.txt") | pins("requirements-dev.txt")
    assert {pin for pin in pins("requirements.txt") if not pin.startswith("torch==")} <= ours


# --- the wheel at work --------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_wheel_computes_torchs_loss_and_embedding(site):
    code = """
import torch, charlm, charlm.functional as F
logits = torch.randn(33, 27, generator=torch.Generator().manual_seed(0), requires_grad=True)
target = torch.arange(33) % 27
ours, theirs = F.cross_entropy(logits, target), torch.nn.functional.cross_entropy(logits, target)
torch.testing.assert_close(ours, theirs)
(grad,), (expected,) = (torch.autograd.grad(loss, logits) for loss in (ours, theirs))
torch.testing.assert_close(grad, expected)
torch.testing.assert_close(F.embedding(target, logits), logits[target])
print(charlm.__file__)
print(charlm.build_info()["backend"])
"""
    path, backend = python(code, site).stdout.split()
    assert Path(path).is_relative_to(site)
    assert backend == "extension"


@pytest.mark.exhaustive
def test_a_toolchain_that_links_a_static_cxx_runtime_builds_a_module_that_raises(wheel_tree, tmp_path):
    run(sys.executable, "setup.py", "build", "--build-lib", tmp_path, cwd=wheel_tree, LDFLAGS="-static-libstdc++")
    code = """
import charlm, torch
try:
    charlm.functional.embedding(torch.tensor([[0, 3]]), torch.zeros(3, 2))
except IndexError as error:
    print(error)
"""
    assert python(code, tmp_path).stdout.strip() == "index 3 at position (0, 1) is out of range for 3 embeddings"


@pytest.mark.exhaustive
def test_wheel_installs_the_command(site):
    printed = run(site / "bin" / "charlm", "info", cwd=site.parent, PYTHONPATH=str(site)).stdout
    assert torch.__version__ in printed


@pytest.mark.exhaustive
def test_every_supported_instruction_set_can_be_forced(site):
    supported = json.loads(
        python("import json, charlm; print(json.dumps(charlm.build_info()['instruction_sets_supported']))", site).stdout
    )
    assert supported[0] == "baseline"
    code = "import charlm; print(charlm.build_info()['instruction_set_in_use'])"
    assert [python(code, site, CHARLM_CPU_ISA=isa).stdout.strip() for isa in supported] == supported
    assert python(code, site).stdout.strip() == supported[-1]


@pytest.mark.exhaustive
def test_unknown_instruction_set_is_an_error_that_lists_what_this_machine_can_do(site):
    supported = python("import charlm; print(', '.join(charlm._ext._C.supported_isas()))", site).stdout.strip()
    result = python("import charlm", site, check=False, CHARLM_CPU_ISA="sse9")
    assert result.returncode == 1
    assert f"ImportError: CHARLM_CPU_ISA='sse9': this machine can run {supported} (compiled: " in result.stderr


@pytest.mark.exhaustive
def test_import_adds_at_most_100_ms_to_torchs(site):
    code = "import time, torch; start = time.perf_counter(); import charlm; print(time.perf_counter() - start)"
    python(code, site)  # writes the bytecode
    seconds = statistics.median(float(python(code, site).stdout) for _ in range(7))
    assert seconds <= 0.1, f"import charlm takes {seconds * 1e3:.0f} ms after import torch"


@pytest.mark.exhaustive
def test_import_takes_nothing_of_the_command_line_with_it(site):
    code = "import sys, charlm; print(*{name.partition('.')[0] for name in sys.modules}, *sys.modules)"
    imported = set(python(code, site).stdout.split())
    assert "charlm.functional" in imported
    assert not imported & {"typer", "rich", "click", "safetensors", "charlm.lm", "charlm.cli"}


# --- what import refuses ------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_another_torch_is_refused_with_both_versions_and_the_cure(broken_site):
    path = broken_site / "charlm" / "_build_config.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.12.1+cu126"'))
    result = python("import charlm", broken_site, check=False)
    assert result.returncode == 1
    assert (
        f"ImportError: charlm was built with torch 2.12.1+cu126, but torch {torch.__version__} is running."
        in result.stderr
    )
    assert "pip install --no-build-isolation ." in result.stderr


@pytest.mark.exhaustive
def test_another_torch_is_refused_before_the_module_is_loaded(broken_site):
    (module,) = (broken_site / "charlm").glob("_C.*")
    module.write_bytes(b"no ELF file")
    path = broken_site / "charlm" / "_build_config.json"
    path.write_text(path.read_text().replace(f'"torch": "{torch.__version__}"', '"torch": "2.12.1+cu126"'))
    assert "built with torch 2.12.1+cu126" in python("import charlm", broken_site, check=False).stderr


@pytest.mark.exhaustive
def test_a_module_that_does_not_load_is_refused_with_the_cure(broken_site):
    (module,) = (broken_site / "charlm").glob("_C.*")
    module.write_bytes(b"no ELF file")
    error = python("import charlm", broken_site, check=False).stderr
    assert "ImportError: charlm's kernels cannot be loaded" in error
    assert "pip install --no-build-isolation ." in error


@pytest.mark.exhaustive
def test_nothing_built_is_refused_with_the_command_and_the_other_backend(broken_site):
    (broken_site / "charlm" / "_build_config.json").unlink()
    error = python("import charlm", broken_site, check=False).stderr
    assert "ImportError: charlm's kernels are not built" in error
    assert "pip install --no-build-isolation ." in error
    assert "CHARLM_BACKEND=reference" in error


@pytest.mark.exhaustive
def test_reference_backend_needs_no_module(broken_site):
    for built in [*(broken_site / "charlm").glob("_C.*"), broken_site / "charlm" / "_build_config.json"]:
        built.unlink()
    code = """
import torch, charlm
loss = charlm.functional.cross_entropy(torch.zeros(3, 27), torch.tensor([0, 1, 2]))
print(charlm.build_info()["backend"], round(loss.item(), 4))
"""
    assert python(code, broken_site, CHARLM_BACKEND="reference").stdout.split() == ["reference", "3.2958"]


@pytest.mark.exhaustive
def test_unknown_backend_is_refused(site):
    error = python("import charlm", site, check=False, CHARLM_BACKEND="eager").stderr
    assert "ImportError: CHARLM_BACKEND='eager' is unknown: it is one of extension, reference" in error


# --- the build ----------------------------------------------------------------------------------------------


@pytest.mark.exhaustive
def test_build_prints_its_configuration_in_one_block(wheel_tree):
    log = [line.strip() for line in (wheel_tree / "build.log").read_text().splitlines()]
    start = log.index("charlm build configuration")
    block = [re.split(r"  +", line, maxsplit=1) for line in log[start + 1 : start + 8]]
    assert [name for name, _ in block] == [
        *("charlm", "python", "torch", "compiler", "instruction sets", "CUDA", "jobs"),
    ]
    printed = dict(block)
    assert printed["torch"] == torch.__version__
    assert printed["instruction sets"] == ", ".join(build.isa_flags(os.uname().machine))
    assert printed["CUDA"] == "not built (FORCE_CUDA=0)"
    assert printed["jobs"] == f"{min(4, os.cpu_count())} (MAX_JOBS)"


@pytest.mark.exhaustive
def test_one_changed_source_is_one_compiler_run(wheel_tree):
    changed = wheel_tree / "csrc" / "ops" / "entropy.cpp"
    changed.write_text(changed.read_text() + "\n// touched\n")
    log = run(sys.executable, "setup.py", "build_ext", "--inplace", cwd=wheel_tree).stdout
    assert re.findall(r"-MF \S+/(csrc/\S+)\.o\.d ", log) == ["csrc/ops/entropy"]
    assert list((wheel_tree / "charlm").glob("_C.*"))


@pytest.mark.exhaustive
def test_a_changed_kernel_header_rebuilds_the_object_of_every_instruction_set(wheel_tree):
    (folder,) = (wheel_tree / "build").glob("*-torch-*")
    ninja = [shutil.which("ninja") or Path(sys.executable).with_name("ninja"), "-n", "-C"]
    isas = build.isa_flags(os.uname().machine)
    assert all("no work to do" in run(*ninja, folder / isa, cwd=folder).stdout for isa in isas)
    os.utime(wheel_tree / "csrc" / "cpu" / "cross_entropy_rows.h")
    stale = [re.findall(r"-DCHARLM_ISA=(\w+)", run(*ninja, folder / isa, cwd=folder).stdout) for isa in isas]
    assert stale == [[isa] for isa in isas]


# Sources without torch's headers, which require more themselves.
@pytest.mark.exhaustive
@pytest.mark.parametrize("source", ["corpus/corpus.cpp", "ngrams/ngrams.cpp", "cpu/kernels.cpp"])
def test_sources_are_cxx17_which_torch_before_2_13_compiles_as(source):
    compiler = os.environ.get("CXX", "c++").split()
    includes = (f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}")
    flags = ("-std=c++17", "-fsyntax-only", "-w", "-Icsrc", *includes, "-DCHARLM_ISA=baseline")
    run(*compiler, *flags, f"csrc/{source}", cwd=ROOT)


@pytest.mark.exhaustive
def test_missing_compiler_is_named_with_its_cure(source_tree):
    result = run(sys.executable, "setup.py", "build_ext", cwd=source_tree, check=False, CXX="/nowhere/g++")
    assert result.returncode == 1
    assert "the C++ compiler '/nowhere/g++' was not found" in result.stderr
    assert "apt install g++" in result.stderr
    assert "set CXX" in result.stderr


def test_missing_torch_is_named_with_its_cure(source_tree, fake_torch):
    path = fake_torch("raise ModuleNotFoundError(\"No module named 'torch'\")")
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=source_tree, check=False, PYTHONPATH=path)
    assert result.returncode == 1
    assert "charlm cannot be built: torch cannot be imported" in result.stderr
    assert "pip install 'torch>=2.11'" in result.stderr


def test_sdist_needs_no_torch(source_tree, fake_torch, tmp_path):
    path = fake_torch("raise ModuleNotFoundError(\"No module named 'torch'\")")
    run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=source_tree, PYTHONPATH=path)
    assert list(tmp_path.glob("*.tar.gz"))


def test_an_old_torch_is_refused(source_tree, fake_torch):
    path = fake_torch("__version__ = '2.9.1+cpu'")
    result = run(sys.executable, "setup.py", "bdist_wheel", cwd=source_tree, check=False, PYTHONPATH=path)
    assert result.returncode == 1
    assert "torch 2.9.1+cpu is too old" in result.stderr
    assert "pip install 'torch>=2.11'" in result.stderr


def test_missing_python_headers_are_named_with_their_cure(tmp_path):
    with pytest.raises(build.BuildError, match=r"Python's headers are not in .*\n.*apt install python3-dev"):
        build.find_python_headers(str(tmp_path))


def test_missing_ninja_is_named_with_its_cure(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    with pytest.raises(build.BuildError, match=r"ninja was not found.*\n.*pip install ninja"):
        build.find_ninja({"PATH": str(tmp_path)})


@pytest.mark.parametrize(("cpus", "jobs"), [(1, 1), (2, 2), (4, 4), (64, 4), (None, 1)])
def test_jobs_are_at_most_four_unless_requested(cpus, jobs):
    assert build.max_jobs({}, cpus) == jobs
    assert build.max_jobs({"MAX_JOBS": "9"}, cpus) == 9


@pytest.mark.parametrize("text", ["0", "-1", "many"])
def test_max_jobs_that_is_no_number_is_refused(text):
    with pytest.raises(build.BuildError, match=f"MAX_JOBS='{text}'"):
        build.max_jobs({"MAX_JOBS": text}, 2)


@pytest.mark.parametrize("machine", ["aarch64", "arm64", "ppc64le"])
def test_other_machines_get_the_baseline_alone(machine):
    assert build.isa_flags(machine) == {"baseline": []}


def test_no_instruction_set_depends_on_the_machine_that_builds():
    flags = [flag for flags in build.isa_flags("x86_64").values() for flag in flags] + build.CXX_FLAGS
    assert not any("native" in flag or "fast-math" in flag or flag.startswith("-std") for flag in flags)
