"""charlm compare: the losses are those of eval, the standard errors those of the items."""

from __future__ import annotations

import json
import math

import pytest
import torch
from lm_support import fails, succeeds, untrained_checkpoint

from charlm.lm import checkpoint
from charlm.lm.data import build_corpus, read_corpus, read_text
from charlm.lm.evaluate import BLOCK, measure, standard_error, unit_of_each

NAMES = "\n".join(read_text(None).split("\n")[:400]) + "\n"
KNESER_NEY = "5-gram, Kneser–Ney"


@pytest.fixture(scope="module")
def names(tmp_path_factory):
    path = tmp_path_factory.mktemp("corpus") / "names.txt"
    path.write_text(NAMES)
    return path


@pytest.fixture(scope="module")
def runs(tmp_path_factory, names):
    """Folders of two models of one split, of one of the same names split otherwise."""
    folder = tmp_path_factory.mktemp("runs")
    for name, seed, type in (("wide", 42, "mlp"), ("bigram", 42, "bigram"), ("other", 7, "mlp")):
        corpus = read_corpus(names, seed=seed)
        settings = {"input_file": str(names), "split_seed": seed}
        checkpoint.save(folder / name, untrained_checkpoint(corpus, type, **settings))
    return folder


@pytest.mark.parametrize("split", ["dev", "test"])
def test_the_losses_are_those_of_eval(runs, split):
    result = json.loads(succeeds("compare", runs / "wide", runs / "bigram", "--split", split, "--json"))
    assert [model["name"] for model in result["models"]] == [str(runs / "wide"), str(runs / "bigram")]
    for model in result["models"]:
        expected = json.loads(succeeds("eval", model["name"], "--split", split, "--json"))
        assert model["nats"] == pytest.approx(expected["nats"], rel=1e-12)
        assert result["tokens"] == expected["tokens"]
        assert result["split"] == expected["split"]


def test_json_has_the_fixed_form(runs):
    printed = succeeds("compare", runs / "wide", "--baselines", "--json")
    assert printed.count("\n") == 1
    result = json.loads(printed)
    assert list(result) == ["split", "tokens", "standard_error_over", "models"]
    assert result["standard_error_over"] == "items"
    assert [model["type"] for model in result["models"]] == ["uniform", "unigram", "bigram", KNESER_NEY, "mlp"]
    for model in result["models"]:
        assert list(model) == [
            *("name", "type", "protocol", "nats", "bits_per_char", "perplexity"),
            *("standard_error", "parameters", "evaluation_seconds"),
        ]
        assert model["bits_per_char"] == pytest.approx(model["nats"] / math.log(2))
        assert model["evaluation_seconds"] > 0
    assert [model["parameters"] > 0 for model in result["models"]] == [False, False, False, False, True]


def test_the_table_has_a_row_for_each_model_and_says_what_it_shows(runs):
    output = succeeds("compare", runs / "wide", "--baselines", env={"COLUMNS": "200"})
    assert "± is one standard error over items; seconds are the time of this evaluation" in output
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in output.splitlines() if line.startswith("│")]
    assert [row[0] for row in rows] == ["uniform", "unigram", "bigram", KNESER_NEY, f"{runs / 'wide'} (mlp)"]
    assert rows[0][2] == "0.0000"  # every item costs uniform the same for each of its characters


def test_models_of_another_split_are_refused_by_name(runs):
    assert f"{runs / 'other'} was trained on other data, or another split of it, than {runs / 'wide'}" in fails(
        "compare", runs / "wide", runs / "other"
    )
    assert "it must be one of train, dev, test" in fails("compare", runs / "wide", "--split", "valid")


def test_the_standard_error_is_the_ordinary_one_where_every_unit_is_one_token():
    nats = torch.rand(50, dtype=torch.float64)
    assert standard_error(nats, torch.arange(50)) == pytest.approx((nats.std() / 50**0.5).item())


def test_the_standard_error_over_items_is_the_spread_of_resampled_means():
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(2, 9, (400,), generator=generator)
    units = torch.repeat_interleave(torch.arange(400), lengths)
    own = torch.randn(400, generator=generator, dtype=torch.float64)  # what the tokens of an item have in common
    nats = 2 + own[units] + 0.3 * torch.randn(len(units), generator=generator, dtype=torch.float64)
    sums = torch.zeros(400, dtype=torch.float64).index_add_(0, units, nats)
    drawn = torch.randint(400, (4000, 400), generator=generator)  # the bootstrap: items with replacement
    means = sums[drawn].sum(1) / lengths[drawn].sum(1)
    assert standard_error(nats, units) == pytest.approx(means.std().item(), rel=0.05)
    assert standard_error(nats, torch.arange(len(nats))) < 0.7 * standard_error(nats, units)


def test_an_item_with_its_end_is_a_unit_and_so_is_a_block_of_text():
    items = build_corpus("ada\nbo\ncleo\n" * 10)
    expected = [number for number, item in enumerate(items.parts["dev"]) for _ in range(len(item) + 1)]
    assert unit_of_each(items.examples("dev", 1)).tolist() == expected
    text = build_corpus("to be or not to be\n" * 300, format="text").examples("dev", 1)
    counts = unit_of_each(text.slice(0, 2 * BLOCK + 1)).unique_consecutive(return_counts=True)[1]
    assert counts.tolist() == [BLOCK, BLOCK, 1]


def test_one_unit_has_no_standard_error():
    corpus = build_corpus("to be or not to be\n" * 3, format="text")
    model = untrained_checkpoint(corpus).build_model()
    row = measure("here", "mlp", model, corpus, "dev")
    assert math.isnan(row.standard_error)
    assert row.to_json()["standard_error"] is None
