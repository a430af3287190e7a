"""charlm report: its numbers are those of the other commands, and bad input is a sentence or the right picture."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_support import fails, succeeds
from report_support import HOSTILE, NAMES, body_of, figures_of, page_of, train

import charlm
from charlm import _extras
from charlm.information import conditional_entropies
from charlm.lm import checkpoint
from charlm.lm.data import build_corpus
from charlm.lm.diagnostics import DIAGNOSTICS
from charlm.lm.optimizer import learning_rate_at
from charlm.report import data, write


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("report")


@pytest.fixture(scope="module")
def mlp(folder) -> Path:
    return train(folder / "mlp", "--n-hidden", 8, "--block-size", 3)


@pytest.fixture(scope="module")
def gpt(folder) -> Path:
    return train(folder / "gpt", "--type", "gpt", "--mix-ngram", 3, "--n-layer", 2, "--n-head", 2, "--block-size", 8)


@pytest.fixture(scope="module")
def both(folder, mlp, gpt) -> str:
    """The page of two runs."""
    assert "wrote" in succeeds("report", mlp, gpt, "-o", folder / "both.html")
    return page_of(folder / "both.html")


@pytest.fixture
def copy(mlp, tmp_path) -> Path:
    """A copy of a run, to be damaged."""
    return Path(shutil.copytree(mlp, tmp_path / "copy"))


def report_of(run: Path, *flags: object) -> str:
    path = run.with_suffix(".html")
    succeeds("report", run, "-o", path, *flags)
    return page_of(path)


def contexts(run: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of every prediction of dev, in its order: the last token, the target and log p (n, V), one item at a time."""
    model = charlm.load(run)
    rows = []
    for item in build_corpus(NAMES).parts["dev"]:
        tokens = [0, *model.vocabulary.encode(item).tolist(), 0]
        for end in range(1, len(tokens)):
            sequence = torch.tensor([tokens[1:end]], dtype=torch.int64).reshape(1, -1)
            with torch.no_grad():
                logits = model.model.next_logits(sequence, {})[0].double()
            rows.append((tokens[end - 1], tokens[end], logits.log_softmax(0).numpy()))
    return tuple(map(np.array, zip(*rows, strict=True)))


# ---- numbers


def test_the_page_is_one_file_that_names_no_other(both, mlp):
    assert len(both.encode()) < 8e6
    shown = both[: both.index('<script type="application/json"')]
    assert all(word not in shown for word in ('src="', 'srcset="', 'action="', "url("))
    assert all(link.startswith("#") for link in shown.split('href="')[1:])
    assert "default-src 'none'" in shown


def test_curves_are_those_of_the_metrics_and_the_schedule(both, mlp, gpt):
    traces = {trace["name"]: trace for trace in figures_of(both)["losses"]["data"]}
    for run in (mlp, gpt):
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        for split in ("train", "dev"):
            expected = [(line["step"], line["nats"]) for line in lines if line["split"] == split]
            found = traces[f"{run}: {split}"]
            assert found["x"] == [step for step, _ in expected]
            assert found["y"] == pytest.approx([nats for _, nats in expected], rel=1e-5)
        rates = traces[f"{run}: learning rate"]
        config = charlm.load(run).config
        assert rates["x"] == list(range(40))
        assert rates["y"] == pytest.approx([learning_rate_at(config, step) for step in range(40)], rel=1e-5)


def test_the_table_is_that_of_compare(both, mlp, gpt):
    rows = json.loads(succeeds("compare", mlp, gpt, "--baselines", "--json"))["models"]
    text = " ".join(body_of(both).split())
    assert {"uniform", "unigram", "bigram"} < {row["name"] for row in rows}
    for row in rows:
        name = row["name"] if row["name"] == row["type"] else f"{row['name']} ({row['type']})"
        assert f"{name} {row['nats']:.4f} {row['standard_error']:.4f} {row['bits_per_char']:.4f}" in text


def test_the_entropies_are_those_of_entropy_and_of_train(both, mlp):
    traces = {trace["name"]: trace["y"] for trace in figures_of(both)["entropies"]["data"]}
    expected = json.loads(succeeds("entropy", mlp.with_suffix(".txt"), "--json"))
    assert traces["Kneser–Ney on dev"] == pytest.approx(expected["held_out"], rel=1e-5)
    train_text = "".join(f"{item}\n" for item in build_corpus(NAMES).parts["train"])
    assert traces["in-sample, train"] == pytest.approx(conditional_entropies(train_text, 5, base=2), abs=1e-5)
    assert traces[f"{mlp}: mlp"] == pytest.approx([charlm.load(mlp).best_nats / math.log(2)] * 2, rel=1e-5)


