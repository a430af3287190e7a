"""Terminal output: control characters are escaped, and tables are not cut off."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_support import fails, succeeds, untrained_checkpoint
from rich.console import Console

from charlm.lm import checkpoint
from charlm.lm.data import read_corpus
from charlm.lm.display import print_comparison, print_entropies, print_items, print_losses, print_passages
from charlm.lm.evaluate import Comparison, Evaluation
from charlm.lm.terminal import SafeConsole, visible

TITLE = "\x1b]0;owned\x07"  # sets the title of the terminal's window
CONTROLS = [chr(code) for code in [*range(0x20), *range(0x7F, 0xA0), 0x200E, 0x202E, 0x2028, 0x2066, 0xFEFF, 0xE0041]]


@pytest.fixture
def hostile(tmp_path) -> Path:
    """A model whose only characters are controls, of a file and in a folder whose names hold some."""
    data = tmp_path / f"data{TITLE}\u202e[red].txt"
    data.write_text(f"{TITLE}\n\u202e\x9b2J\n\x08\x85\n" * 10, encoding="utf-8")
    run = tmp_path / f"run{TITLE}"
    checkpoint.save(run, untrained_checkpoint(read_corpus(data, format="line"), input_file=str(data)))
    return run


def unescaped(text: str) -> set[str]:
    return set(text) & (set(CONTROLS) - {"\n"})


@pytest.mark.parametrize("character", CONTROLS, ids=lambda c: f"U+{ord(c):04X}")
def test_a_control_character_is_shown_as_its_escape(character):
    assert visible(f"a{character}b") == f"a{character.encode('unicode_escape').decode()}b"
    assert visible(character, keep=character) == character


def test_printable_text_is_not_changed():
    text = "é 日本 \u0301 👩\u200d🔬 می\u200cخواهم \\x1b [red] :smile:"
    assert visible(text) == text


def test_every_command_escapes_control_characters_of_models_and_file_names(hostile):
    data = next(path for path in hostile.parent.iterdir() if path.is_file())
    shown = [
        succeeds("sample", hostile, "-n", 20),
        succeeds("score", hostile, TITLE),
        succeeds("score", hostile, "-i", data),
        succeeds("eval", hostile),
        succeeds("compare", hostile, "--baselines"),
        succeeds("entropy", data),
        succeeds("train", "-i", data, "-o", hostile.parent / f"out{TITLE}", "--type", "bigram"),
        fails("eval", hostile.parent / f"none{TITLE}"),
        fails("score", hostile, "a\x1b"),
        fails("sample", hostile, "--prompt", "é\x1b"),
        fails("entropy", hostile.parent / f"none{TITLE}"),
        fails("eval", hostile, "--split", TITLE),
    ]
    assert [unescaped(text) for text in shown] == [set()] * len(shown)
    assert "\\x1b" in shown[0]
    assert "\\x1b]0;owned\\x07\\u202e[red].txt: " in shown[5]


def test_json_is_exact(hostile):
    assert json.loads(succeeds("score", hostile, TITLE, "--json"))["items"][0]["text"] == TITLE


def test_a_console_escapes_control_characters(capsys):
    SafeConsole(markup=False).print(f"[bold]a{TITLE}b")
    assert capsys.readouterr().out == "[bold]a\\x1b]0;owned\\x07b\n"


def test_samples_keep_their_newlines_and_their_marks_in_a_column(capsys):
    print_passages(SafeConsole(width=20), ["a\tb\nc\x1b"])
    assert capsys.readouterr().out.splitlines()[1:] == ["a       b", "c\\x1b"]
    print_items(SafeConsole(width=80), ["日本", "a\x1b", "abc"], ["new", "dev", "train"])
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["日本   new", "a\\x1b  dev", "abc    train"]


# ---- tables

LOSS = Evaluation("dev", "sliding", 12.34567, 1_234_567)
ROWS = [
    Comparison("runs/of-the-summer/a-long-name-of-a-folder", "mlp + 6-gram", LOSS, 0.01234, 1_234_567_890, 12345.678),
    Comparison("bigram", "bigram", LOSS, float("nan"), 0, 0.5),
]
FIGURES = ["12.3457", "0.0123", "17.8110", f"{LOSS.perplexity:.3f}", "1,234,567,890", "12345.68"]


def printed(width: int, terminal: bool, capsys) -> str:
    console = Console(width=width, force_terminal=terminal, color_system=None, highlight=False)
    print_losses(console, "loss on dev, 1,234,567 tokens, sliding full context " * 2, {"x" * 70: LOSS})
    print_comparison(console, ROWS, "blocks of 256 characters")
    print_entropies(console, [1.0, 2.0], [3.0])
    return capsys.readouterr().out


def test_a_piped_table_is_whole_and_a_line_a_row(capsys):
    output = printed(80, False, capsys)
    for words in ("runs/of-the-summer/a-long-name-of-a-folder (mlp + 6-gram)", "x" * 70, "bits per character"):
        assert words in output
    rows = [line for line in output.splitlines() if "mlp + 6-gram" in line]
    assert [cell.strip() for cell in rows[0].split("│")[3:-1]] == FIGURES
    assert len(rows) == 1


@pytest.mark.parametrize("width", [100, 80])
def test_a_table_on_a_terminal_fits_and_breaks_no_number(width, capsys):
    output = printed(width, True, capsys)
    lines = output.splitlines()
    if width >= 100:
        assert max(map(len, lines)) <= width
    for figure in [*FIGURES, "1,234,567 tokens" if width == 100 else "1,234,567", "3.0000", "perplexity", "parameters"]:
        assert figure in output
    assert "…" not in output
    folded = "".join(line.split("│")[1].strip() for line in lines if line.startswith("│"))
    assert "runs/of-the-summer/a-long-name-of-a-folder".replace("-", "") in folded.replace("-", "").replace(" ", "")


def test_a_table_that_cannot_be_so_narrow_is_printed_whole(capsys):
    output = printed(30, True, capsys)
    assert all(figure in output for figure in FIGURES)
    assert "…" not in output


def test_the_figures_of_a_usual_comparison_fit_eighty_columns(capsys):
    rows = [Comparison("out", "mlp", Evaluation("dev", "items", 2.1, 22_766), 0.01, 182_580, 1.23)]
    print_comparison(Console(width=80, force_terminal=True, color_system=None), rows, "items")
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
