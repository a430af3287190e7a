"""Documents from files of text, .jsonl and .parquet, whole or divided among readers."""

from __future__ import annotations

import gzip
import json
from itertools import chain, islice
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_support import fails, succeeds

from charlm import _ext
from charlm._errors import UserError
from charlm.lm.data import build_corpus, decode_text, utf8_blocks
from charlm.lm.shards import load
from charlm.lm.sources import Documents, find_inputs, pieces, text_of

DOCUMENTS = ["Shall I compare thee\nto a summer's day?", "Thou art more lovely\n", "né à 東京 🎉", "", "d" * 3000]
needs_module = pytest.mark.skipif(_ext._C is None, reason="preparing needs the compiled module")


def write(path: Path, documents: list[str], column: str = "text") -> Path:
    """Writes documents in the format that the name of the file says."""
    rows = [{"id": i, column: document} for i, document in enumerate(documents)]
    if path.suffix == ".parquet":
        arrow = pytest.importorskip("pyarrow")
        parquet = pytest.importorskip("pyarrow.parquet")
        parquet.write_table(arrow.Table.from_pylist(rows), path)
        return path
    data = "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if path.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_documents_come_back_as_they_were_written(tmp_path, name):
    path = write(tmp_path / name, DOCUMENTS * 500, "body")
    assert list(Documents([path], "body")) == DOCUMENTS * 500


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("x" * 3_000_000 + "\n\nend")
    assert list(Documents([tmp_path / "a.txt"])) == ["x" * 3_000_000 + "\n\nend"]
    assert len(list(pieces(tmp_path / "a.txt"))) > 2


@pytest.mark.parametrize("separator", ["\n", "<|end|>"])
def test_documents_are_joined_by_a_separator_that_is_not_doubled(tmp_path, separator):
    path = write(tmp_path / "a.jsonl", ["ada", f"bea{separator}", "cleo"])
    assert b"".join(text_of([path, path], separator=separator)).decode() == separator.join(["ada", "bea", "cleo"] * 2)


@needs_module
@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.parquet"])
def test_prepared_documents_are_the_corpus_of_their_text(tmp_path, name):
    path = write(tmp_path / name, DOCUMENTS * 3, "body")
    options = ("--column", "body", "--document-separator", "¶\n")
    succeeds("prepare", path, "-o", tmp_path / "corpus", *options)
    assert load(tmp_path / "corpus").digest == build_corpus("¶\n".join(DOCUMENTS * 3)).digest


# ---- several readers


@pytest.mark.parametrize("parts", [1, 2, 3, 7])
def test_parts_hold_each_document_once(tmp_path, parts):
    paths = [write(tmp_path / f"{i}.jsonl", [f"{i}.{j}" for j in range(i + 3)]) for i in range(4)]
    found = [list(Documents(paths, part=part, parts=parts)) for part in range(parts)]
    assert sorted(chain(*found)) == sorted(Documents(paths))
    assert max(map(len, found)) - min(map(len, found)) <= len(paths)


def test_a_reader_goes_on_behind_its_last_document(tmp_path):
    paths = [write(tmp_path / f"{i}.jsonl", [f"{i}.{j}" for j in range(5)]) for i in range(3)]
    for part in range(2):
        whole = list(Documents(paths, part=part, parts=2))
        for read in range(len(whole) + 1):
            reader = Documents(paths, part=part, parts=2)
            before = list(islice(reader, read))
            state = json.loads(json.dumps(reader.state))
            assert before + list(Documents(paths, part=part, parts=2, state=state)) == whole


def test_a_part_that_does_not_exist_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="part is 2, but must be at least 0 and below 2"):
        Documents([tmp_path], part=2, parts=2)


# ---- bad input


