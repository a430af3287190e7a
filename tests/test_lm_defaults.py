"""The defaults of a run follow its corpus and the options that are given."""

from __future__ import annotations

import random

import pytest

from charlm._errors import UserError
from charlm.lm.config import NETWORKS, Config
from charlm.lm.data import build_corpus, read_corpus
from charlm.lm.defaults import config_for, default_type
from charlm.lm.models import MODELS

NAMES = read_corpus(None)
TEXT = build_corpus("In the beginning God created the heaven and the earth. " * 40, format="text")
DRAW = random.Random(0)
HAN = [chr(code) for code in range(0x4E00, 0x4E00 + 2000)]
WORDS = build_corpus("\n".join(a + b for a, b in zip(HAN, reversed(HAN), strict=True)))
MANY = build_corpus("\n".join("".join(DRAW.choices("abcdefghij", k=9)) for _ in range(60_000)))


@pytest.mark.parametrize(
    ("corpus", "type"),
    [(NAMES, "mlp"), (TEXT, "gru"), (WORDS, "gru"), (MANY, "gru")],
    ids=["names", "text", "han", "many"],
)
def test_the_type_follows_size_format_and_alphabet(corpus, type):
    assert default_type(corpus) == type
    config = config_for(corpus, {})
    assert config.type == type
    assert config.mix_ngram is None  # chosen when training begins


@pytest.mark.parametrize("type", list(MODELS))
def test_a_given_type_is_taken_and_only_networks_are_mixed(type):
    for corpus in (NAMES, TEXT):
        config = config_for(corpus, {"type": type})
        assert config.type == type
        assert config.mix_ngram == (None if type in NETWORKS else 0)


def test_on_names_a_network_has_the_defaults_of_its_type():
    assert config_for(NAMES, {"mix_ngram": 0}) == Config()
    assert config_for(NAMES, {"type": "gpt", "mix_ngram": 0}) == Config.of_type("gpt")


def test_given_options_override_the_defaults():
    config = config_for(TEXT, {"max_steps": 7, "n_hidden": 5, "mix_ngram": 3})
    assert (config.max_steps, config.n_hidden, config.mix_ngram) == (7, 5, 3)


def test_the_type_is_one_that_has_the_given_options():
    assert config_for(NAMES, {"n_layer": 2}).type == "gru"
    assert config_for(TEXT, {"batch_norm": True}).type == "mlp"
    with pytest.raises(UserError, match=r"mlp does not have these options .*: --n-head \(gpt\)"):
        config_for(NAMES, {"n_head": 2})


@pytest.mark.parametrize(("length", "rows", "width"), [(1, 256, 16), (9, 128, 16), (40, 32, 41), (200, 8, 64)])
def test_a_batch_of_a_recurrent_network_has_about_1200_tokens(length, rows, width):
    corpus = build_corpus("\n".join("".join(DRAW.choices("abc", k=length)) for _ in range(50)), format="line")
    config = config_for(corpus, {"type": "gru"})
    assert config.batch_size == rows
    assert config.block_size == width
