"""Columns of .csv, .tsv, .jsonl and .parquet files: `--column` of `charlm train` and the commands that read a text."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_support import fails, succeeds

import charlm
from charlm import UserError, _ext
from charlm.lm import cache
from charlm.lm.data import build_corpus, read_corpus, read_text
from charlm.lm.sources import pieces

NAMES = ["Ada", 'O"Neil', "Smith, Jr", "née Zoë", "two\nlines", "", *(f"{a}{b}" for a in "abcde" for b in "vwxyz")]
PRESENT = list(filter(None, NAMES))  # an empty field of a table is no document
TINY = ("--n-embd", 2, "--n-hidden", 8, "--max-steps", 3, "--no-mix")
needs_module = pytest.mark.skipif(_ext._C is None, reason="preparing needs the compiled module")


def table(path: Path, header: bool = True, **options: str) -> Path:
    """A table of NAMES with other columns, as Python's csv module writes it."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",", **options)
        writer.writerows([["id", "name", "city"]] * header)
        writer.writerows([number, name, "Rome, IT"] for number, name in enumerate(NAMES))
    return path


def documents(path: Path, column: str) -> list[str]:
    return [piece.decode() for piece, _ in pieces(path, column)]


@pytest.mark.parametrize("options", [{}, {"lineterminator": "\n", "quoting": csv.QUOTE_ALL}])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_column_by_its_name_or_without_a_header_by_its_number(tmp_path, suffix, options):
    path = table(tmp_path / f"a.{suffix}", **options)
    assert documents(path, "name") == PRESENT
    headless = table(tmp_path / f"b.{suffix}", header=False, **options)
    assert documents(headless, "2") == PRESENT
    (tmp_path / f"c.{suffix}.gz").write_bytes(gzip.compress(b"\xef\xbb\xbf" + path.read_bytes()))
    assert documents(tmp_path / f"c.{suffix}.gz", "id") == [str(number) for number in range(len(NAMES))]


def test_the_number_of_a_column_is_not_taken_for_a_value_of_the_first_row(tmp_path):
    (tmp_path / "classes.csv").write_text("3,Wall St.,ada\n2,Sports,bea\n")
    assert documents(tmp_path / "classes.csv", "3") == ["ada", "bea"]
    (tmp_path / "numbers.csv").write_text("0,1\nada,bea\n")  # as pandas names columns
    assert documents(tmp_path / "numbers.csv", "1") == ["bea"]


@given(rows=st.lists(st.tuples(st.text("a,\"\n\t' é"), st.text("b,\"\n\t'")), min_size=1, max_size=5))
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_every_field_that_pythons_csv_writes_comes_back(tmp_path_factory, suffix, rows):
    path = tmp_path_factory.mktemp("table") / f"a.{suffix}"
    with path.open("w", newline="") as file:
        csv.writer(file, delimiter="," if suffix == "csv" else "\t").writerows([("x", "y"), *rows])
    for index, column in enumerate("xy"):
        assert documents(path, column) == [row[index] for row in rows if row[index]]