def test_globs_are_sorted_and_missing_files_named(tmp_path):
    for name in "cab":
        (tmp_path / f"{name}.txt").write_text(name)
    assert [path.stem for path in find_inputs([str(tmp_path / "*.txt")])] == ["a", "b", "c"]
    for pattern, error in (("*.md", "no file matches"), ("d.txt", "No such file")):
        with pytest.raises(UserError, match=error):
            find_inputs([str(tmp_path / pattern)])


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ('{"text": "a"', "line 2 of a.jsonl is not JSON"),
        ('{"body": "a"}', "line 2 of a.jsonl has no column 'text' (it has: body)"),
        ('["text"]', "line 2 of a.jsonl has no column 'text' (it has: list)"),
        ('{"text": 3}', "column 'text' in line 2 of a.jsonl is int, not text"),
    ],
)
@needs_module
def test_a_bad_line_is_named_with_its_file(tmp_path, monkeypatch, line, error):
    monkeypatch.chdir(tmp_path)
    Path("a.jsonl").write_text(f'{{"text": "fine"}}\n{line}\n')
    assert error in fails("prepare", "a.jsonl", "-o", "corpus")
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@needs_module
def test_a_parquet_file_without_the_column_or_damaged_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"], "body")
    assert "a.parquet has no column 'text' (it has: id, body)" in fails("prepare", path, "-o", tmp_path / "corpus")
    assert "column 'id' of" in fails("prepare", path, "-o", tmp_path / "corpus", "--column", "id")
    path.write_bytes(b"PAR1" * 9)
    assert "a.parquet is damaged or not a .parquet file" in fails("prepare", path, "-o", tmp_path / "corpus")


@needs_module
def test_a_damaged_zst_file_is_named(tmp_path):
    pytest.importorskip("zstandard")
    (tmp_path / "a.zst").write_bytes(b"no zstd")
    assert "a.zst is damaged or not a .zst file" in fails("prepare", tmp_path / "a.zst", "-o", tmp_path / "corpus")


@needs_module
@needs_module
@pytest.mark.parametrize("kept", [10, 0.5, -1])
def test_a_zst_file_that_is_cut_is_refused(tmp_path, kept):
    whole = pytest.importorskip("zstandard").compress(bytes(range(97, 123)) * 50_000)
    path = tmp_path / "a.txt.zst"
    path.write_bytes(whole + whole)
    assert b"".join(text_of([path])) == bytes(range(97, 123)) * 100_000
    path.write_bytes(whole + whole[: kept if isinstance(kept, int) else int(kept * len(whole))])
    assert "it ends within a frame" in fails("prepare", path, "-o", tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()


def test_newlines_of_a_parquet_file_are_plain_and_a_broken_one_is_named(tmp_path):
    path = write(tmp_path / "a.parquet", ["one\r\ntwo\rthree"])
    assert b"".join(text_of([path])) == b"one\ntwo\nthree"
    path.write_bytes(b"PAR1" + bytes(40) + b"PAR1")
    with pytest.raises(UserError, match=r"is damaged or not a \.parquet file"):
        list(text_of([path]))


def test_json_of_any_depth_and_a_separator_that_is_no_text_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text("[" * 200_000)
    with pytest.raises(UserError, match="is not JSON"):
        list(text_of([path]))
    with pytest.raises(UserError, match="separator is not text"):
        list(text_of([path], separator="\udcff"))


@needs_module
@pytest.mark.parametrize(("name", "package"), [("a.zst", "zstandard"), ("a.parquet", "pyarrow")])
def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch, name, package):
    monkeypatch.setattr("charlm._extras.find_spec", lambda package: None)
    (tmp_path / name).write_bytes(b"x")
    error = fails("prepare", tmp_path / name, "-o", tmp_path / "corpus")
    assert f"{name} needs {package}, which the extra data installs: pip install" in error


def test_half_a_character_is_refused_and_newlines_are_plain(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text(r'{"text": "one\r\ntwo\rthree"}' + "\n")
    assert b"".join(text_of([path])) == b"one\ntwo\nthree"
    path.write_text(r'{"text": "cut \ud83d"}' + "\n")
    with pytest.raises(UserError, match=r"line 1 of .* is not text"):
        list(text_of([path]))


@given(text=st.text(st.sampled_from("a\n\r\ufeffé€😀"), max_size=12), sizes=st.lists(st.integers(4, 7), max_size=9))
@pytest.mark.parametrize("has_module", [True, False])
def test_blocks_of_any_size_give_the_text(has_module: bool, text: str, sizes: list[int]) -> None:
    raw, blocks, at = text.encode(), [], 0
    for size in [*sizes, len(raw)]:
        blocks.append(raw[at : at + size])
        at += size
    with pytest.MonkeyPatch.context() as patch:
        if not has_module:
            patch.setattr(_ext, "_C", None)
        pieces = list(utf8_blocks(filter(None, blocks), "the text"))
        assert b"".join(pieces).decode() == decode_text(raw, "the text")
    for piece in pieces:
        piece.decode()  # whole characters
