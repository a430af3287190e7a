"""Input of the commands: standard input, pipes, and files that are not UTF-8."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from lm_support import fails, run, run_on_own_streams, succeeds, untrained_checkpoint

from charlm.lm import checkpoint
from charlm.lm.data import read_corpus

CHARLM = [sys.executable, "-c", "from charlm.cli import main; main()"]
NAMES = "emma\nolivia\nava\nisabella\n" * 10
TIMEOUT = 60.0  # seconds


@pytest.fixture
def names(tmp_path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text(NAMES)
    return path


@pytest.fixture
def trained(tmp_path, names) -> Path:
    checkpoint.save(tmp_path / "run", untrained_checkpoint(read_corpus(names), input_file=str(names)))
    return tmp_path / "run"


def shell(line: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    """Bash runs `line`, in which $CHARLM is the command and $1, $2, … are `arguments`."""
    script = f'charlm() {{ "{sys.executable}" -c "from charlm.cli import main; main()" "$@"; }}; {line}'
    command = ["bash", "-c", script, "bash", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT, check=False)


def test_a_dash_is_standard_input(trained, names):
    expected = json.loads(succeeds("entropy", names, "--json"))
    assert json.loads(succeeds("entropy", "-", "--json", input=NAMES)) == expected
    assert "standard input: 250 bytes" in succeeds("entropy", "-", input=NAMES)
    assert succeeds("eval", trained, "-i", "-", "--json", input=NAMES) == succeeds("eval", trained, "--json")
    table = json.loads(succeeds("compare", trained, "-i", "-", "--json", input=NAMES))
    assert table["tokens"] == json.loads(succeeds("eval", trained, "--json"))["tokens"]
    assert "standard input is empty" in fails("entropy", "-", input="")
    assert "standard input is not UTF-8: byte 0xff at offset 1" in fails("entropy", "-", input=b"t\xff\n")


def test_data_may_come_through_a_pipe(trained, names):
    line = (
        "charlm eval $1 --json -i <(cat $2) && charlm eval $1 --json -i /dev/stdin < $2 && charlm entropy --json - < $2"
    )
    result = shell(line, trained, names)
    assert result.returncode == 0, result.stderr
    *losses, entropy = map(json.loads, result.stdout.splitlines())
    assert entropy["items"] == 40
    assert losses == [json.loads(succeeds("eval", trained, "--json"))] * 2


def test_entropy_without_a_file_says_that_standard_input_is_not_read(names, monkeypatch, capsys):
    hint = "charlm: measuring the shipped names; `charlm entropy -` reads standard input\n"
    for path, expected in ((names, hint), (Path("/dev/null"), "")):
        with path.open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert run_on_own_streams("entropy", "--order", "0", "--json") == 0
        output = capsys.readouterr()
        assert output.err == expected
        assert json.loads(output.out)["items"] > 30_000


@pytest.mark.parametrize("command", [("entropy", "-"), ("score", "RUN"), ("eval", "RUN", "-i", "-")], ids=" ".join)
def test_a_closed_standard_input_is_one_sentence(trained, command, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert run_on_own_streams(*[trained if part == "RUN" else part for part in command]) == 2
    error = capsys.readouterr().err
    assert error.startswith("charlm: ")
    assert "empty" in error
    assert error.count("\n") == 1


# ---- files that are not UTF-8


@pytest.mark.parametrize(
    ("encoding", "words"),
    [
        ("utf-16", "byte 0xff at offset 0 (invalid start byte); it looks like UTF-16: `iconv -f UTF-16 -t UTF-8 "),
        ("utf-32", "it looks like UTF-32: `iconv -f UTF-32 -t UTF-8 "),
        ("utf-16-le", "it looks like UTF-16LE: `iconv -f UTF-16LE -t UTF-8 "),
        ("utf-16-be", "it looks like UTF-16BE: `iconv -f UTF-16BE -t UTF-8 "),
        ("latin-1", "it may be ISO-8859-1 or Windows-1252: `iconv -f WINDOWS-1252 -t UTF-8 "),
    ],
)
def test_another_encoding_is_named_with_the_command_that_converts_it(tmp_path, encoding, words):
    path = tmp_path / "it's.txt"
    path.write_bytes("zoë\nandré\nemma\nolivia\n".encode(encoding))
    message = fails("entropy", path)
    assert words in message
    command = message.split("`")[1].replace("utf8.txt", f"'{tmp_path}/utf8.txt'")
    subprocess.run(["bash", "-c", command], check=True, timeout=TIMEOUT)
    assert (tmp_path / "utf8.txt").read_text(encoding="utf-8").lstrip("\ufeff") == "zoë\nandré\nemma\nolivia\n"


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"\x7fELF\x02\x01\x01\x00\x00\xff\xfe1234", "byte 0xff at offset 9 (invalid start byte); it looks like a bin"),
        (b"anna\njos\xe9\n", "it may be ISO-8859-1 or Windows-1252: `iconv"),
        (b"em\xffma", "it may be ISO-8859-1 or Windows-1252: `iconv"),
        ("emma\nzoë".encode()[:-1], "(unexpected end of data); it seems to be cut off inside a character"),
    ],
)
def test_binary_and_truncated_files_are_recognized(tmp_path, data, words):
    path = tmp_path / "data"
    path.write_bytes(data)
    assert words in fails("entropy", path)


def test_a_pipe_of_utf_16_gets_the_command_without_a_file_name(trained):
    message = fails("score", trained, input="emma".encode("utf-16-le"))
    words = "standard input looks like UTF-16LE, not UTF-8: every second byte is NUL; `iconv -f UTF-16LE -t UTF-8 >"
    assert words in message


def test_nul_characters_in_a_text_are_characters(tmp_path):
    path = tmp_path / "data"
    path.write_bytes(b"ab\0cd\n" * 20)
    assert run("entropy", path).exit_code == 0
