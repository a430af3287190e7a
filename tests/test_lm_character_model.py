"""charlm.load: surprisals and samples of a trained model."""

from __future__ import annotations

import doctest
import math
from dataclasses import replace

import pytest
import torch
from lm_support import untrained_checkpoint

import charlm
from charlm import _load
from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.character_model import CharacterModel
from charlm.lm.data import build_corpus, read_text
from charlm.lm.evaluate import evaluate, predictions
from charlm.lm.vocabulary import ESCAPE_PROBABILITY

ITEMS = build_corpus("\n".join(read_text(None).split("\n")[:300]), format="line")
TEXT = build_corpus("to be, or not to be: that is the question,\n" * 20, format="text")


@pytest.fixture(params=["mlp", "bigram"])
def items(request) -> CharacterModel:
    return CharacterModel(untrained_checkpoint(ITEMS, request.param))


@pytest.fixture
def text() -> CharacterModel:
    return CharacterModel(untrained_checkpoint(TEXT))


def test_the_surprisals_of_a_splits_items_average_to_what_eval_says(items):
    dev = ITEMS.parts["dev"]
    found = items.surprisals(dev)
    assert [len(nats) for nats in found] == [len(item) + 1 for item in dev]
    expected = evaluate(items.model, ITEMS.examples("dev", items.model.block_size), "dev")
    assert torch.cat(found).mean().item() == pytest.approx(expected.nats, rel=1e-6)


def test_the_surprisals_of_running_text_average_to_what_eval_says(text):
    found = text.surprisal(TEXT.parts["train"][0])
    expected = evaluate(text.model, TEXT.examples("train", text.model.block_size), "train")
    assert len(found) == expected.tokens
    assert found.mean().item() == pytest.approx(expected.nats, rel=1e-6)


def test_texts_scored_together_do_not_see_each_other(items):
    texts = ["emma", "", "olivia", "a"]
    for together, alone in zip(items.surprisals(texts), map(items.surprisal, texts), strict=True):
        torch.testing.assert_close(together, alone, rtol=1e-6, atol=1e-6)


def test_an_empty_item_is_its_end_and_an_empty_text_is_nothing(items, text):
    assert items.surprisal("").shape == (1,)
    assert text.surprisal("").shape == (0,)
    assert text.log_prob("") == 0
    assert items.surprisals([]) == []


def test_bits_are_nats_over_log_2_and_log_prob_is_the_sum(items):
    nats, bits = (items.surprisal("emma", unit=unit) for unit in ("nats", "bits"))
    assert nats.dtype == torch.float64
    torch.testing.assert_close(bits * math.log(2), nats)
    assert items.log_prob("emma") == pytest.approx(-nats.sum().item())
    assert items.log_prob("emma", unit="bits") == pytest.approx(-bits.sum().item())


def test_the_probabilities_of_all_next_characters_add_up_to_1(items, text):
    for model, spare in ((items, 1), (text, 0)):
        chars = model.vocabulary.chars
        ends = [model.log_prob("") if spare else -math.inf]  # the end of an item is a continuation too
        next_chars = [-model.surprisal(char)[0].item() for char in chars]
        assert sum(map(math.exp, ends + next_chars)) == pytest.approx(1, abs=1e-5)


def test_with_escapes_the_probabilities_of_all_code_points_add_up_to_1(text):
    chars = text.vocabulary.chars
    known = [math.exp(-text.surprisal(char, unknown="escape")[0].item()) for char in chars]
    unknown = math.exp(-text.surprisal("ß", unknown="escape")[0].item())
    assert sum(known) + (0x110000 - len(chars)) * unknown == pytest.approx(1, abs=1e-5)
    assert text.surprisal("😀", unknown="escape") == text.surprisal("ß", unknown="escape")


def test_an_escape_leaves_a_padding_token_in_the_context(text):
    pad = text.vocabulary.itos[text.vocabulary.pad_token]
    assert pad == "\n"
    escaped, padded = text.surprisal("to ße", unknown="escape"), text.surprisal(f"to {pad}e")
    torch.testing.assert_close(escaped[4], padded[4] - math.log1p(-ESCAPE_PROBABILITY))
    assert escaped[3] != padded[3]


def test_without_unknown_characters_escapes_cost_a_known_and_small_amount(items):
    difference = items.surprisal("emma", unknown="escape", unit="bits") - items.surprisal("emma", unit="bits")
    torch.testing.assert_close(difference, torch.full((5,), -math.log2(1 - 2**-12), dtype=torch.float64))


def test_an_unknown_character_is_named_with_its_position(items, text):
    for model in (items, text):
        with pytest.raises(UserError, match="'ß' at position 2 of the text"):
            model.surprisal("to"[:1] * 2 + "ß")


def test_an_unknown_character_behind_a_long_beginning_is_named_with_its_position(text):
    before = "to be, " * 3  # longer than block_size
    with pytest.raises(UserError, match="'Q' at position 22 of the text"):
        text.continued_surprisal(before, "oQ")
    with pytest.raises(UserError, match="'Q' at position 20 of the text"):
        text.next_log_probs(f"{before[:-1]}Q")


