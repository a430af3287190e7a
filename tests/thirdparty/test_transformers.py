"""Unmodified models of transformers, random weights: losses and gradients with charlm are those with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

import charlm
from tests.thirdparty.support import CountCharlmOps

VOCAB_SIZE = 65
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def gpt2() -> PreTrainedModel:
    size = {"n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    drop = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCAB_SIZE, **size, **drop, **TOKENS))


def llama() -> PreTrainedModel:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB_SIZE, **size, **TOKENS))


def t5() -> PreTrainedModel:
    size = {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=VOCAB_SIZE, **size, dropout_rate=0.0, decoder_start_token_id=2, **TOKENS)
    return T5ForConditionalGeneration(config)


def bert() -> PreTrainedModel:
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    drop = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=VOCAB_SIZE, **size, **drop, **TOKENS))


# Lookups in one forward pass: tokens, positions and token types; T5's two stacks have tokens and relative positions.
MODELS = {gpt2: 2, llama: 1, t5: 4, bert: 3}
each_model = pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)


def new(build) -> PreTrainedModel:
    torch.manual_seed(0)
    return build().train()


def loss_and_gradients(model: PreTrainedModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, VOCAB_SIZE, (4, 16), generator=generator)
    labels = tokens.masked_fill(torch.rand(4, 16, generator=generator) < 0.3, -100)
    model.zero_grad()
    loss = model(input_ids=tokens, labels=labels).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_within(found, expected, tolerance: float = 1e-4) -> None:
    assert found[1].keys() == expected[1].keys()
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def generate(model: PreTrainedModel) -> torch.Tensor:
    prompt = torch.randint(3, VOCAB_SIZE, (2, 4), generator=torch.Generator().manual_seed(2))
    return model.eval().generate(prompt, max_new_tokens=8, do_sample=False)


@each_model
def test_losses_and_gradients_under_patch_torch_are_those_without(build) -> None:
    expected = loss_and_gradients(new(build))
    with charlm.patch_torch(), CountCharlmOps() as ops:
        found = loss_and_gradients(new(build))
    assert_within(found, expected)
    assert ops.counts == {
        "embedding": MODELS[build],
        "embedding_backward": MODELS[build],
        "cross_entropy": 1,
        "cross_entropy_backward": 1,
    }


@each_model
def test_losses_and_gradients_of_a_patched_model_are_those_without(build) -> None:
    expected = loss_and_gradients(new(build))
    with CountCharlmOps() as ops:
        found = loss_and_gradients(charlm.patch_model(new(build)))
    assert_within(found, expected)
    assert ops.counts == {"embedding": MODELS[build], "embedding_backward": MODELS[build]}


@each_model
def test_after_the_patch_torchs_functions_are_back_and_the_bits_of_loss_and_gradients(build) -> None:
    functions = {name: getattr(torch.nn.functional, name) for name in charlm.patching._FUNCTIONS}
    model = new(build)
    expected = loss_and_gradients(model)
    expected[1].update({name: gradient.clone() for name, gradient in expected[1].items()})
    with charlm.patch_torch():
        loss_and_gradients(model)
    assert all(getattr(torch.nn.functional, name) is function for name, function in functions.items())
    with CountCharlmOps() as ops:
        assert_within(loss_and_gradients(model), expected, tolerance=0.0)
    assert not ops.counts


@pytest.mark.parametrize("build", [gpt2, llama, t5], ids=lambda build: build.__name__)
def test_a_patched_model_generates_the_same_tokens(build) -> None:
    expected = generate(new(build))
    assert torch.equal(generate(charlm.patch_model(new(build))), expected)
    with charlm.patch_torch():
        assert torch.equal(generate(new(build)), expected)


@each_model
def test_a_patched_model_is_saved_and_loaded_as_a_model_of_torch(build, tmp_path: Path) -> None:
    model = charlm.patch_model(new(build))
    expected = loss_and_gradients(new(build))
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert not [module for module in loaded.modules() if isinstance(module, charlm.nn.Embedding)]
    assert_within(loss_and_gradients(loaded), expected, tolerance=0.0)


@each_model
def test_resized_embeddings_of_a_patched_model_give_the_loss_of_torch(build) -> None:
    models = [new(build), charlm.patch_model(new(build))]
    for model in models:
        torch.manual_seed(3)
        model.resize_token_embeddings(VOCAB_SIZE + 7)
    expected, found = [loss_and_gradients(model) for model in models]
    assert_within(found, expected)
