"""The commands in this process, through typer's runner: output, errors and options."""

from __future__ import annotations

import json
import math
import re
from dataclasses import fields
from pathlib import Path

import pytest
from lm_support import fails, run, succeeds
from typer.testing import CliRunner

import charlm
from charlm.cli import app
from charlm.lm import checkpoint
from charlm.lm.config import Config
from charlm.lm.data import read_text
from charlm.lm.start import FREE_ON_RESUME

SMALL = ["--n-hidden", "16", "--n-embd", "4", "--block-size", "3", "--max-steps", "40", "--batch-size", "16"]
VERSE = "Shall I compare thee to a summer's day?\nThou art more lovely and more temperate:\n"


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("corpus") / "names.txt"
    path.write_text("\n".join(read_text(None).split("\n")[:500]) + "\n")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory, names) -> Path:
    directory = tmp_path_factory.mktemp("trained") / "run"
    succeeds("train", "-i", names, "-o", directory, *SMALL)
    return directory


# ---- train


def test_train_ends_with_the_table_and_20_samples(tmp_path, names):
    output = succeeds("train", "-i", names, "-o", tmp_path / "run", *SMALL)
    lines = output.splitlines()
    assert "500 items (line format, guessed); train 400, dev 50, test 50" in lines[1]
    assert "0 of 50 dev items (0.0%) also occur in train" in output
    rows = [line for line in lines if line.startswith("│")]
    names = [row.split("│")[1].strip() for row in rows]
    assert names[:3] == ["uniform", "unigram", "bigram"]
    assert re.fullmatch(
        r"\d-gram, Kneser–Ney \| the mlp alone \| this model \(mlp \+ \d-gram, step \d+\)", " | ".join(names[3:])
    )
    for row in rows:
        nats, bits, perplexity = (float(cell) for cell in row.split("│")[2:5])
        assert bits == pytest.approx(nats / math.log(2), abs=2e-4)
        assert perplexity == pytest.approx(math.exp(nats), rel=1e-3)
    samples = lines[lines.index(next(line for line in lines if line.startswith("└"))) + 1 :]
    assert len(samples) == 20
    assert all(sample.rsplit("  ", 1)[1] in {"new", "train", "dev", "test"} for sample in samples)


def test_train_prints_a_line_for_each_evaluation_where_there_is_no_terminal(tmp_path, names):
    output = succeeds("train", "-i", names, "-o", tmp_path / "run", *SMALL, "--eval-interval", "10")
    steps = [line.split()[1] for line in output.splitlines() if line.startswith("step ")]
    assert steps == ["10/40", "20/40", "30/40", "40/40"]
    assert "\x1b" not in output


def test_train_on_running_text(tmp_path):
    path = tmp_path / "verse.txt"
    path.write_text(VERSE * 10)
    output = succeeds("train", "-i", path, "-o", tmp_path / "run", *SMALL)
    assert "810 characters (text format, guessed); train 648, dev 81, test 81" in output
    assert "occur in train" not in output


@pytest.mark.parametrize("type", ["uniform", "unigram", "bigram"])
def test_a_count_model_equals_its_row_of_the_table(tmp_path, names, type):
    output = succeeds("train", "-i", names, "-o", tmp_path / "run", "--type", type)
    cells = {line.split("│")[1].strip(): line.split("│")[2:] for line in output.splitlines() if "│" in line}
    ours = next(values for name, values in cells.items() if name.startswith("this model"))
    assert ours == cells[type]


def test_every_field_of_the_config_is_a_flag_with_its_default():
    help_text = CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "200"}).output
    for field in fields(Config):
        assert f"--{field.name.replace('_', '-')}" in help_text


def test_a_trained_folder_is_not_overwritten_by_accident(trained, names):
    before = checkpoint.load(trained)
    assert "add --resume to continue it, or --overwrite to replace it" in fails(
        "train", "-i", names, "-o", trained, *SMALL
    )
    assert checkpoint.load(trained).digest == before.digest


def test_overwrite_replaces_the_run(tmp_path, names):
    for steps in ("10", "20"):
        succeeds("train", "-i", names, "-o", tmp_path / "run", *SMALL, "--max-steps", steps, "--overwrite")
    assert checkpoint.load(tmp_path / "run").step == 20


def test_resume_needs_no_flags_and_can_make_the_run_longer(tmp_path, names):
    succeeds("train", "-i", names, "-o", tmp_path / "run", *SMALL)
    assert "resumed at step 40" in succeeds("train", "-o", tmp_path / "run", "--resume")
    succeeds("train", "-o", tmp_path / "run", "--resume", "--max-steps", "50", "--n-hidden", "16")
    assert checkpoint.load(tmp_path / "run").step == 50


def test_resume_refuses_flags_that_would_change_the_run(trained):
    assert "--n-hidden 17 differs from the checkpoint's 16" in fails(
        "train", "-o", trained, "--resume", "--n-hidden", 17
    )
    assert "exclude each other" in fails("train", "-o", trained, "--resume", "--overwrite")
    assert {field.name for field in fields(Config)} >= FREE_ON_RESUME


