"""`--init-from DIR`: a run that begins with the weights of another one."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from lm_support import fails, succeeds, untrained_checkpoint

import charlm
from charlm import UserError
from charlm.lm import checkpoint
from charlm.lm.config import NETWORKS, Config
from charlm.lm.data import build_corpus
from charlm.lm.init_from import copy_weights
from charlm.lm.models import Mixture, build_model
from charlm.lm.vocabulary import Vocabulary

NAMES = [f"{a}{b * n}" for n in range(1, 9) for a in "abcde" for b in "vwxyz"]
OTHERS = [f"{a}{b * n}" for n in range(1, 9) for a in "abéö" for b in "vwxy\u0001"]
TINY = {"type": "mlp", "n_embd": 3, "n_hidden": 8, "block_size": 4, "max_steps": 2, "progress": False}
FREE = {"max_steps": 2, "progress": False}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "run"
    charlm.train(NAMES, folder, dropout=0.2, **TINY)
    return folder


@pytest.mark.parametrize("type", NETWORKS)
@pytest.mark.parametrize("separator", [True, False])
def test_known_characters_keep_their_rows_and_new_ones_are_fresh(type, separator):
    old, new = Vocabulary("abcdef", separator), Vocabulary("bcé", separator)
    corpus = replace(build_corpus("abc\ndef\nabc", format="line" if separator else "text"), vocabulary=old)
    saved = untrained_checkpoint(corpus, type, n_embd=4, mix_ngram=2)
    torch.manual_seed(0)
    network = build_model(**{**saved.model, "mix_ngram": 0, "vocab_size": len(new), "pad_token": 0})
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert "2 characters of the data are known and 1 are new ('é'), and 4 of" in copy_weights(saved, network, new)
    rows = 0
    for name, tensor in network.state_dict().items():
        theirs = saved.weights[f"network.{name}"]
        if tensor.shape == theirs.shape:
            assert torch.equal(tensor, theirs)
            continue
        rows += 1
        for char in "bc":
            assert torch.equal(tensor[new.stoi[char]], theirs[old.stoi[char]])
        assert torch.equal(tensor[new.stoi["é"]], before[name][new.stoi["é"]])
        assert not separator or torch.equal(tensor[0], theirs[0])
    assert rows == (1 if type == "gpt" else 3)  # the embedding; weight and bias of the head


def test_a_run_begins_with_the_loss_of_the_other_on_the_same_data(tmp_path, base):
    other = charlm.load(base)
    run = charlm.train(NAMES, tmp_path / "run", init_from=base, learning_rate=1e-9, mix_ngram=0, **FREE)
    nats = charlm.lm.evaluate_on(other.model.network, run.corpus, "dev")[0].nats
    assert run.evaluation.nats == pytest.approx(nats, abs=1e-5)
    assert (run.step, run.config.type, run.config.block_size, run.config.n_hidden) == (2, "mlp", 4, 8)
    assert run.config.dropout == 0.2
    assert run.config.init_from == str(base)


def test_the_command_and_the_call_train_the_same_on_new_characters(tmp_path, base):
    (tmp_path / "others.txt").write_text("\n".join(OTHERS))
    shown = succeeds(
        "train", "-i", tmp_path / "others.txt", "--init-from", base, "-o", tmp_path / "run", "--max-steps", 2
    )
    assert "6 characters of the data are known and 3 are new ('\\x01', 'é', 'ö'), and 4 of that" in shown
    run = charlm.train(OTHERS, init_from=str(base), **FREE)
    saved = checkpoint.load(tmp_path / "run")
    model = saved.build_model()
    assert isinstance(model, Mixture)  # its n-gram has counted the new data
    assert model.ngram.vocab_size == len(build_corpus("\n".join(OTHERS)).vocabulary)
    assert all(torch.equal(tensor, run.model.model.state_dict()[name]) for name, tensor in model.state_dict().items())
    manifest = json.loads((tmp_path / "run" / "checkpoint.json").read_text())
    assert manifest["config"]["init_from"] == str(base)
    (start,) = manifest["commands"]
    assert f"--init-from {base}" in start["command"]
    assert start["init_from"].startswith(f"{base}: mlp of step 2, trained on data ")
    again = ("train", "--init-from", base, "-o", tmp_path / "run", "--max-steps", 3, "--resume")
    assert "resumed at step 2" in succeeds(*again)
    charlm.train(directory=tmp_path / "run", init_from=base, resume=True, max_steps=4, progress=False)
    assert len(checkpoint.load(tmp_path / "run").commands) == 3


def test_the_replaced_run_may_be_the_one_that_it_begins_with(tmp_path):
    charlm.train(NAMES, tmp_path / "run", **TINY)
    run = charlm.train(NAMES, tmp_path / "run", init_from=tmp_path / "run", overwrite=True, **FREE)
    assert run.finished


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "gru"}, "type gru contradicts the mlp of the model in"),
        ({"n_hidden": 9}, "n_hidden 9 contradicts the 8 of the model in"),
        ({"batch_norm": True}, "batch_norm True contradicts the False of the model in"),
        ({"n_head": 2}, "mlp does not have these options"),
        (
            {"format": "text"},
            "init_from: that model is of format line, but the data are read in format text: choose format line",
        ),
        ({"init_from": "nowhere"}, "there is no checkpoint in nowhere"),
    ],
)
def test_what_contradicts_the_model_is_named(tmp_path, base, options, message):
    with pytest.raises(UserError, match=message):
        charlm.train(NAMES, tmp_path / "run", **{"init_from": base, **FREE, **options})
    assert not (tmp_path / "run").exists()


def test_other_alphabets_and_count_models_are_refused(tmp_path, base):
    with pytest.raises(UserError, match="no character of the data is in the vocabulary of that model"):
        charlm.train([f"{a}{b}" for a in "éèê" for b in "öäü"], init_from=base, **FREE)
    checkpoint.save(tmp_path / "counts", untrained_checkpoint(build_corpus("\n".join(NAMES)), "bigram"))
    assert "is of type bigram, which counts" in fails(
        "train", "--init-from", tmp_path / "counts", "-o", tmp_path / "run"
    )
    assert "--type bigram contradicts the mlp" in fails(
        "train", "--type", "bigram", "--init-from", base, "-o", tmp_path
    )


def test_a_config_of_an_earlier_version_has_no_init_from():
    values = {name: value for name, value in Config().to_dict().items() if name not in ("init_from", "column")}
    assert Config.from_dict(values) == Config()
