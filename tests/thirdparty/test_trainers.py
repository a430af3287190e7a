"""The training loops of other libraries on the CPU: with charlm's kernels the losses are those with torch's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import accelerate
import lightning
import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

import charlm
from tests.thirdparty.support import CountCharlmOps
from tests.thirdparty.test_transformers import VOCAB_SIZE, bert, gpt2, llama, new, t5

N_STEPS = 6
Prepare = Callable[[torch.nn.Module], torch.nn.Module]


def examples(n: int = 4 * N_STEPS) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, 20, (n, 16), generator=generator)
    labels = tokens.masked_fill(torch.rand(n, 16, generator=generator) < 0.2, -100)
    return [{"input_ids": t, "labels": label} for t, label in zip(tokens, labels, strict=True)]


def compare(train: Callable[[Prepare], list[float]], n_embeddings: int) -> None:
    """`train` gives the losses of N_STEPS steps; plain, then under patch_torch, then of a patched model, then plain."""
    expected = train(lambda model: model)
    assert len(expected) == N_STEPS
    assert expected[-1] < expected[0]
    for context, prepare in [(charlm.patch_torch(), lambda model: model), (nullcontext(), charlm.patch_model)]:
        with context, CountCharlmOps() as ops:
            losses = train(prepare)
        assert losses == pytest.approx(expected, abs=1e-4)
        assert ops.counts["embedding"] >= n_embeddings * N_STEPS
        assert ops.counts["embedding_backward"] >= n_embeddings * N_STEPS
        if prepare is not charlm.patch_model:
            assert ops.counts["cross_entropy"] >= N_STEPS
            assert ops.counts["cross_entropy_backward"] >= N_STEPS
    assert train(lambda model: model) == expected


@pytest.mark.parametrize("build", [gpt2, llama, t5, bert], ids=lambda build: build.__name__)
@pytest.mark.parametrize(
    "options",
    [{}, {"bf16": True}, {"gradient_checkpointing": True}, {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5}],
    ids=lambda options: "-".join(options) or "plain",
)
def test_the_trainer_of_transformers_has_the_loss_history_of_torch(build, options: dict, tmp_path: Path) -> None:
    def train(prepare: Prepare) -> list[float]:
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            use_cpu=True,
            max_steps=N_STEPS,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            **options,
        )
        trainer = Trainer(model=prepare(new(build)), args=arguments, train_dataset=examples())
        trainer.train()
        return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    compare(train, n_embeddings=1)


def loop(model: torch.nn.Module, backward: Callable[[torch.Tensor], None] = torch.Tensor.backward) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    batch = torch.utils.data.default_collate(examples(8))
    losses = []
    for _ in range(N_STEPS):
        optimizer.zero_grad()
        loss = model(**batch).loss
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_a_loop_of_accelerate_has_the_losses_of_torch() -> None:
    def train(prepare: Prepare) -> list[float]:
        accelerator = accelerate.Accelerator(cpu=True)
        return loop(accelerator.prepare(prepare(new(gpt2))), accelerator.backward)

    compare(train, n_embeddings=2)


@pytest.mark.parametrize("wrapped_first", [False, True], ids=["patched, wrapped", "wrapped, patched"])
@pytest.mark.parametrize("targets", [["c_attn"], ["c_attn", "wte"]], ids="+".join)
def test_lora_of_peft_has_the_losses_of_torch(targets: list[str], wrapped_first: bool) -> None:
    config = peft.LoraConfig(r=4, target_modules=targets, fan_in_fan_out=True, lora_dropout=0.0, task_type="CAUSAL_LM")

    def wrap(model: torch.nn.Module) -> torch.nn.Module:
        torch.manual_seed(2)
        return peft.get_peft_model(model, config)

    def train(prepare: Prepare) -> list[float]:
        model = prepare(wrap(new(gpt2))) if wrapped_first else wrap(prepare(new(gpt2)))
        losses = loop(model)
        merged = model.merge_and_unload().eval()
        with torch.no_grad():
            return [*losses[:-1], merged(**torch.utils.data.default_collate(examples(8))).loss.item()]

    expected = train(lambda model: model)
    for context, prepare in [(charlm.patch_torch(), lambda model: model), (nullcontext(), charlm.patch_model)]:
        with context, CountCharlmOps() as ops:
            losses = train(prepare)
        assert losses == pytest.approx(expected, abs=1e-4)
        assert losses[-2] < losses[0]  # the last one is of the merged model: merging wte changes the tied head
        assert ops.counts["embedding"] >= 2 * N_STEPS
    assert train(lambda model: model) == expected


class Bigram(lightning.LightningModule):
    """The loss by module, so that patch_model reaches it."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(VOCAB_SIZE, 16)
        self.linear = torch.nn.Linear(16, VOCAB_SIZE)
        self.criterion = torch.nn.CrossEntropyLoss()
        self.losses: list[float] = []

    def training_step(self, batch: dict[str, torch.Tensor], index: int) -> torch.Tensor:
        logits = self.linear(self.embedding(batch["input_ids"]))
        loss = self.criterion(logits.flatten(0, 1), batch["labels"].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


@pytest.mark.filterwarnings("ignore::UserWarning:lightning")
def test_the_trainer_of_lightning_has_the_losses_of_torch(tmp_path: Path) -> None:
    def train(prepare: Prepare) -> list[float]:
        torch.manual_seed(0)
        model = prepare(Bigram())
        quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        trainer = lightning.Trainer(accelerator="cpu", devices=1, max_steps=N_STEPS, default_root_dir=tmp_path, **quiet)
        trainer.fit(model, torch.utils.data.DataLoader(examples(), batch_size=4))
        return model.losses

    compare(train, n_embeddings=1)


@pytest.mark.parametrize("chunk_size", [0, 16])
def test_a_gpt_of_litgpt_with_its_chunked_loss_has_the_losses_of_torch(chunk_size: int) -> None:
    litgpt = pytest.importorskip("litgpt", reason="litgpt was not installed")
    from litgpt.utils import chunked_cross_entropy

    batch = torch.utils.data.default_collate(examples(8))

    def train(prepare: Prepare) -> list[float]:
        torch.manual_seed(0)
        size = {"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16}
        model = prepare(litgpt.GPT(litgpt.Config(vocab_size=VOCAB_SIZE, padded_vocab_size=VOCAB_SIZE, **size)))
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        losses = []
        for _ in range(N_STEPS):
            optimizer.zero_grad()
            loss = chunked_cross_entropy(model(batch["input_ids"]), batch["labels"], chunk_size=chunk_size)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    compare(train, n_embeddings=1)