def test_bigrams_and_calibration_are_those_of_every_prediction(both, mlp, gpt):
    drawn = figures_of(both)
    for number, run in enumerate((mlp, gpt)):
        last, target, log_p = contexts(run)
        p, size = np.exp(log_p), log_p.shape[1]
        one_hot = np.eye(size)[target]
        rows = [last == row for row in range(size)]
        mean = [[x[row].mean(0) if row.any() else np.zeros(size) for row in rows] for x in (one_hot, p)]
        for kind, expected in zip(("data", "model"), mean, strict=True):
            (trace,) = drawn[f"run-{number}-bigrams-{kind}"]["data"]
            np.testing.assert_allclose(trace["z"], expected, atol=2e-5)
        (trace,) = drawn[f"run-{number}-bigrams-difference"]["data"]
        np.testing.assert_allclose(trace["z"], np.subtract(mean[1], mean[0]), atol=2e-5)
        traces = {trace["name"]: trace for trace in drawn["reliability"]["data"]}
        best = p.argmax(1)
        for kind, chances, happened in (
            ("every token", p.ravel(), one_hot.ravel()),
            ("most probable token", p.max(1), best == target),
        ):
            bins = np.minimum((chances * 15).astype(int), 14)
            found = traces[f"{run}: {kind}"]
            assert found["customdata"] == [n for n in np.bincount(bins) if n]
            assert found["y"] == pytest.approx([happened[bins == b].mean() for b in np.unique(bins)], abs=1e-5)
            error = sum(abs(chances[bins == b].sum() - happened[bins == b].sum()) for b in range(15)) / len(chances)
            assert f"{run}: {kind} {error:.4f}" in body_of(both)


def test_surprisals_are_those_of_score_and_samples_those_of_sample(folder, mlp):
    text = " ".join(body_of(report_of(mlp)).split())
    items = build_corpus(NAMES).parts["dev"]
    means = {item: np.mean(charlm.load(mlp).surprisal(item, unit="bits").tolist()) for item in items}
    ranked = sorted(items, key=lambda item: means[item])
    for item in (ranked[0], ranked[-1]):
        assert f"{means[item]:.3f} bits per character : {item} , worst" in text
        bits = charlm.load(mlp).surprisal(item, unit="bits").tolist()
        cells = " ".join(f"{name} {value:.1f}" for name, value in zip([*item, "end"], bits, strict=True))
        assert cells in text
    assert text.index(f"{ranked[0]} , worst") < text.index(f"{ranked[-1]} , worst")
    assert " ".join(succeeds("sample", mlp).split()) in text


def test_the_embedding_is_its_principal_components_or_itself(both, mlp, tmp_path):
    def points(drawn, id):
        columns = [(trace["text"], trace["x"], trace["y"]) for trace in drawn[id]["data"]]
        return {name: (x, y) for column in columns for name, x, y in zip(*column, strict=True)}

    found = points(figures_of(both), "run-0-embedding")
    weight = charlm.load(mlp).model.embedding.weight.detach().double().numpy()
    values, vectors = np.linalg.eigh(np.cov(weight.T))
    expected = (weight - weight.mean(0)) @ vectors[:, :-3:-1]
    names = ["end", *charlm.load(mlp).vocabulary.chars]
    signs = np.sign(expected[np.abs(expected).argmax(0), [0, 1]])
    np.testing.assert_allclose([found[name] for name in names], expected * signs, atol=1e-4)
    shares = values[:-3:-1] / values.sum()
    assert f"explain {shares[0]:.1%} and {shares[1]:.1%}" in body_of(both)
    flat = train(tmp_path / "flat", "--n-embd", 2, "--n-hidden", 8, "--no-diagnostics")
    page = report_of(flat)
    weight = charlm.load(flat).model.embedding.weight.detach()
    np.testing.assert_allclose([points(figures_of(page), "run-0-embedding")[name] for name in names], weight, atol=1e-5)
    assert "trained with --no-diagnostics" in body_of(page)


def test_diagnostics_are_those_of_the_log(both, mlp):
    drawn = figures_of(both)
    records = [json.loads(line) for line in (mlp / DIAGNOSTICS).read_text().splitlines()]
    for trace in drawn["run-0-updates"]["data"][:-1]:
        assert trace["x"] == [record["step"] for record in records]
        expected = [math.log10(record["updates"][trace["name"]]) for record in records]
        assert trace["y"] == pytest.approx(expected, rel=1e-5)
    (saturation,) = drawn["run-0-saturation"]["data"]
    assert saturation["y"] == pytest.approx([record["activations"]["tanh 1"]["saturated"] for record in records])
    for kind in ("activations", "gradients"):
        for trace in drawn[f"run-0-{kind}"]["data"]:
            counts = np.array(records[-1][kind][trace["name"]]["counts"])
            assert np.sum(trace["y"]) * (trace["x"][1] - trace["x"][0]) == pytest.approx(1, rel=1e-4)
            np.testing.assert_allclose(trace["y"] / np.sum(trace["y"]), counts / counts.sum(), atol=1e-5)
    assert "run-1-saturation" not in drawn  # a gpt has no tanh
    assert len(drawn["run-1-activations"]["data"]) == 2


