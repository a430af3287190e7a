"""charlm eval on a text that the model was not trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from lm_support import fails, succeeds, untrained_checkpoint

import charlm
from charlm.lm import checkpoint
from charlm.lm.data import read_corpus

NAMES = "emma\nolivia\nava\nisabella\n" * 10
OTHER = "ava\nlisa\nsam\n"
VERSE = "to be, or not to be:\nthat is the question\n" * 20
FOREIGN = "it is not the question:\nto be!\n"


@pytest.fixture(params=["mlp", "gru", "gpt", "bigram"])
def run_of(request, tmp_path):
    """Saves an untrained model of a text: its folder."""

    def save(text: str, format: str) -> Path:
        path = tmp_path / "data.txt"
        path.write_text(text, encoding="utf-8")
        model = untrained_checkpoint(
            read_corpus(path, format=format), request.param, input_file=str(path), n_embd=4, n_head=2
        )
        checkpoint.save(tmp_path / "run", model)
        return tmp_path / "run"

    return save


def evaluated(*arguments: str | Path, **options) -> dict:
    return json.loads(succeeds("eval", *arguments, "--json", **options))


def test_items_of_another_file_cost_what_score_says(run_of, tmp_path):
    run = run_of(NAMES, "line")
    path = tmp_path / "other.txt"
    path.write_text(OTHER)
    found = evaluated(run, "-i", path)
    scored = json.loads(succeeds("score", run, "-i", path, "--json"))
    assert found["split"] == "all"
    assert found["tokens"] == scored["characters"] == len(OTHER)
    assert found["bits_per_char"] == pytest.approx(scored["bits_per_char"], rel=1e-6)
    assert found["input_file"] == str(path)
    assert found["unknown_characters"] == 0
    assert evaluated(run, "-i", path, "--split", "all") == found
    assert evaluated(run, "-i", path, "--split", "test")["tokens"] < len(OTHER)
    report = " ".join(succeeds("eval", run, "-i", path).split())
    assert f"loss on all of {path}, which the model was not trained on, 13 tokens, each item on its own" in report
    assert "uniform" not in report


@pytest.mark.parametrize("protocol", ["sliding", "fixed"])
def test_another_text_is_evaluated_in_either_protocol_with_its_unknown_characters(run_of, tmp_path, protocol):
    run = run_of(VERSE, "text")
    path = tmp_path / "other.txt"
    path.write_text(FOREIGN)
    message = fails("eval", run, "-i", path)
    assert "character '!' at position 29 of the text (the first is 0) is not in the model's vocabulary;" in message
    assert "--unknown escape scores unknown characters instead" in message
    flags = ("--unknown", "escape", "--protocol", protocol)
    found = evaluated(run, "-i", path, *flags)
    assert found["unknown_characters"] == 1
    assert found["protocol"] == protocol
    scored = json.loads(succeeds("score", run, "-i", path, *flags, "--json"))
    tolerance = 1e-2 if charlm.load(run).model.predicts_every_position and protocol == "sliding" else 1e-6
    assert found["tokens"] == scored["characters"] == len(FOREIGN)
    assert found["bits_per_char"] == pytest.approx(scored["bits_per_char"], rel=tolerance)
    assert "31 tokens, 1 of them unknown characters" in succeeds("eval", run, "-i", path, *flags)


def test_escapes_among_items_leave_their_ends_alone(run_of, tmp_path):
    run = run_of(NAMES, "line")
    path = tmp_path / "other.txt"
    path.write_text("ava\nzoë\nE\n")
    assert (
        "'z' at position 3 of the items (the first is 0) is not in the model's vocabulary (nor are 'E', 'ë')"
        in fails("eval", run, "-i", path)
    )
    found = evaluated(run, "-i", path, "--unknown", "escape")
    scored = json.loads(succeeds("score", run, "-i", path, "--unknown", "escape", "--json"))
    assert found["unknown_characters"] == 3
    assert found["bits_per_char"] == pytest.approx(scored["bits_per_char"], rel=1e-6)


def test_the_data_of_the_training_is_known_wherever_it_is(run_of, tmp_path):
    run = run_of(NAMES, "line")
    moved = (tmp_path / "data.txt").rename(tmp_path / "moved.txt")
    found = evaluated(run, "-i", moved)
    assert set(found) == {"split", "protocol", "nats", "bits_per_char", "perplexity", "tokens"}
    assert found["split"] == "dev"
    assert "uniform" in succeeds("eval", run, "-i", moved)
    assert "No such file" in fails("eval", run)
    assert "unknown split 'all': it must be one of train, dev, test" in fails(
        "eval", run, "-i", moved, "--split", "all"
    )


@pytest.mark.parametrize(
    ("data", "flags", "words"),
    [
        ("", (), "other.txt is empty"),
        ("\n \n", (), "other.txt is empty"),
        ("ava\n", ("--split", "dev"), "has 1 item, but train, dev and test need one each"),
        ("ava\n", ("--split", "valid"), "unknown split 'valid'"),
        ("ava\n", ("--unknown", "drop"), "unknown is 'drop', but must be error or escape"),
        ("ava\n", ("--protocol", "fixed"), "is for running text"),
    ],
)
def test_what_cannot_be_evaluated_is_one_sentence(run_of, tmp_path, data, flags, words):
    run = run_of(NAMES, "line")
    (tmp_path / "other.txt").write_text(data)
    assert words in fails("eval", run, "-i", tmp_path / "other.txt", *flags)


def test_one_item_can_be_evaluated(run_of, tmp_path):
    run = run_of(NAMES, "line")
    assert evaluated(run, "-i", "-", input="ava\n")["tokens"] == 4
