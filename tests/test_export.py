"""`charlm export`: what is written needs no charlm, has its logits at every position, and appears whole or not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor

from charlm import _extras
from charlm.export import Source, hugging_face
from charlm.export import checkpoint as exported
from charlm.export.hugging_face import FILES
from charlm.export.modeling_charlm import CharlmConfig, CharlmForCausalLM
from charlm.export.onnx import OPSET, export_onnx
from charlm.lm import checkpoint
from charlm.lm.data import build_corpus
from charlm.lm.models import LanguageModel, Mixture
from tests.lm_support import fails, succeeds, untrained_checkpoint

TYPES = ("mlp", "wavenet", "bow", "rnn", "gru", "lstm", "gpt")
T = 4
# Characters that terminals, HTML, JSON and Python read in their own ways, among them a newline of their own.
HOSTILE = "\x1b]0;x\x07 \"'\\</script>{{}}<unk>[start]\u0301\u202e\u2028\x85\x00\t\U0001f600\u4e00."
NAMES = "emma\nolivia\nava\nisabella\nsophia\n" * 8 + f"{HOSTILE}\n" * 5


def trained(directory: Path, type: str, format: str = "line", **config: Any) -> Path:
    """A folder with a model of `type` whose weights, statistics and start states are all random."""
    corpus = build_corpus(NAMES if format == "line" else NAMES * 30, format=format)
    saved = untrained_checkpoint(corpus, type, n_layer=2, n_embd=8, **config)
    weights = {
        name: tensor + 0.3 * torch.rand(tensor.shape) if tensor.is_floating_point() else tensor
        for name, tensor in saved.weights.items()
    }
    checkpoint.save(directory, replace(saved, weights=weights))
    return directory


def expected_logits(model: LanguageModel, tokens: Tensor) -> Tensor:
    """charlm's logits after each of tokens (B, t), whose first is the start token: (B, t, V)."""
    return torch.stack([model.next_logits(tokens[:, 1 : at + 1], {}) for at in range(tokens.shape[1])], dim=1)


def random_tokens(model: LanguageModel, B: int, t: int) -> Tensor:
    tokens = torch.randint(model.vocab_size, (B, t))
    tokens[:, 0] = model.pad_token
    return tokens


def transformers_model(source: Source) -> CharlmForCausalLM:
    model = CharlmForCausalLM(CharlmConfig(source.arguments, bos_token_id=source.vocabulary.pad_token)).eval()
    model.network.load_state_dict(source.weights)
    return model


