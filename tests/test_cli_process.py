"""The commands as processes of their own: what only shows there."""

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

import charlm
from charlm.lm import checkpoint
from charlm.lm.data import read_text

CHARLM = [sys.executable, "-c", "from charlm.cli import main; main()"]
TINY = ["--n-hidden", "16", "--n-embd", "4", "--block-size", "3", "--batch-size", "16"]
ALONE = ["--threads", "1"]  # two take 50 times as long on a machine whose cores are taken
PATIENCE = 60.0  # seconds, for a process to start and take its first steps on a machine that is busy


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [*CHARLM, *(str(argument) for argument in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "names.txt"
    path.write_text("\n".join(read_text(None).split("\n")[:500]) + "\n")
    return path


def without_clock(directory: Path) -> list[tuple[int, str, float]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["split"], line["nats"]) for line in lines]


def test_ctrl_c_saves_says_how_to_go_on_and_going_on_changes_nothing(tmp_path, names):
    flags = ["-i", names, *TINY, "--max-steps", "800", "--log-interval", "10", *ALONE]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run("train", "-o", whole, *flags).returncode == 0

    command = [*CHARLM, "train", "-o", str(parts), *map(str, flags)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = parts / "metrics.jsonl"
        deadline = time.monotonic() + PATIENCE
        while not (metrics.exists() and metrics.read_text().count("\n") > 5):
            assert time.monotonic() < deadline
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=PATIENCE)
    assert process.returncode == 128 + signal.SIGINT, (stdout, stderr)
    assert stderr == ""
    step = checkpoint.load(parts).step
    assert 0 < step < 800
    assert f"stopped at step {step} of 800 and saved in" in stdout
    assert stdout.endswith(f"charlm train -o {parts} --resume\n")

    assert run("train", "-o", parts, "--resume", *ALONE).returncode == 0
    assert without_clock(parts) == without_clock(whole)


def test_eval_json_prints_one_object_and_nothing_else(tmp_path, names):
    assert run("train", "-i", names, "-o", tmp_path / "run", *TINY, "--max-steps", "5").returncode == 0
    result = run("eval", tmp_path / "run", "--split", "test", "--json")
    assert result.stderr == ""
    assert result.stdout.count("\n") == 1
    assert set(json.loads(result.stdout)) == {"split", "protocol", "nats", "bits_per_char", "perplexity", "tokens"}


def test_an_error_is_one_sentence_on_stderr_and_exit_code_2(tmp_path):
    result = run("eval", tmp_path / "nowhere")
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("charlm: there is no checkpoint in ")
    assert result.stderr.count("\n") == 1


def test_help_imports_no_training_code():
    code = (
        "import sys; sys.argv = ['charlm', '--help']\n"
        "from charlm.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print([name for name in ('charlm.lm.train', 'charlm.lm.checkpoint', 'safetensors') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "[]"


def test_importing_charlm_imports_nothing_of_the_command_line():
    wanted = ("charlm.lm", "charlm.cli", "typer", "rich", "safetensors")
    code = f"import sys, charlm; print([name for name in {wanted} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="needs a pseudo-terminal")
def test_a_terminal_sees_a_bar_with_loss_speed_and_time_left(tmp_path, names):
    ours, theirs = os.openpty()
    command = [*CHARLM, "train", "-i", str(names), "-o", str(tmp_path / "run"), *TINY, *ALONE, "--max-steps", "300"]
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
        assert process.wait(PATIENCE) == 0
    text = shown.decode()
    for part in ("training", "300/300", "train ", "dev ", "nats", "tokens/s", "0:00:"):
        assert part in text


def test_python_m_charlm_is_charlm_and_says_its_version():
    command = [sys.executable, "-m", "charlm", "--version"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"charlm {charlm.__version__}\n", "")
    assert run("--version").stdout == result.stdout


def completed(words: str) -> list[str]:
    """What bash is offered for the last of `words`."""
    number = str(len(words.split(" ")) - 1)
    environment = {**os.environ, "_CHARLM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": number}
    result = subprocess.run(CHARLM, capture_output=True, text=True, timeout=PATIENCE, check=False, env=environment)
    assert result.stderr == ""
    return result.stdout.split()


def test_the_shell_completes_commands_and_options():
    assert completed("charlm ") == ["train", "sample", "score", "eval", "compare", "entropy", "info"]
    assert completed("charlm sc") == ["score"]
    assert completed("charlm eval --pro") == ["--protocol"]
    # The variable is typer's own: without it, it asks which shell is running, and under make that is sh.
    environment = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    command = [*CHARLM, "--show-completion", "bash"]
    script = subprocess.run(
        command, capture_output=True, text=True, timeout=PATIENCE, check=True, env=environment
    ).stdout
    assert "_CHARLM_COMPLETE=complete_bash" in script
    assert script.rstrip().endswith("-F _charlm_completion charlm")


def train_slowly(folder: Path) -> list[str]:
    flags = ["--max-steps", "100000", "--eval-interval", "100000", "--log-interval", "20", "--threads", "1"]
    return [*CHARLM, "train", "-o", str(folder), *flags]


def test_a_run_whose_reader_goes_away_is_saved_and_says_so(tmp_path):
    process = subprocess.Popen(
        train_slowly(tmp_path / "run"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while not process.stdout.readline().startswith("step "):
        pass
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(PATIENCE) == 128 + signal.SIGPIPE
    assert re.fullmatch(r"charlm: the output pipe was closed; stopped and saved step \d+ in .*run\n", error)
    assert error.endswith(f"saved step {checkpoint.load(tmp_path / 'run').step} in {tmp_path / 'run'}\n")


def test_a_terminal_that_is_closed_saves_the_run(tmp_path):
    process = subprocess.Popen(train_slowly(tmp_path / "run"), stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("step "):
        pass
    process.send_signal(signal.SIGHUP)
    assert "resume with" in process.stdout.read()
    assert process.wait(PATIENCE) == 128 + signal.SIGHUP
