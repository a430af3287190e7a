"""Standard streams: encodings that lack a character, pipes, closed streams, and files."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lm_support import fails, succeeds, untrained_checkpoint

from charlm.cli import app
from charlm.cli.common import prepare_streams
from charlm.lm import checkpoint
from charlm.lm.data import read_corpus
from charlm.lm.inputs import STREAM

CHARLM = [sys.executable, "-c", "from charlm.cli import main; main()"]
TINY = ["--n-hidden", "8", "--n-embd", "2", "--block-size", "3", "--batch-size", "8", "--max-steps", "2"]
NAMES = "эмма\nolivia\nava\nizabélla\n" * 10
TIMEOUT = 60.0  # seconds


@pytest.fixture
def data(tmp_path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text(NAMES, encoding="utf-8")
    return path


@pytest.fixture
def run(tmp_path, data) -> Path:
    checkpoint.save(tmp_path / "run", untrained_checkpoint(read_corpus(data), input_file=str(data)))
    return tmp_path / "run"


# ---- encodings


@pytest.fixture
def written(monkeypatch):
    """Runs a command with standard output and error in an encoding, strict as Python makes them: their bytes."""

    def write(encoding: str, *arguments: str | Path, code: int = 0) -> tuple[str, str]:
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding=encoding))
        prepare_streams()
        with pytest.raises(SystemExit) as end:
            app([str(argument) for argument in arguments], prog_name="charlm")
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in (sys.stdout, sys.stderr))
        assert (end.value.code or 0) == code, (out, err)
        return out, err

    return write


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "utf-8"])
@pytest.mark.parametrize(
    "command",
    [
        ("train",),
        ("sample",),
        ("score", "эмма"),
        ("eval",),
        ("compare", "--baselines"),
        ("entropy",),
        ("info",),
        ("--help",),
        ("train", "--help"),
    ],
    ids=" ".join,
)
def test_every_command_prints_in_every_encoding(written, run, data, tmp_path, encoding, command):
    name, *flags = command
    if name == "train" and not flags:
        flags = ["-i", data, "-o", tmp_path / "new", *TINY]
    elif name == "entropy":
        flags = [data]
    elif name not in ("info", "--help", "train"):
        flags = [run, *flags]
    out, err = written(encoding, name, *flags)
    assert out
    assert err == ""
    if encoding == "ascii":
        assert "?" not in out  # nothing was lost: what is not there is escaped
    if name == "train" and "-i" in flags:
        line = next(line for line in out.splitlines() if line.startswith("step 2/2 "))
        assert line.count(" - " if encoding == "ascii" else " · ") == 3
        checkpoint.load(tmp_path / "new").build_model()


def test_a_character_that_an_output_lacks_is_escaped_in_an_error_too(written, run):
    out, err = written("cp1252", "sample", run, "--prompt", "яя", code=2)
    assert out == ""
    assert err.startswith(r"charlm: character '\u044f' at position 0 of the prompt")


# ---- data through a pipe


@pytest.fixture
def pipe(data):
    """The path of a pipe that holds the data, as a shell's <(cat data.txt) is one."""
    ours, theirs = os.pipe()
    os.write(theirs, data.read_bytes())
    os.close(theirs)
    yield f"/dev/fd/{ours}"
    os.close(ours)


def test_a_run_on_a_pipe_is_resumed_and_measured_with_its_data_given_again(pipe, data, tmp_path):
    run = tmp_path / "piped"
    succeeds("train", "-i", pipe, "-o", run, *TINY)
    saved = checkpoint.load(run)
    assert saved.config.input_file == STREAM
    assert saved.digest == read_corpus(data).digest
    for command in (("train", "-o", run, "--resume"), ("eval", run), ("compare", run)):
        assert "read its data from standard input or a pipe: give the data again with -i" in fails(*command)
    assert len(succeeds("sample", run, "-n", 3).splitlines()) == 3  # which needs no data
    assert "resumed at step 2" in succeeds("train", "-o", run, "--resume", "-i", data, "--max-steps", 3)
    assert checkpoint.load(run).config.input_file == str(data)
    assert "loss on dev" in succeeds("eval", run)


def test_standard_input_is_data(data, tmp_path):
    output = succeeds("train", "-i", "-", "-o", tmp_path / "run", *TINY, input=data.read_bytes())
    assert "\nstandard input or a pipe: 40 items (line format, guessed)" in output
    assert checkpoint.load(tmp_path / "run").config.input_file == STREAM


def test_a_file_that_a_shell_has_opened_is_the_file(data, tmp_path):
    with data.open("rb") as file:
        succeeds("train", "-i", f"/dev/fd/{file.fileno()}", "-o", tmp_path / "run", *TINY)
    assert checkpoint.load(tmp_path / "run").config.input_file == str(data)


@pytest.mark.exhaustive
def test_closed_streams_are_empty_ones(data, tmp_path):
    def shell(redirection: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = ["sh", "-c", f'"$@" {redirection}', "sh", *CHARLM, *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)

    flags = ("-o", tmp_path / "run", *TINY)
    result = shell("<&-", "train", "-i", "-", *flags)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", "charlm: standard input is empty\n")
    result = shell("<&- >&-", "train", "-i", data, *flags)
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
    assert checkpoint.load(tmp_path / "run").step == 2


# ---- output into a file


@pytest.mark.exhaustive
def test_a_run_in_the_c_locale_writes_ascii_lines_to_a_file_as_it_goes_and_saves(data, tmp_path):
    environment = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    environment.pop("PYTHONIOENCODING", None)
    log, long = tmp_path / "log", ["--max-steps", "100000000", "--eval-interval", "50", "--log-interval", "10"]
    command = [*CHARLM, "train", "-i", data, "-o", tmp_path / "run", *TINY, *long]
    with (
        log.open("wb") as file,
        subprocess.Popen(command, stdout=file, stderr=subprocess.PIPE, env=environment) as process,
    ):
        deadline = time.monotonic() + TIMEOUT
        while not (text := log.read_text(encoding="utf-8")).count("\nstep ") > 1:
            assert time.monotonic() < deadline, text
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        process.terminate()
        assert process.wait(TIMEOUT) == 128 + 15
        assert process.stderr.read() == b""
    lines = log.read_text(encoding="ascii").splitlines()
    assert "step 50/100000000 - train " in "\n".join(lines)
    assert lines[-2].startswith(f"stopped at step {checkpoint.load(tmp_path / 'run').step} of ")
