"""charlm entropy: hand-counted values, and comparisons with eval and the compressors."""

from __future__ import annotations

import gzip
import json
import math

import pytest
from lm_support import fails, succeeds

from charlm.lm.data import build_corpus
from charlm.lm.predictability import COMPRESSORS, measure


def test_the_entropies_of_a_text_that_can_be_counted_by_hand():
    found = measure("abababab" * 50, order=2, format="text")
    assert found.in_sample == pytest.approx([1.0, 0.0, 0.0], abs=1e-9)
    assert (found.characters, found.bytes, found.alphabet) == (400, 400, 2)
    assert found.held_out[0] == pytest.approx(1.0, abs=1e-3)
    assert found.held_out[1] < 0.1


def test_bytes_are_no_characters_and_an_items_end_is_one():
    found = measure(" é\r\n\nö\nü \né".replace("\r", ""), order=0, format="line")
    assert (found.characters, found.bytes, found.alphabet) == (8, 12, 4)
    assert found.in_sample == pytest.approx([1 / 2 + 1 / 4 * 2 + 2 * 1 / 8 * 3])
    assert (found.items, found.duplicate_items) == (4, 1)


def test_json_has_the_fixed_form_and_the_compressors_bits(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text("to be, or not to be: that is the question\n" * 40)
    printed = succeeds("entropy", path, "--format", "text", "--json", "--order", 3)
    assert printed.count("\n") == 1
    found = json.loads(printed)
    assert list(found) == [
        *("format", "bytes", "characters", "alphabet", "in_sample", "held_out", "compressed"),
        *("items", "duplicate_items", "dev_items", "dev_items_in_train"),
    ]
    assert len(found["in_sample"]) == 4
    assert found["in_sample"] == sorted(found["in_sample"], reverse=True)
    size = len(gzip.compress(path.read_bytes(), compresslevel=9, mtime=0))
    assert found["compressed"]["gzip"] == pytest.approx(8 * size / found["characters"])
    assert set(found["compressed"]) == {"gzip", "bz2", "xz"}
    assert found["items"] is None


def test_the_compressors_see_items_in_the_order_of_the_split():
    items = sorted(f"{first}{last}" for first in "abcdefghij" for last in ("anna", "bert", "carl", "dora", "emil"))
    found = measure("".join(f"{item}\n" for item in items), order=0, format="line", seed=7)
    parts = build_corpus("\n".join(items), format="line", seed=7).parts
    shuffled = [item for split in ("train", "dev", "test") for item in parts[split]]
    assert shuffled != items == sorted(shuffled)
    for name, compress in COMPRESSORS.items():
        seen = "".join(f"{item}\n" for item in shuffled).encode()
        assert found.compressed[name] == 8 * len(compress(seen)) / len(seen)
    assert found.compressed["xz"] > 8 * len(COMPRESSORS["xz"]("\n".join(items).encode())) / found.characters


def test_held_out_is_what_eval_says_of_the_ngram_model(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("emma\nolivia\nava\nisabella\nmia\n" * 8)
    found = json.loads(succeeds("entropy", path, "--json"))
    assert len(found["held_out"]) == 6
    for k in (2, 5):
        run = tmp_path / str(k)
        succeeds("train", "-i", path, "-o", run, "--type", "ngram", "--order", k + 1)
        trained = json.loads(succeeds("eval", run, "--json"))
        assert trained["bits_per_char"] == pytest.approx(found["held_out"][k], rel=1e-12)
    assert found["duplicate_items"] == 35
    assert found["dev_items"] == 4
    assert found["dev_items_in_train"] == 4


def test_the_report_says_size_alphabet_repeats_and_one_row_for_each_order(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("emma\nolivia\nava\nisabella\nmia\n" * 8)
    output = succeeds("entropy", path, "--order", 3)
    assert "232 bytes, 232 characters, 10 of them distinct (line format, guessed)" in output
    assert "40 items, of which 35 repeat an earlier one" in output
    assert "4 of 4 dev items (100.0%) also occur in train" in output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["0", "1", "2", "3"]
    assert all(0 <= float(row[1]) <= math.log2(10) for row in rows)


def test_a_short_text_has_fewer_orders_than_requested():
    assert len(measure("abcd", order=5, format="text").in_sample) == 4


def test_a_file_or_an_order_that_cannot_be_is_one_sentence(tmp_path):
    path = tmp_path / "data.txt"
    path.write_text("")
    assert "is empty" in fails("entropy", path)
    path.write_text("emma\n")
    assert "has 1 item" in fails("entropy", path)
    path.write_bytes(b"em\xffma\n")
    assert "is not UTF-8: byte 0xff at offset 2" in fails("entropy", path)
    path.write_text("emma\nava\nmia\n")
    for order in (-1, 21):
        assert f"order is {order}, but must be from 0 to 20" in fails("entropy", path, "--order", order)
