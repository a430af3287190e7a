"""Samples as text, and the splits that contain them."""

from __future__ import annotations

import pytest
import torch

from charlm._errors import UserError
from charlm.lm.data import build_corpus
from charlm.lm.models import MLP, Bigram
from charlm.lm.sample import SamplingOptions, containing_splits, sample

ITEMS = build_corpus("abc\nab\ncab\nb.c\n" * 10)
TEXT = build_corpus("to be, or not to be: that is the question,\n" * 20, format="text")


def bigram(corpus) -> Bigram:
    model = Bigram(len(corpus.vocabulary), pad_token=corpus.vocabulary.pad_token, add_k=0.01)
    model.fit(corpus.examples("train", 1))
    return model


def test_items_begin_with_the_prompt_and_end_before_the_separator():
    samples = sample(bigram(ITEMS), ITEMS.vocabulary, SamplingOptions(num_samples=50, prompt="ca"))
    assert len(samples) == 50
    assert all(text.startswith("ca") and set(text) <= set("abc.") for text in samples)
    assert {len(text) for text in samples} != {2 + 100}


def test_a_sample_of_running_text_has_the_requested_length():
    options = SamplingOptions(num_samples=2, prompt="to be", max_new_tokens=30)
    samples = sample(bigram(TEXT), TEXT.vocabulary, options)
    assert [len(text) for text in samples] == [35, 35]
    assert all(text.startswith("to be") for text in samples)


def test_equal_seeds_give_equal_samples_and_others_differ():
    def draw(seed):
        torch.manual_seed(torch.seed())
        return sample(bigram(ITEMS), ITEMS.vocabulary, SamplingOptions(seed=seed))

    assert draw(1) == draw(1) != draw(2)


def test_an_unknown_character_of_the_prompt_is_a_user_error():
    model = MLP(len(ITEMS.vocabulary), 3, n_embd=2, n_hidden=4)
    with pytest.raises(UserError, match="'x' at position 1 of the prompt"):
        sample(model, ITEMS.vocabulary, SamplingOptions(prompt="ax"))


@pytest.mark.parametrize("temperature", [1.0, 0.0])
def test_a_model_that_diverged_is_a_user_error(temperature):
    model = MLP(len(ITEMS.vocabulary), 3, n_embd=2, n_hidden=4)
    with torch.no_grad():
        model.embedding.weight[0] = torch.nan
    with pytest.raises(UserError, match="predicts no finite numbers: its training diverged; try a lower"):
        sample(model, ITEMS.vocabulary, SamplingOptions(temperature=temperature))


def test_every_split_that_contains_the_item_is_named():
    corpus = build_corpus("".join(f"{a}{b}\n" for a in "abcdefgh" for b in "ijklmnop"))
    train, dev, test = (corpus.parts[split][0] for split in ("train", "dev", "test"))
    assert containing_splits([train, dev, test, "zz"], corpus) == ["train", "dev", "test", "new"]
    assert set(containing_splits(["ab", "abc"], ITEMS)) <= {"train", "train, dev", "train, test", "train, dev, test"}


@pytest.mark.parametrize(
    "options", [{"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": -0.5}, {"top_k": 0}, {"top_p": 2.0}]
)
def test_options_that_cannot_be_are_user_errors(options):
    with pytest.raises(UserError, match=f"^{next(iter(options))} is .*, but must be "):
        SamplingOptions(**options)