def test_resume_without_a_checkpoint_is_an_error(tmp_path):
    assert "there is no checkpoint in" in fails("train", "-o", tmp_path / "nowhere", "--resume")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"ada\n", "has 1 item"),
        (b"ada\n\xff\n", "is not UTF-8: byte 0xff at offset 4"),
        (None, "No such file"),
    ],
)
def test_a_bad_file_is_one_sentence_and_leaves_no_folder(tmp_path, data, words):
    path = tmp_path / "bad.txt"
    if data is not None:
        path.write_bytes(data)
    assert words in fails("train", "-i", path, "-o", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_work_dir_that_is_a_file_is_one_sentence(tmp_path, names):
    (tmp_path / "run").write_text("")
    assert "cannot write" in fails("train", "-i", names, "-o", tmp_path / "run", *SMALL)


@pytest.mark.parametrize(
    "flags", [("--type", "gpt9"), ("--dropout", "1"), ("--device", "abacus"), ("--format", "csv"), ("--max-steps", "0")]
)
def test_a_bad_flag_is_one_sentence(tmp_path, names, flags):
    assert flags[1] in fails("train", "-i", names, "-o", tmp_path / "run", *flags)


# ---- eval


@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_eval_json_is_one_object_of_the_fixed_form(trained, split):
    result = json.loads(succeeds("eval", trained, "--split", split, "--json"))
    assert list(result) == ["split", "protocol", "nats", "bits_per_char", "perplexity", "tokens"]
    assert result["split"] == split
    assert result["bits_per_char"] == pytest.approx(result["nats"] / math.log(2))
    assert result["perplexity"] == pytest.approx(math.exp(result["nats"]))


def test_eval_on_dev_is_the_best_loss_of_training_and_its_tokens_are_the_files(trained, names):
    results = [json.loads(succeeds("eval", trained, "--split", s, "--json")) for s in ("train", "dev", "test")]
    assert results[1]["nats"] == checkpoint.load(trained).best_nats
    assert sum(result["tokens"] for result in results) == len(names.read_bytes())


def test_eval_without_json_is_a_table_with_the_baselines(trained):
    output = succeeds("eval", trained, "--split", "test")
    assert "loss on test" in output
    assert re.search(r"this model \(mlp \+ \d-gram\)", output)
    assert re.search(r"\d-gram, Kneser–Ney", output)


def test_eval_says_when_the_data_is_gone_or_another(tmp_path, names):
    path = tmp_path / "moved.txt"
    path.write_bytes(names.read_bytes())
    succeeds("train", "-i", path, "-o", tmp_path / "run", *SMALL)
    path.write_text(path.read_text() + "zed\n")
    assert "is not the data that the model was trained on" in fails("eval", tmp_path / "run")
    path.unlink()
    assert "No such file" in fails("eval", tmp_path / "run")
    assert json.loads(succeeds("eval", tmp_path / "run", "--json", "-i", names))["split"] == "dev"


def test_eval_of_an_unknown_split_or_folder_is_one_sentence(trained, tmp_path):
    assert "it must be one of train, dev, test" in fails("eval", trained, "--split", "valid")
    assert "there is no checkpoint" in fails("eval", tmp_path / "nowhere")


# ---- sample


def test_samples_begin_with_the_prompt_and_name_their_splits(trained):
    lines = succeeds("sample", trained, "-n", 7, "--prompt", "an").splitlines()
    assert len(lines) == 7
    assert all(line.startswith("an") and line.rsplit("  ", 1)[1] for line in lines)


def test_samples_repeat_with_their_seed(trained):
    first, again, other = (succeeds("sample", trained, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_sampling_flags_reach_the_model(trained):
    certain = {succeeds("sample", trained, "-n", 1, *flags) for flags in ((), ("--seed", 5), ("--seed", 6))}
    assert len(certain) > 1
    for flags in (("--temperature", "0"), ("--top-k", "1"), ("--top-p", "0.0001")):
        assert len({succeeds("sample", trained, "-n", 1, "--seed", seed, *flags) for seed in (5, 6)}) == 1
    short = succeeds("sample", trained, "--max-new-tokens", 1, "-n", 3).splitlines()
    assert all(len(line.split("  ")[0].strip()) <= 1 for line in short)
    assert succeeds("sample", trained, "--top-k", 10_000)


def test_an_unknown_character_of_the_prompt_is_named_with_its_position(trained):
    assert "'ß' at position 2 of the prompt" in fails("sample", trained, "--prompt", "anß")


def test_samples_are_drawn_without_the_data_too(tmp_path, names):
    path = tmp_path / "moved.txt"
    path.write_bytes(names.read_bytes())
    succeeds("train", "-i", path, "-o", tmp_path / "run", *SMALL)
    path.unlink()
    result = run("sample", tmp_path / "run", "-n", 3)
    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 3
    assert "not marked as new or known" in result.stderr


# ---- info


def test_info_prints_every_field_of_build_info():
    output = succeeds("info")
    for name in charlm.build_info():
        assert f"{name.replace('_', ' ')}: " in output
    assert f"charlm: {charlm.__version__}" in output