def test_a_unit_or_choice_that_does_not_exist_is_a_user_error(items):
    with pytest.raises(UserError, match="unit is 'bans', but must be nats or bits"):
        items.surprisal("a", unit="bans")
    with pytest.raises(UserError, match="unknown is 'skip', but must be error or escape"):
        items.surprisal("a", unknown="skip")


def test_generate_takes_the_options_of_sampling(items):
    first, again = (items.generate("em", 4, seed=5, top_k=5) for _ in range(2))
    assert first == again
    assert len(first) == 4
    assert all(text.startswith("em") for text in first)
    assert len(set(items.generate(num_samples=3, temperature=0))) == 1
    with pytest.raises(UserError, match="top_k is 0"):
        items.generate(top_k=0)


def test_encode_and_decode_are_inverse(items, text):
    assert items.decode(items.encode("emma")) == "emma"
    assert text.decode(text.encode("to be,\n").tolist()) == "to be,\n"


def test_the_documented_example_prints_what_it_says(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "out", untrained_checkpoint(ITEMS))
    monkeypatch.chdir(tmp_path)
    result = doctest.testmod(_load)
    assert result.attempted >= 4
    assert result.failed == 0


def test_load_takes_a_path_or_a_string_and_says_what_is_wrong(tmp_path):
    checkpoint.save(tmp_path / "out", untrained_checkpoint(TEXT))
    for directory in (tmp_path / "out", str(tmp_path / "out")):
        model = charlm.load(directory)
        assert (model.format, model.config.block_size, len(model.vocabulary)) == ("text", 4, len(TEXT.vocabulary))
        assert not model.model.training
    with pytest.raises(UserError, match="there is no checkpoint"):
        charlm.load(tmp_path / "nowhere")
    with pytest.raises(UserError, match="device 'abacus' cannot be used"):
        charlm.load(tmp_path / "out", device="abacus")


@pytest.mark.parametrize("type", ["mlp", "bow", "gru", "gpt", "bigram"])
@pytest.mark.parametrize("protocol", ["sliding", "fixed"])
@pytest.mark.parametrize("size", [1, 7, 64, 1000])
def test_a_text_in_pieces_is_scored_as_the_whole(type, protocol, size, monkeypatch):
    model = CharacterModel(untrained_checkpoint(TEXT, type, block_size=4, n_embd=4, n_head=2))
    whole = TEXT.parts["train"][0]
    nats = model.surprisal(whole, protocol=protocol)
    if (
        protocol != "sliding" or not model.model.predicts_every_position
    ):  # there eval sees block_size paddings before the text, and this one
        expected = evaluate(model.model, predictions(model.model, TEXT, "train", protocol), "train")
        assert nats.mean().item() == pytest.approx(expected.nats, rel=1e-6)
    monkeypatch.setattr("charlm.lm.character_model.MAX_CONTEXT_TOKENS", 100)
    torch.testing.assert_close(model.surprisal(whole, protocol=protocol), nats, rtol=1e-5, atol=1e-6)
    pieces = (whole[at : at + size] for at in range(0, len(whole), size))
    total, count = model.total_surprisal(pieces, protocol=protocol)
    assert count == len(whole)
    assert total == pytest.approx(nats.sum().item(), rel=1e-6)


@pytest.mark.parametrize("type", ["mlp", "bow", "gru", "gpt"])
def test_items_in_pieces_are_scored_as_the_items(type, monkeypatch):
    model = CharacterModel(untrained_checkpoint(ITEMS, type, block_size=4, n_embd=4, n_head=2))
    items = [*ITEMS.parts["train"][:40], "a" * 50, "e"]
    nats = torch.cat(model.surprisals(items))
    monkeypatch.setattr("charlm.lm.character_model.MAX_CONTEXT_TOKENS", 100)
    torch.testing.assert_close(torch.cat(model.surprisals(items)), nats, rtol=1e-5, atol=1e-6)
    whole = "\n\n".join(items)
    total, count = model.total_surprisal(whole[at : at + 3] for at in range(0, len(whole), 3))
    assert count == len(nats)
    assert total == pytest.approx(nats.sum().item(), rel=1e-6)
    monkeypatch.setattr("charlm.lm.character_model.MAX_ITEM_CHARACTERS", 20)
    with pytest.raises(UserError, match="a line has more than 20 characters"):
        model.total_surprisal(["ava\n" * 10, "a" * 15, "a" * 15])


def test_the_repr_says_what_the_model_is(items):
    trained = replace(untrained_checkpoint(ITEMS, input_file="names.txt"), best_nats=2.12345)
    size = sum(parameter.numel() for parameter in trained.build_model().parameters())
    tokens = len(ITEMS.vocabulary)
    assert repr(CharacterModel(trained)) == (
        f"<charlm mlp: {size:,} parameters, {tokens} tokens, line format, 'names.txt', 2.1235 nats on dev>"
    )
    assert repr(items).endswith("line format, the names shipped with charlm>")


def test_a_str_instead_of_a_sequence_of_texts_is_refused(items):
    with pytest.raises(TypeError, match="surprisals\\(\\) takes a sequence of texts, not str"):
        items.surprisals("emma")
