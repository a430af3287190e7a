"""`charlm train --config FILE`."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
from lm_support import fails, run, succeeds

from charlm._errors import UserError
from charlm.lm.start import converted

TINY = """
# a small run
n_embd = 2
"n_hidden" = 8
max-steps = 3
learning_rate = 1
batch_norm = true
compile = false
"""


@pytest.fixture
def names(tmp_path) -> Path:
    path = tmp_path / "names.txt"
    path.write_text("".join(f"{a}{b * n}\n" for n in range(1, 5) for a in "abcde" for b in "vwxyz"))
    return path


def saved(folder: Path) -> dict[str, object]:
    return json.loads((folder / "checkpoint.json").read_text())["config"]


def test_the_options_of_a_file_are_those_of_the_command_line_which_overrides_them(tmp_path, names):
    path = tmp_path / "tiny.toml"
    path.write_text(f"{TINY}work_dir = {json.dumps(str(tmp_path / 'a'))}\n")
    succeeds("train", "-i", names, "--config", path)
    (start,) = json.loads((tmp_path / "a" / "checkpoint.json").read_text())["commands"]
    program, command, *words = shlex.split(start["command"])
    assert (program, command) == ("charlm", "train")
    succeeds(command, *words, "--overwrite")  # the kept command can be run
    flags = ("--n-embd", 2, "--n-hidden", 8, "--max-steps", 3, "--learning-rate", 1, "--batch-norm")
    succeeds("train", "-i", names, *flags, "-o", tmp_path / "b")
    assert saved(tmp_path / "a") == saved(tmp_path / "b")
    succeeds("train", "-i", names, "--max-steps", 2, "-o", tmp_path / "c", "--config", path, "--no-batch-norm")
    assert saved(tmp_path / "c") == {**saved(tmp_path / "b"), "max_steps": 2, "batch_norm": False}
    assert "mlp does not have these options" in fails(
        "train", "-i", names, "-o", tmp_path / "d", "--config", _written(tmp_path, "n_head = 2")
    )


def test_a_resumed_run_takes_the_same_file(tmp_path, names):
    path = _written(tmp_path, TINY)
    command = ("train", "-i", names, "-o", tmp_path / "run", "--config", path)
    succeeds(*command)
    path.write_text(TINY.replace("max-steps = 3", "max-steps = 5"))
    succeeds(*command, "--resume")
    path.write_text(TINY.replace('"n_hidden" = 8', "n_hidden = 9"))
    assert "--n-hidden 9 differs from the checkpoint's 8" in fails(*command, "--resume")


def _written(folder: Path, text: str | bytes) -> Path:
    path = folder / "options.toml"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed = 1\n\nmax_step = 3", "options.toml, line 3: there is no option 'max_step': did you mean max_steps?"),
        ("max_steps = '3'", "options.toml, line 1: max_steps is '3', but must be an integer"),
        ("max_steps = 3.0", "line 1: max_steps is 3.0, but must be an integer"),
        ("compile = 1", "line 1: compile is 1, but must be true or false"),
        ("seed = true", "line 1: seed is True, but must be an integer"),
        ("device = 0", "line 1: device is 0, but must be a string"),
        ("format = 2020-01-01", "line 1: format is datetime.date(2020, 1, 1), but must be a string"),
        ("dropout = [0.1]", "line 1: dropout is [0.1], but must be a number"),
        ("a.b = 3", "options.toml, line 1: there is no option 'a'"),
        ("# none\n[model]\nn_embd = 3", "options.toml, line 2: there is no option 'model'"),
        ("max-steps = 3\nmax_steps = 4", "options.toml, line 2: max_steps is given twice"),
        ("config = 'x'", "line 1: there is no option 'config'"),
        ("max_steps = 0", "max_steps is 0, but must be at least 1"),
        ("max_steps 3", "options.toml is not TOML: "),
        (b"device = '\xff'", "options.toml is not TOML: "),
        ('"x\\u001b[2J" = 3', "there is no option 'x\\x1b[2J'"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_its_line(tmp_path, names, text, message):
    path = _written(tmp_path, text)
    assert message in fails("train", "-i", names, "-o", tmp_path / "run", "--config", path)
    assert not (tmp_path / "run").exists()


def test_a_file_that_cannot_be_read_is_named(tmp_path):
    assert f"cannot read {tmp_path / 'none.toml'}: No such file" in fails("train", "--config", tmp_path / "none.toml")
    assert "cannot read" in fails("train", "--config", tmp_path)
    marked = _written(tmp_path, b"\xef\xbb\xbfmax_step = 3")
    assert "line 1: there is no option 'max_step'" in fails("train", "--config", marked)  # as some editors write it
    assert run("train", "--help").exit_code == 0


def test_an_integer_beyond_the_numbers_of_float_is_named():
    with pytest.raises(UserError, match="learning_rate is too large"):
        converted("learning_rate", 10**5000, float)
