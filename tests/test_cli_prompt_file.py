"""`charlm sample --prompt FILE:PATH`."""

from __future__ import annotations

import pytest
from lm_support import fails, succeeds, untrained_checkpoint

from charlm.cli.sample import MOST_BYTES
from charlm.lm import checkpoint
from charlm.lm.data import build_corpus

NAMES = [f"{a}{b * n}" for n in range(1, 5) for a in "abcde" for b in "vwxyz"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    texts = {"line": "\n".join(NAMES), "text": "FILE: to be,\nor not to be\n" * 20}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(text)
        corpus = build_corpus(text, format=name)
        checkpoint.save(folder / name, untrained_checkpoint(corpus, input_file=str(folder / f"{name}.txt")))
    return folder


@pytest.mark.parametrize(
    ("format", "content", "prompt"),
    [
        ("line", b"av\n", "av"),  # an item has no newline
        ("line", b"\xef\xbb\xbfav\r\n", "av"),
        ("line", b"", ""),
        ("text", b"to be,\n", "to be,\n"),  # as in nanoGPT, every character counts
    ],
)
def test_a_file_gives_the_samples_of_its_text(tmp_path, runs, format, content, prompt):
    (tmp_path / "a prompt.txt").write_bytes(content)
    samples = succeeds("sample", runs / format, "-n", 2, "--prompt", f"FILE:{tmp_path / 'a prompt.txt'}")
    assert samples == succeeds("sample", runs / format, "-n", 2, "--prompt", prompt)
    assert samples == succeeds("sample", runs / format, "-n", 2, "--prompt", "FILE:-", input=content)


def test_a_prompt_that_begins_with_file_comes_from_standard_input(runs):
    samples = succeeds("sample", runs / "text", "-n", 1, "--prompt", "FILE:-", input="FILE: to")
    assert "\nFILE: to" in samples


def test_a_file_that_is_no_prompt_is_one_sentence(tmp_path, runs):
    for name, content in (("long", b"a" * (MOST_BYTES + 1)), ("latin", "é".encode("latin-1")), ("unknown", b"av\nav")):
        (tmp_path / name).write_bytes(content)
    expected = {
        tmp_path / "none": f"cannot read {tmp_path / 'none'}: No such file",
        tmp_path: f"cannot read {tmp_path}: Is a directory",
        "": "cannot read .: Is a directory",
        tmp_path / "long": "long is too long for a prompt: it has more than 131,072 bytes",
        "/dev/zero": "/dev/zero is too long for a prompt",
        tmp_path / "latin": "latin is not UTF-8: byte 0xe9 at offset 0",
        tmp_path / "unknown": "character '\\n' at position 2 of the prompt (the first is 0) is not in the model's",
    }
    for path, message in expected.items():
        assert message in fails("sample", runs / "line", "--prompt", f"FILE:{path}")