def test_a_long_field_is_read_whole(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f'text\n"{"x" * 3_000_000}\n"\n')
    assert read_text(path) == "x" * 3_000_000 + "\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("id,city\n1,Rome\n", "a.csv has no column 'name' (it has: id, city): choose one with --column"),
        ("id;name\n1;Ada\n", "a.csv has no column 'name' (it has: id;name): "),
        ("id,name\n1,Ada\n2,Smith, Jr\n", "line 3 of a.csv has 3 fields, but the first row 2: a field that contains"),
        ('id,name\n1,"A\nda"\n2\n', "line 4 of a.csv has 1 field, but the first row 2"),
        ('id,name\n1,"Ada\n', "line 3 of a.csv is not a row of a table: unexpected end of data"),
        ('id,name\n1,"Ada"x\n', "line 2 of a.csv is not a row of a table: "),
        ("name\x1b[2J\n", "(it has: name\\x1b[2J)"),
        ("", "a.csv is empty"),
        ("id,name\n", "a.csv is empty"),
    ],
)
def test_what_is_wrong_in_a_table_is_named(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    Path("a.csv").write_text(content)
    assert message in fails("train", "-i", "a.csv", "--column", "name", "-o", "run")
    assert not Path("run").exists()


def test_long_headers_are_cut_in_an_error(tmp_path):
    (tmp_path / "a.csv").write_text("x" * 100_000)
    message = fails("train", "-i", tmp_path / "a.csv", "-o", tmp_path / "run")
    assert "has no column 'text' (it has: xxx" in message
    assert len(message) < 500


def test_the_commands_read_the_column_of_the_run_or_another(tmp_path):
    path = table(tmp_path / "people.csv")
    run = tmp_path / "run"
    shown = succeeds("train", "-i", path, "--column", "name", "-o", run, *TINY)
    items = [line for name in NAMES for line in name.split("\n") if line]
    assert f"{len(items)} items (line format, guessed)" in shown
    assert json.loads((run / "checkpoint.json").read_text())["config"]["column"] == "name"
    assert "new" in succeeds("sample", run, "-n", 2)
    on_dev = json.loads(succeeds("eval", run, "--json"))
    assert json.loads(succeeds("eval", run, "--json", "-i", path)) == on_dev  # the training data
    (tmp_path / "names.txt").write_text("\n".join(items))
    assert json.loads(succeeds("eval", run, "--json", "-i", tmp_path / "names.txt")) == on_dev
    other = table(tmp_path / "other.tsv", header=False)
    scored = json.loads(succeeds("score", run, "-i", other, "--column", "2", "--json"))
    assert [item["text"] for item in scored["items"]] == items
    assert "not in the model's vocabulary" in fails("eval", run, "-i", other, "--column", "3")
    assert json.loads(succeeds("eval", run, "-i", other, "--column", "2", "--json")) == on_dev  # the same items
    found = json.loads(succeeds("entropy", path, "--column", "name", "--json"))
    assert found["items"] == len(items)
    succeeds("train", "-i", path, "--column", "name", "-o", run, "--resume", "--max-steps", 4)
    assert "--column id differs from the checkpoint's name" in fails("train", "--column", "id", "-o", run, "--resume")


@needs_module
def test_prepared_cached_and_read_columns_are_the_same_corpus(tmp_path, monkeypatch):
    path = table(tmp_path / "people.csv")
    wanted = build_corpus("\n".join(PRESENT)).digest
    assert read_corpus(path, column="name").digest == wanted
    succeeds("prepare", path, "--column", "name", "-o", tmp_path / "corpus")
    assert charlm.lm.shards.load(tmp_path / "corpus").digest == wanted
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "MIN_BYTES", 1)
    for column in ("name", "city", "name"):
        options = cache.Options(None, 42, False)
        corpus = cache.cached_corpus(path, options, column=column, announce=lambda path: None)
        assert (corpus.digest == wanted) == (column == "name")


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "parquet"])
def test_small_files_of_documents_are_read_as_large_ones(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    if suffix == "parquet":
        arrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.table({"body": NAMES}), path)
    else:
        lines = "".join(f"{json.dumps({'body': name})}\n" for name in NAMES).encode()
        path.write_bytes(gzip.compress(lines) if suffix.endswith("gz") else lines)
    run = charlm.train(path, column="body", max_steps=2, n_embd=2, n_hidden=4, progress=False)
    assert run.corpus.digest == build_corpus("\n".join(NAMES)).digest


def test_a_column_of_data_that_have_none_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("ada\nbea\ncleo\n")
    message = "column chooses a column of a .jsonl, .parquet, .csv or .tsv file, and"
    for arguments in (("-i", tmp_path / "a.txt"), ()):
        error = fails("train", *arguments, "--column", "x", "-o", tmp_path / "run")
        assert f"--{message} {arguments[-1] if arguments else 'names.txt'} is none" in error
    with pytest.raises(UserError, match=f"^{message} the data is none"):
        charlm.train(["ada", "bea", "cleo"], column="x", progress=False)
    assert message in fails("entropy", tmp_path / "a.txt", "--column", "x")
