"""Without the extra `lm` the library works, and the command and the language model say what to install."""

from __future__ import annotations

import email
import re
import subprocess
import sys
from pathlib import Path

import pytest

from charlm import _extras, serve
from charlm.export import hugging_face, onnx
from charlm.report.page import PACKAGES

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = ["train", "sample", "score", "eval", "compare", "report", "serve", "export", "entropy", "compress", "info"]
# Put before the code of a process: the packages of the extra, and what they bring, are not there.
WITHOUT = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"typer", "rich", "safetensors", "click", "typer_slim"}:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
"""
SENTENCE = re.compile(
    r"charlm's language model and command line need typer and rich and safetensors, which the extra lm installs: "
    r"pip install .*\[lm\]\"\n"
)


def python(code: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT + code]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


def test_every_command_says_in_one_sentence_what_to_install() -> None:
    options = [[], ["--help"], ["--version"], ["--show-completion"], ["train", "--help"]]
    calls = [*options, *([command] for command in COMMANDS)]
    result = python(f"""
import runpy

def check_status(call, *arguments):
    sys.argv = ["charlm", *arguments]
    try:
        call()
    except SystemExit as end:
        assert end.code == 2, end
    else:
        raise AssertionError(arguments)

check_status(lambda: runpy.run_module("charlm", run_name="__main__"))  # python -m charlm
from charlm.__main__ import main
for arguments in {calls}:
    check_status(main, *arguments)
""")
    assert (result.returncode, result.stdout) == (0, ""), result.stderr
    lines = result.stderr.splitlines(keepends=True)
    assert len(lines) == len(calls) + 1
    assert all(SENTENCE.fullmatch(line.removeprefix("charlm: ")) for line in lines), result.stderr


def test_what_needs_the_extra_raises_an_import_error_with_the_sentence_and_the_library_works() -> None:
    result = python("""
import charlm, torch
import charlm.testing
assert charlm.functional.cross_entropy(torch.zeros(2, 4), torch.tensor([1, 3])).item() > 1.38
assert charlm.build_info()["backend"] == "extension"
found = set()
for use in (
    lambda: __import__("charlm.lm"),
    lambda: __import__("charlm.lm.checkpoint"),
    lambda: __import__("charlm.cli"),
    lambda: charlm.load("out"),
):
    try:
        use()
    except ImportError as error:
        assert error.name == "typer"
        found.add(str(error))
(sentence,) = found
print(sentence)
""")
    assert result.returncode == 0, result.stderr
    assert SENTENCE.fullmatch(result.stdout)


def test_the_sentence_names_what_is_missing_only(monkeypatch: pytest.MonkeyPatch) -> None:
    _extras.require_lm()
    monkeypatch.setattr(_extras, "find_spec", lambda name: None if name == "safetensors" else name)
    with pytest.raises(_extras.MissingExtraError, match="need safetensors, which the extra lm installs: pip install "):
        _extras.require_lm()


def test_a_source_folder_and_an_installed_charlm_have_each_their_command(tmp_path: Path) -> None:
    assert _extras.install_command("lm", tmp_path) == 'pip install "charlm-kernels[lm]"'
    (tmp_path / "setup.py").touch()
    assert _extras.install_command("lm", tmp_path) == f'pip install --no-build-isolation -e "{tmp_path}[lm]"'


def test_a_plain_install_requires_torch_and_numpy_and_the_extra_the_rest(tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
    (metadata,) = tmp_path.glob("*.egg-info/PKG-INFO")
    fields = email.message_from_string(metadata.read_text(encoding="utf-8"))
    required = [re.sub(r"[\s']", "", line.replace('"', "")) for line in fields.get_all("Requires-Dist")]
    plain = [line for line in required if ";" not in line]
    assert sorted(re.match(r"[a-z]+", line).group() for line in plain) == ["numpy", "torch"]
    extras = {
        "lm": _extras.PACKAGES,
        "data": ("pyarrow", "zstandard"),
        "compress": ("constriction",),
        "report": PACKAGES,
        "serve": serve.PACKAGES,
        "notebooks": ("ipykernel", "ipywidgets", "matplotlib"),
        "tensorboard": ("tensorboard",),
        "hf": hugging_face.PACKAGES,
        "onnx": onnx.PACKAGES,
    }
    expected = sorted(f"{name};extra=={extra}" for extra, names in extras.items() for name in names)
    backport = "tomli;python_version<3.11andextra==lm"
    assert sorted(set(required) - set(plain)) == sorted([*expected, backport])
    assert fields.get_all("Provides-Extra") == [*extras]


def test_make_installs_the_extra() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert '--editable ".[lm,report,serve]"' in makefile
    pinned = re.findall(r"^([a-z]+)==", (ROOT / "requirements.txt").read_text(encoding="utf-8"), re.MULTILINE)
    assert {*_extras.PACKAGES, "plotly", *serve.PACKAGES} <= set(pinned)