@pytest.fixture(scope="module", params=[*TYPES, "mlp with batch norm"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Source:
    type, *batch_norm = request.param.split(" with ")
    format = "text" if type in ("wavenet", "rnn", "gpt") else "line"
    return Source.load(trained(tmp_path_factory.mktemp("run"), type, format, batch_norm=bool(batch_norm)))


@torch.no_grad()
def test_logits_are_charlms_at_every_position_of_texts_of_any_length(source: Source) -> None:
    model = transformers_model(source)
    for B, t in ((1, 1), (2, T), (3, 3 * T + 1)):
        tokens = random_tokens(source.model, B, t)
        torch.testing.assert_close(model(tokens).logits, expected_logits(source.model, tokens), rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_padding_before_and_after_a_row_changes_nothing(source: Source) -> None:
    model = transformers_model(source)
    tokens = random_tokens(source.model, 2, T + 3)
    mask = torch.ones_like(tokens)
    mask[0, :2] = mask[1, -1] = 0
    tokens[0, 2] = source.model.pad_token
    logits = model(tokens, attention_mask=mask).logits
    torch.testing.assert_close(logits[0, 2:], model(tokens[:1, 2:]).logits[0])
    torch.testing.assert_close(logits[1, :-1], model(tokens[1:, :-1]).logits[0])


@torch.no_grad()
def test_generate_continues_as_charlm_does_and_begins_with_the_start_token(source: Source) -> None:
    model = transformers_model(source)
    start = torch.full((1, 1), source.model.pad_token)
    expected = source.model.generate(torch.empty(1, 0, dtype=torch.int64), 2 * T, temperature=0)
    for tokens in (model.generate(max_new_tokens=2 * T), model.generate(start, max_new_tokens=2 * T)):
        assert torch.equal(tokens, torch.cat([start, expected], dim=1))


def test_the_loss_of_labels_is_the_mean_surprisal_of_those_that_count(source: Source) -> None:
    tokens = random_tokens(source.model, 1, T)
    labels = tokens.clone()
    labels[0, -1] = -100
    output = transformers_model(source)(tokens, labels=labels)
    surprisal = -output.logits.log_softmax(2)[0, :-2].gather(1, tokens[0, 1:-1, None])
    torch.testing.assert_close(output.loss, surprisal.mean())
    output.loss.backward()


@torch.no_grad()
def test_an_onnx_file_has_the_logits_for_any_batch_and_length(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    assert export_onnx(source, path) <= 1e-4
    file = onnx.load(path)
    assert [(each.domain, each.version) for each in file.opset_import] == [("", OPSET)]
    assert json.loads(file.metadata_props[0].value)["chars"] == source.vocabulary.chars
    assert str(Path(__file__).parents[1]).encode() not in path.read_bytes()
    session = onnxruntime.InferenceSession(path)
    for B, t in ((1, 1), (5, T - 1), (2, T), *([(2, 3 * T)] if source.arguments["type"] in ("mlp", "wavenet") else [])):
        tokens = random_tokens(source.model, B, t)
        (logits,) = session.run(["logits"], {"input_ids": tokens.numpy()})
        np.testing.assert_allclose(logits, expected_logits(source.model, tokens), rtol=0, atol=1e-4)


USER = """
import json, sys
sys.modules["charlm"] = None
try:
    import charlm
except ImportError:
    pass
else:
    raise SystemExit("charlm is there")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, texts = sys.argv[1], json.loads(sys.argv[2])
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
logits = [model(**tokenizer(text, return_tensors="pt")).logits[0, -1].tolist() for text in texts]
encoded = [tokenizer(text, return_tensors="pt") for text in texts]
found = [tokenizer.decode(model.generate(**each, do_sample=False)[0], skip_special_tokens=True) for each in encoded]
batch = None
if tokenizer.pad_token is not None:
    batch = model.generate(**tokenizer(texts, padding=True, return_tensors="pt"), do_sample=False)
    batch = tokenizer.batch_decode(batch, skip_special_tokens=True)
try:
    tokenizer("\\u2603")
    error = None
except Exception as raised:
    error = str(raised)
print(json.dumps([logits, found, batch, error, model.generation_config.top_k]))
"""


@pytest.mark.exhaustive
def test_a_folder_holds_our_code_and_of_the_corpus_escaped_characters_alone(tmp_path: Path) -> None:
    run, folder = trained(tmp_path / "run", "lstm"), tmp_path / "a.b c"
    assert "for transformers" in succeeds("export", run, "--hf", folder)
    assert {path.name for path in folder.iterdir()} == FILES
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["a.b c", "run"]
    for name in FILES - {"model.safetensors", "networks_charlm.py"}:  # no character can do harm
        assert (folder / name).read_bytes().isascii(), name
    for name in ("networks_charlm.py", "modeling_charlm.py"):
        assert (folder / name).read_bytes() == (Path(exported.__file__).parent / name).read_bytes()


@pytest.mark.exhaustive
@pytest.mark.parametrize(("type", "format"), [("lstm", "line"), ("mlp", "text"), ("gpt", "line")])
def test_a_process_without_charlm_loads_the_folder_types_text_and_generates(
    type: str, format: str, tmp_path: Path
) -> None:
    run, folder = trained(tmp_path / "run", type, format), tmp_path / "a.b c"
    succeeds("export", run, "--hf", folder)
    texts = ["em", HOSTILE, "isabel"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(tmp_path / "modules")}
    command = [sys.executable, "-c", USER, str(folder), json.dumps(texts)]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    logits, found, batch, error, top_k = json.loads(result.stdout.splitlines()[-1])

    saved = checkpoint.load(run)
    model, vocabulary = saved.build_model(), saved.vocabulary
    for text, last, continued in zip(texts, logits, found, strict=True):
        tokens = vocabulary.encode(text).long()[None]
        torch.testing.assert_close(torch.tensor(last), model.next_logits(tokens, {})[0], rtol=1e-5, atol=1e-5)
        n = 100 if format == "line" else 500
        longer = model.generate(tokens, n, temperature=0, stop_token=vocabulary.stop_token)[0].tolist()
        if format == "line":
            assert continued == vocabulary.decode([token for token in longer if token])
        else:
            assert continued == "\n" + vocabulary.decode(longer)
    assert batch == (found if format == "line" else None)
    assert "WordLevel" in error
    assert top_k == 0


def test_a_count_model_and_a_mixture_are_refused_and_the_network_alone_is_exported(tmp_path: Path) -> None:
    counts = trained(tmp_path / "counts", "bigram")
    for option in ("--hf", "--onnx"):
        assert "is of type bigram, which has counts and no network" in fails("export", counts, option, tmp_path / "x")
    mixture = trained(tmp_path / "mixture", "gru", mix_ngram=3)
    assert "add --network-only" in fails("export", mixture, "--onnx", tmp_path / "x")
    assert not (tmp_path / "x").exists()
    printed = succeeds("export", mixture, "--onnx", tmp_path / "x", "--network-only")
    assert "ONNX opset 18; logits within" in printed
    network = checkpoint.load(mixture).build_model()
    assert isinstance(network, Mixture)
    tokens = random_tokens(network, 2, T)
    (logits,) = onnxruntime.InferenceSession(tmp_path / "x").run(["logits"], {"input_ids": tokens.numpy()})
    np.testing.assert_allclose(logits, expected_logits(network.network, tokens).detach(), rtol=0, atol=1e-4)


def test_what_exists_is_kept_unless_an_export_wrote_it(tmp_path: Path) -> None:
    run = trained(tmp_path / "run", "bow")
    (tmp_path / "file").write_text("mine")
    for option in ("--hf", "--onnx"):
        assert "file already exists" in fails("export", run, option, tmp_path / "file")
        assert "run already exists" in fails("export", run, option, run)
    assert "is not a folder" in fails("export", run, "--hf", tmp_path / "file", "--overwrite")
    assert "is a folder" in fails("export", run, "--onnx", run, "--overwrite")
    assert "contains files that no export wrote" in fails("export", run, "--hf", run, "--overwrite")
    assert (tmp_path / "file").read_text() == "mine"
    assert checkpoint.exists(run)
    assert "nothing to export" in fails("export", run)
    succeeds("export", run, "--onnx", tmp_path / "file", "--overwrite")
    onnx.checker.check_model(tmp_path / "file")


@pytest.mark.parametrize("option", ["--onnx", pytest.param("--hf", marks=pytest.mark.exhaustive)])
def test_an_export_with_other_logits_is_an_error_and_leaves_nothing(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path / "run", "lstm")
    monkeypatch.setattr(exported, "_gates", lambda kind, rows: rows)
    assert "its logits differ from charlm's by" in fails("export", run, option, tmp_path / "x")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_network_that_diverged_is_refused_with_its_reason(tmp_path: Path) -> None:
    saved = checkpoint.load(trained(tmp_path / "run", "bow"))
    saved.weights["head.bias"][1] = torch.nan
    checkpoint.save(tmp_path / "run", saved)
    error = fails("export", tmp_path / "run", "--onnx", tmp_path / "x")
    assert "run predicts no finite numbers: its training diverged" in error


def test_a_folder_that_cannot_be_replaced_or_got_a_file_in_the_meantime_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, folder, rename = trained(tmp_path / "run", "bow"), tmp_path / "x", Path.rename
    folder.mkdir()
    (folder / "config.json").write_text("old")

    def fail_at_the_new_one(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise PermissionError(13, "Permission denied")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(hugging_face, "_check", lambda source, new: 0.0)
        patch.setattr(Path, "rename", fail_at_the_new_one)
        assert f"cannot write {folder}: Permission denied" in fails("export", run, "--hf", folder, "--overwrite")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("config.json", "old")]
    monkeypatch.setattr(hugging_face, "_check", lambda source, new: float((folder / "mine").write_bytes(b"")))
    assert "contains files that no export wrote ('mine')" in fails("export", run, "--hf", folder, "--overwrite")
    assert {path.name for path in folder.iterdir()} == {"config.json", "mine"}
    assert {path.name for path in tmp_path.iterdir()} == {"run", "x"}


def test_a_missing_extra_is_a_sentence_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = trained(tmp_path / "run", "bow")
    monkeypatch.setattr(_extras, "find_spec", lambda name: None)
    for extra, names in (("hf", "transformers"), ("onnx", "onnx and onnxruntime")):
        error = fails("export", run, f"--{extra}", tmp_path / "x")
        assert f"--{extra} needs {names}, which the extra {extra} installs: pip install" in error