# ---- samples of large corpora, other formats


@pytest.mark.parametrize("format", ["line", "text"])
def test_of_a_large_corpus_a_sample_is_measured_and_stated(tmp_path, monkeypatch, format):
    monkeypatch.setattr(data, "TRAIN_TOKENS", 90)
    monkeypatch.setattr(data, "DEV_TOKENS", 20)
    text = tmp_path / "data.txt"
    text.write_text(NAMES)
    succeeds("prepare", text, "-o", tmp_path / "corpus", "--format", format)
    flags = ("--type", "mlp", "--mix-ngram", 0, "--n-hidden", 8, "--block-size", 2, "--max-steps", 5)
    succeeds("train", "-i", tmp_path / "corpus", "-o", tmp_path / "run", *flags)
    body = body_of(report_of(tmp_path / "run"))
    corpus = build_corpus(NAMES, format=format)
    dev, train = corpus.parts["dev"], corpus.parts["train"]
    model = charlm.load(tmp_path / "run")
    if format == "line":
        taken = [item for index, item in enumerate(dev) if sum(map(len, dev[: index + 1])) + index + 1 <= 20]
        bits = torch.cat(model.surprisals(taken, unit="bits"))
    else:
        bits = model.surprisal(train[0] + dev[0][:20], unit="bits")[-20:]
    assert f"Loss on {len(bits)} tokens of dev" in body
    assert f" {bits.mean():.4f} " in body
    assert f"the first {len(bits)} of {corpus.tokens('dev')} tokens" in " ".join(body.split())
    assert f"of {corpus.tokens('train')} tokens" in body


def test_hostile_text_is_shown_as_text(tmp_path):
    verse = "".join(f"{word}{end}" for word in HOSTILE for end in " \n" for _ in range(20))
    run = train(
        tmp_path / "<img src=x onerror=alert(2)>", "--format", "text", "--n-hidden", 8, "--type", "mlp", text=verse
    )
    page = report_of(run)
    shown = page[page.index("<body>") :]
    assert shown.count("<script") == shown.count("</script") == 3
    assert "<img" not in shown
    assert "<b>" not in shown
    for hidden in "\u202e\x1b":
        assert hidden not in page[: page.index('<script type="application/json"')]
    drawn = figures_of(page)
    ticks = drawn["run-0-bigrams-data"]["layout"]["xaxis"]["ticktext"]
    assert {"&lt;", "&gt;", "&amp;", "U+202E", "U+001B", "日"} <= set(ticks)
    assert "<" not in json.dumps([trace["text"] for trace in drawn["run-0-embedding"]["data"]])


def test_a_count_model_has_no_embedding_and_no_steps(folder):
    text = body_of(report_of(train(folder / "ngram", "--type", "ngram", small=())))
    assert "A model of type ngram has no embedding." in text
    assert "A model of type ngram is not trained step by step." in text


# ---- bad input


