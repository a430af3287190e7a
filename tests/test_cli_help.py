"""The help fits 80 columns, a line for each command, and states units."""

from __future__ import annotations

import pytest
from lm_support import succeeds

SCREEN = {"COLUMNS": "80", "LINES": "24", "TERMINAL_WIDTH": "80"}
UNITS = {
    "train": ("nats per character", "bits"),
    "sample": ("character",),
    "score": ("in bits", "-log2 p"),
    "eval": ("in nats and bits",),
    "compare": ("in nats and bits", "seconds"),
    "report": ("surprisal in bits",),
    "serve": ("in bits",),
    "compress": ("bits per byte", "seconds a megabyte"),
    "entropy": ("in bits per character", "in characters"),
}


def test_the_help_fits_80_columns_and_names_every_command_on_a_line_of_its_own():
    lines = succeeds("--help", env=SCREEN).rstrip("\n").split("\n")
    assert max(map(len, lines)) <= 80
    box = lines[next(number for number, line in enumerate(lines) if "─ Commands ─" in line) :]
    commands = " ".join(line.split()[1] for line in box if line.startswith("│ "))
    assert commands == "prepare train sample score eval compare report serve export entropy compress decompress info"


@pytest.mark.parametrize("command", UNITS)
def test_the_help_of_a_command_states_its_units(command):
    text = " ".join(succeeds(command, "--help", env=SCREEN).replace("│", " ").split())
    for unit in UNITS[command]:
        assert unit in text
