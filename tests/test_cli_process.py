"""Commands in a process of their own: signals, terminals, pipes, imports, and the entry points."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from lm_support import run_on_own_streams, succeeds

import charlm
from charlm.lm import checkpoint
from charlm.lm.data import read_text

CHARLM = [sys.executable, "-c", "from charlm.cli import main; main()"]
TINY = ["--n-hidden", "16", "--n-embd", "4", "--block-size", "3", "--batch-size", "16"]
ONE_THREAD = ["--threads", "1"]
TIMEOUT = 60.0  # seconds, for a process to start and take its first steps on a loaded machine


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*CHARLM, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "names.txt"
    path.write_text("\n".join(read_text(None).split("\n")[:500]) + "\n")
    return path


def without_clock(directory: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["nats"]) for line in lines]


@pytest.mark.exhaustive
def test_ctrl_c_saves_says_how_to_go_on_and_going_on_changes_nothing(tmp_path, names):
    flags = ["-i", names, *TINY, "--max-steps", "800", "--log-interval", "10", *ONE_THREAD]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    succeeds("train", "-o", whole, *flags)

    command = [*CHARLM, "train", "-o", str(parts), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = parts / "metrics.jsonl"
        deadline = time.monotonic() + TIMEOUT
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 128 + signal.SIGINT, (stdout, stderr)
    assert stderr == ""
    step = checkpoint.load(parts).step
    assert 0 < step < 800
    assert f"stopped at step {step} of 800 and saved in" in stdout
    assert stdout.endswith(f"charlm train -o {parts} --resume\n")

    succeeds("train", "-o", parts, "--resume", *ONE_THREAD)
    assert without_clock(parts) == without_clock(whole)


def test_eval_json_prints_one_object_and_nothing_else(tmp_path, names):
    succeeds("train", "-i", names, "-o", tmp_path / "run", *TINY, "--max-steps", "5")
    result = run("eval", tmp_path / "run", "--split", "test", "--json")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert set(json.loads(result.stdout)) == {"split", "protocol", "nats", "bits_per_char", "perplexity", "tokens"}


def test_importing_charlm_imports_no_command_line_and_its_help_no_training_code():
    code = (
        "import sys, charlm\n"
        "loaded = lambda *names: [name for name in names if name in sys.modules]\n"
        "print(loaded('charlm.lm', 'charlm.cli', 'typer', 'rich', 'safetensors'))\n"
        "sys.argv = ['charlm', '--help']\n"
        "from charlm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(loaded('charlm.lm.train', 'charlm.lm.checkpoint', 'safetensors'))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("[]", "[]")


@pytest.mark.exhaustive
@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_sees_a_bar_with_loss_speed_and_time_left(tmp_path, names):
    ours, theirs = os.openpty()
    command = [
        *CHARLM,
        "train",
        "-i",
        str(names),
        "-o",
        str(tmp_path / "run"),
        *TINY,
        *ONE_THREAD,
        "--max-steps",
        "300",
    ]
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "160"}
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE, env=environment) as process:
        os.close(theirs)
        shown = bytearray()
        while True:
            try:
                piece = os.read(ours, 65536)
            except OSError:  # the other end is closed: the process has ended
                break
            if not piece:
                break
            shown += piece
        os.close(ours)
        assert process.wait(TIMEOUT) == 0
    text = shown.decode()
    for part in ("training", "300/300", "train ", "dev ", "nats", "tokens/s", "0:00:"):
        assert part in text


def test_python_m_charlm_is_charlm_and_says_its_version():
    command = [sys.executable, "-m", "charlm", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"charlm {charlm.__version__}\n", "")


def completion_environment(words: str) -> dict[str, str]:
    """The environment in which bash requests completions of the last of `words`."""
    number = str(len(words.split(" ")) - 1)
    return {"_CHARLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": number}


def test_the_shell_completes_commands_and_options(monkeypatch, capfd):
    environment = {**os.environ, **completion_environment("charlm ")}
    result = subprocess.run(CHARLM, capture_output=True, text=True, timeout=TIMEOUT, check=False, env=environment)
    assert result.stderr == ""
    assert "prepare train sample score eval compare report serve export" in " ".join(result.stdout.split())
    for words, expected in (("charlm sc", ["score"]), ("charlm eval --pro", ["--protocol"])):
        with monkeypatch.context() as patch:
            for name, value in completion_environment(words).items():
                patch.setenv(name, value)
            run_on_own_streams()
        assert capfd.readouterr().out.split() == expected


def test_the_completion_script_of_bash_is_shown(monkeypatch, capfd):
    # Without this variable of typer it detects the running shell, which under make is sh.
    monkeypatch.setenv("_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION", "1")
    run_on_own_streams("--show-completion", "bash")
    script = capfd.readouterr().out
    assert "_CHARLM_COMPLETE=complete_bash" in script
    assert script.rstrip().endswith("-F _charlm_completion charlm")


def endless_training(folder: Path, names: Path) -> list[str]:
    flags = [*TINY, "--max-steps", "1000000", "--eval-interval", "20", "--threads", "1"]
    return [*CHARLM, "train", "-i", str(names), "-o", str(folder), *flags]


@pytest.mark.exhaustive
def test_a_run_whose_reader_goes_away_is_saved_and_says_so(tmp_path, names):
    command = endless_training(tmp_path / "run", names)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step "):
        pass
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(TIMEOUT) == 128 + signal.SIGPIPE
    assert re.fullmatch(r"charlm: the output pipe was closed; stopped and saved step \d+ in .*run\n", error)
    assert error.endswith(f"saved step {checkpoint.load(tmp_path / 'run').step} in {tmp_path / 'run'}\n")


@pytest.mark.exhaustive
def test_a_terminal_that_is_closed_saves_the_run(tmp_path, names):
    process = subprocess.Popen(endless_training(tmp_path / "run", names), stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step "):
        pass
    process.send_signal(signal.SIGHUP)
    assert "resume with" in process.stdout.read()
    assert process.wait(TIMEOUT) == 128 + signal.SIGHUP