def test_a_run_without_metrics_or_with_damaged_ones_says_so(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines()
    damaged = ['{"step": 5, "split": "train", "nats": NaN}', "[1", "{}", '{"step": 1e999, "split": "dev", "nats": 1}']
    (copy / "metrics.jsonl").write_text("\n".join([*damaged, *lines]))
    (copy / DIAGNOSTICS).write_text('{"step": 1, "activations": 3}\n')
    page = report_of(copy)
    assert "5 lines of its logs are damaged or without a finite number" in body_of(page)
    assert len(figures_of(page)["losses"]["data"][0]["x"]) == sum('"train"' in line for line in lines)
    assert "The run has no diagnostics" in body_of(page)
    (copy / "metrics.jsonl").unlink()
    page = report_of(copy)
    assert f"{copy} has no metrics: its metrics.jsonl is missing" in body_of(page)
    assert "losses" not in figures_of(page)


def test_a_checkpoint_of_an_earlier_charlm_is_reported_and_one_of_a_newer_is_refused(copy):
    manifest = json.loads((copy / "checkpoint.json").read_text())
    for name in ("token_noise", "mix_ngram", "smoothing", "order", "eval_tokens"):
        del manifest["config"][name]
    (copy / "checkpoint.json").write_text(json.dumps(manifest))
    (copy / DIAGNOSTICS).unlink()
    assert "by an earlier charlm" in body_of(report_of(copy))
    (copy / "checkpoint.json").write_text(json.dumps({**manifest, "version": 99}))
    assert "newer charlm" in fails("report", copy)


def test_what_cannot_be_reported_is_one_sentence_and_leaves_the_file_as_it_was(folder, copy, mlp, tmp_path):
    old = tmp_path / "old.html"
    old.write_text("old")
    assert "there is no checkpoint in" in fails("report", tmp_path, "-o", old)
    text = tmp_path / "moved.txt"
    text.write_text(NAMES)
    manifest = json.loads((copy / "checkpoint.json").read_text())
    manifest["config"]["input_file"] = str(text)
    (copy / "checkpoint.json").write_text(json.dumps(manifest))
    succeeds("report", copy, "-o", tmp_path / "new.html")
    text.write_text(NAMES + "zoe\n")
    assert "is not the data that the model was trained on" in fails("report", copy, "-o", old)
    text.unlink()
    assert "No such file" in fails("report", copy, "-o", old)
    succeeds("report", copy, "-o", tmp_path / "new.html", "-i", mlp.with_suffix(".txt"))
    other = train(tmp_path / "other", "--n-hidden", 8, text=NAMES + "zoe\n")
    assert "was trained on other data" in fails("report", mlp, other, "-o", old)
    assert "Is a directory" in fails("report", mlp, "-o", tmp_path)
    assert f"there is no folder {tmp_path / 'none'}" in fails("report", mlp, "-o", tmp_path / "none" / "new.html")
    assert old.read_text() == "old"
    assert not list(tmp_path.glob("*.tmp"))


def test_records_that_cannot_be_drawn_are_left_out(copy):
    lines = (copy / DIAGNOSTICS).read_text().splitlines()
    record = json.loads(lines[-1])
    record["activations"] = {"empty": {**next(iter(record["activations"].values())), "counts": [0] * 41}}
    record["gradients"] = {
        name: {key: value for key, value in one.items() if key != left_out}
        for (name, one), left_out in zip(record["gradients"].items(), ["mean", "std", ""], strict=False)
    }
    (copy / DIAGNOSTICS).write_text("\n".join([*lines[:-1], json.dumps(record), lines[-1][:-30]]))
    page = report_of(copy)
    figures = figures_of(page)
    assert "run-0-activations" not in figures
    assert [trace["name"] for trace in figures["run-0-gradients"]["data"]] == [[*record["gradients"]][2]]
    assert "1 lines of its logs are damaged" in body_of(page)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_model_that_diverged_is_an_error(copy, value):
    saved = checkpoint.load(copy)
    saved.weights["embedding.weight"][0] = value
    checkpoint.save(copy, saved)
    assert f"{copy} predicts no finite numbers: its training diverged" in fails("report", copy)


@pytest.mark.parametrize(("format", "text", "tokens"), [("line", "a\nb\nc\n", 2), ("text", "abc", 1)])
def test_the_smallest_corpora_have_a_report(tmp_path, format, text, tokens):
    page = report_of(train(tmp_path / "tiny", "--type", "unigram", "--format", format, small=(), text=text))
    in_sample, held_out = figures_of(page)["entropies"]["data"][:2]
    assert len(in_sample["x"]) == len(in_sample["y"]) == tokens
    assert len(held_out["x"]) == len(held_out["y"]) == 6


def test_an_empty_split_is_an_error(mlp, monkeypatch):
    parts = {"train": ["a"], "dev": []}
    monkeypatch.setattr(data, "excerpt", lambda corpus: replace(corpus, parts=parts))
    assert f"dev of the data of {mlp} is empty: there is nothing to measure" in fails("report", mlp)


def test_without_the_extra_the_command_says_what_to_install(mlp, monkeypatch, tmp_path):
    monkeypatch.setattr(_extras, "find_spec", lambda name: None)
    message = fails("report", mlp, "-o", tmp_path / "new.html")
    assert "a report needs plotly and jinja2, which the extra report installs: pip install" in message
    assert "[report]" in message


def test_the_function_writes_and_the_command_opens_the_file(mlp, tmp_path, monkeypatch):
    assert write([mlp], str(tmp_path / "a.html")) == tmp_path / "a.html"
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    succeeds("report", mlp, "-o", tmp_path / "b.html", "--open")
    assert opened == [(tmp_path / "b.html").as_uri()]
    assert page_of(tmp_path / "a.html") == page_of(tmp_path / "b.html")
