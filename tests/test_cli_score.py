"""charlm score: the numbers are those of the model and are readable without colour."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as xml
from pathlib import Path

import pytest
from lm_support import fails, succeeds, untrained_checkpoint
from rich.console import Console

import charlm
from charlm.lm import checkpoint
from charlm.lm.data import build_corpus
from charlm.lm.display import glyph, heat, print_surprisals
from charlm.lm.evaluate import evaluate, predictions

ITEMS = build_corpus("emma\nolivia\nava\nisabella\n" * 5, format="line")
TEXT = build_corpus("to be, or not to be:\nthat is the question\n" * 10, format="text")


@pytest.fixture(scope="module")
def items(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("items") / "run"
    checkpoint.save(directory, untrained_checkpoint(ITEMS))
    return directory


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("text") / "run"
    checkpoint.save(directory, untrained_checkpoint(TEXT))
    return directory


def test_json_is_one_object_whose_bits_are_the_models(items):
    printed = succeeds("score", items, "emma", "--json")
    assert printed.count("\n") == 1
    result = json.loads(printed)
    bits = charlm.load(items).surprisal("emma", unit="bits").tolist()
    assert list(result) == ["format", "protocol", "items", "characters", "total_bits", "bits_per_char"]
    assert result["items"] == [{"text": "emma", "bits": bits, "total_bits": math.fsum(bits)}]
    assert result["characters"] == 5
    assert result["bits_per_char"] == pytest.approx(result["total_bits"] / 5)


def test_each_line_is_an_item_of_a_model_of_items(items, tmp_path):
    path = tmp_path / "new.txt"
    path.write_bytes("\ufeffava\r\n\r\n  emma  \rolivia".encode())
    found = [json.loads(succeeds("score", items, "--json", *arguments)) for arguments in (("-i", path), ("emma",))]
    assert [item["text"] for item in found[0]["items"]] == ["ava", "emma", "olivia"]
    assert found[0]["items"][1]["bits"] == pytest.approx(found[1]["items"][0]["bits"])
    assert succeeds("score", items, "--json", input=path.read_bytes()) == succeeds("score", items, "--json", "-i", path)


def test_running_text_is_scored_unchanged(text):
    result = json.loads(succeeds("score", text, "--json", input="to be\nor \n"))
    assert [item["text"] for item in result["items"]] == ["to be\nor \n"]
    assert result["characters"] == len("to be\nor \n")


def test_without_a_terminal_every_number_is_below_its_character_and_nothing_is_coloured(items):
    printed = succeeds("score", items, "emma")
    assert "\x1b" not in printed
    characters, numbers = (line.split() for line in printed.splitlines()[:2])
    bits = charlm.load(items).surprisal("emma", unit="bits").tolist()
    assert characters == [*"emma", "end"]
    assert numbers == [f"{value:.1f}" for value in bits]
    total = math.fsum(bits)
    assert f"total {total:.2f} bits for 5 characters" in printed
    assert f": {total / 5:.4f} bits per character" in printed
    assert f"a guess among {len(ITEMS.vocabulary)} tokens" in printed


def test_the_svg_shows_the_characters_in_colour_and_is_well_formed(items, tmp_path):
    path = tmp_path / "score.svg"
    assert "\x1b" not in succeeds("score", items, "olivia", "--svg", path)
    image = path.read_text(encoding="utf-8")
    root = xml.fromstring(image)
    shown = "".join(root.itertext())
    assert all(f"{bits:.1f}" in shown for bits in charlm.load(items).surprisal("olivia", unit="bits").tolist())
    assert len(set(re.findall(r'fill="(#[0-9a-f]{6})"', image))) > 3
    assert [file.name for file in tmp_path.iterdir()] == ["score.svg"]


def test_an_unknown_character_is_an_error_or_an_escape(items):
    assert "'ß' at position 2 of the text" in fails("score", items, "emß")
    assert "'ß' at position 0 of item 2" in fails("score", items, input="emma\nßa\n")
    result = json.loads(succeeds("score", items, "emß", "--unknown", "escape", "--json"))
    assert result["items"][0]["bits"][2] == pytest.approx(12 + math.log2(0x110000 - len(ITEMS.vocabulary.chars)))
    assert "unknown is 'drop', but must be error or escape" in fails("score", items, "emma", "--unknown", "drop")


def test_nothing_to_score_two_texts_and_too_long_a_text_are_one_sentence(items, text, tmp_path):
    assert "the text is empty" in fails("score", items, input=" \n\n")
    assert "the text is empty" in fails("score", text, "")
    assert "exclude each other" in fails("score", items, "emma", "-i", tmp_path / "any.txt")
    assert "No such file" in fails("score", items, "-i", tmp_path / "any.txt")
    assert "Is a directory" in fails("score", items, "-i", tmp_path)
    for folder in (".", "", tmp_path):
        assert f"cannot write {folder or '.'}: Is a directory" in fails("score", items, "emma", "--svg", folder)
    assert "'\\x00' at position 0 of the text" in fails("score", text, "-i", "/dev/zero")  # which has no end
    assert "standard input is not UTF-8: byte 0xff at offset 1" in fails("score", text, input=b"t\xff")


def test_several_texts_are_scored_each_by_itself(items, text):
    result = json.loads(succeeds("score", items, "emma", "olivia\nava", "--json"))
    alone = [json.loads(succeeds("score", items, name, "--json"))["items"][0] for name in ("emma", "olivia", "ava")]
    assert [item["text"] for item in result["items"]] == ["emma", "olivia", "ava"]
    for together, each in zip(result["items"], alone, strict=True):
        assert together["bits"] == pytest.approx(each["bits"])
    result = json.loads(succeeds("score", text, "to be", "or not", "--json"))
    assert [item["text"] for item in result["items"]] == ["to be", "or not"]
    assert "'#' at position 1 of text 2" in fails("score", text, "to be", "o#")


def test_the_protocol_is_named_and_fixed_windows_are_evals(text, tmp_path):
    part = TEXT.parts["train"][0]
    found = {}
    for protocol, words in (("sliding", "sliding full context"), ("fixed", "fixed windows")):
        assert f" ({words}): " in succeeds("score", text, part, "--protocol", protocol)
        found[protocol] = json.loads(succeeds("score", text, part, "--protocol", protocol, "--json"))
        assert found[protocol]["protocol"] == protocol
        model = charlm.load(text).model
        expected = evaluate(model, predictions(model, TEXT, "train", protocol), "train")
        assert found[protocol]["bits_per_char"] == pytest.approx(expected.bits_per_char, rel=1e-6)
    assert found["sliding"]["total_bits"] != pytest.approx(found["fixed"]["total_bits"])
    assert "unknown protocol 'half'" in fails("score", text, "to be", "--protocol", "half")


def test_items_have_one_protocol(items):
    assert json.loads(succeeds("score", items, "emma", "--json"))["protocol"] == "items"
    assert "is for running text" in fails("score", items, "emma", "--protocol", "fixed")


@pytest.mark.parametrize("of_items", [True, False])
@pytest.mark.parametrize("unknown", ["error", "escape"])
def test_more_than_a_megabyte_is_summed_to_what_its_pieces_have(items, text, of_items, unknown, tmp_path, monkeypatch):
    monkeypatch.setattr("charlm.cli.score.MAX_BYTES", 1001)
    directory, source = (items, "emma\r\n  ava\r\nolivia\r") if of_items else (text, "to be, or not\r\nto be\r")
    source = "\ufeff" + source * 300 + ("" if unknown == "error" else "ß\n" * 5)
    path = tmp_path / "long.txt"
    path.write_bytes(source.encode())
    flags = ("-i", path, "--unknown", unknown)
    result = json.loads(succeeds("score", directory, *flags, "--json"))
    assert result["items"] is None
    assert f"total {result['total_bits']:.2f} bits" in succeeds("score", directory, *flags)
    assert "--svg draws every character" in fails("score", directory, *flags, "--svg", tmp_path / "x.svg")
    monkeypatch.setattr("charlm.cli.score.MAX_BYTES", 1_000_000)
    whole = json.loads(succeeds("score", directory, *flags, "--json"))
    assert result["characters"] == whole["characters"]
    assert result["total_bits"] == pytest.approx(whole["total_bits"], rel=1e-6)


def test_errors_in_a_long_text_name_their_place_in_the_whole(items, text, tmp_path, monkeypatch):
    monkeypatch.setattr("charlm.cli.score.MAX_BYTES", 1000)
    path = tmp_path / "long.txt"
    path.write_bytes(b"to be\n" * 1000 + b"#")
    assert "'#' at position 6000 of the text" in fails("score", text, "-i", path)
    path.write_bytes(b"emma\n" * 1000 + b"em#ma\n")
    assert "'#' at position 2 of item 1001" in fails("score", items, "-i", path)
    for data in (b"to be\n" * 1000 + b"\xff\n", "é".encode() * 3000 + b"\xff\n"):
        path.write_bytes(data)
        assert "is not UTF-8: byte 0xff at offset 6000" in fails("score", text, "-i", path, "--unknown", "escape")
    path.write_bytes(("to be\n" * 1000).encode("utf-16-le"))
    assert "looks like UTF-16LE" in fails("score", text, "-i", path)
    path.write_bytes(b" \n" * 1000)
    assert "the text is empty" in fails("score", items, "-i", path)


def test_a_text_of_more_than_a_megabyte_is_summed_in_blocks(text, tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"to be, or not\n" * 80_000)
    result = json.loads(succeeds("score", text, "-i", path, "--json"))
    assert (result["items"], result["characters"]) == (None, 1_120_000)
    part = json.loads(succeeds("score", text, "to be, or not\n" * 1000, "--json"))
    assert result["bits_per_char"] == pytest.approx(part["bits_per_char"], rel=1e-3)


@pytest.mark.exhaustive
def test_items_of_several_megabytes_are_scored(items, tmp_path):
    path = tmp_path / "long.txt"
    path.write_bytes(b"emma\nolivia\n" * 100_000)
    result = json.loads(succeeds("score", items, "-i", path, "--json"))
    expected = json.loads(succeeds("score", items, "emma", "olivia", "--json"))
    assert result["characters"] == 1_200_000
    assert result["bits_per_char"] == pytest.approx(expected["bits_per_char"], rel=1e-6)


def test_an_unknown_capital_is_told_the_case_of_the_vocabulary(items, text):
    message = fails("score", items, "Emma")
    assert (
        "'E' at position 0 of the text (the first is 0) is not in the model's vocabulary, whose letters are all"
        in message
    )
    assert "are all lower case: did you mean 'emma'?" in message
    assert "--unknown escape scores unknown characters instead" in message
    assert "did you mean" not in fails("score", items, "Ëmma")
    assert (
        "'#' at position 1 of the text (the first is 0) is not in the model's vocabulary (nor are '!', '?')"
        in fails("score", text, "t#!?")
    )


def test_control_characters_are_shown_by_their_code_point():
    assert [glyph(char) for char in (" ", "\n", "\t", "\x1b", "\u202e", "é", "\u0301")] == [
        "␣",
        "↵",
        "⇥",
        "U+001B",
        "U+202E",
        "é",
        "◌\u0301",
    ]


def test_the_scale_goes_from_green_to_red_and_no_further():
    green, red = (heat(share).bgcolor.triplet for share in (0.0, 1.0))
    assert green.green > green.red
    assert red.red > red.green
    assert heat(-1.0).bgcolor.triplet == green
    assert heat(math.inf).bgcolor.triplet == heat(math.nan).bgcolor.triplet == red


def test_rows_end_at_the_width_and_behind_newlines(capsys):
    characters = list("ab\ncdefgh日")
    print_surprisals(Console(width=24), characters, [1.0] * len(characters), 4.0)
    rows = capsys.readouterr().out.splitlines()[::2]
    assert [row.split() for row in rows] == [["a", "b", "↵"], ["c", "d", "e", "f"], ["g", "h", "日"]]
