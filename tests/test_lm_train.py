"""Training runs learn, and stopping and resuming changes nothing."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from lm_support import StopAt

from charlm._errors import UserError
from charlm.lm import checkpoint
from charlm.lm.config import NETWORKS, Config
from charlm.lm.data import build_corpus, read_text
from charlm.lm.evaluate import baselines, evaluate
from charlm.lm.metrics import METRICS, MetricsLog
from charlm.lm.parallel import SharedLoss
from charlm.lm.train import StopRequest, Trainer, build_optimizer, learning_rate_at

SMALL = Config(
    block_size=3,
    n_embd=4,
    n_hidden=16,
    max_steps=60,
    batch_size=16,
    warmup_steps=5,
    eval_interval=20,
    log_interval=7,
    dropout=0.25,
)
NAMES = "\n".join(read_text(None).split("\n")[:400])
CORPUS = build_corpus(NAMES)


def metrics(directory: Path) -> list[dict]:
    """The lines of the metrics file, without what depends on the clock."""
    lines = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    for line in lines:
        assert line.pop("tokens/s") > 0
    return lines


def assert_equal_tensors(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


# ---- learning


def test_a_short_run_on_the_shipped_names_beats_the_bigram_by_a_fifth_of_a_nat(tmp_path):
    corpus = build_corpus(read_text(None))
    config = Config(n_hidden=128, max_steps=300, batch_size=256, warmup_steps=20)
    trainer = Trainer(config, corpus, tmp_path)
    assert trainer.run()
    result = evaluate(trainer.model, corpus.examples("dev", config.block_size), "dev")
    assert result.nats == trainer.best_nats
    assert result.nats < baselines(corpus)["bigram"].nats - 0.2


@pytest.mark.parametrize(
    "options",
    [{"batch_norm": True}, {"optimizer": "sgd", "schedule": "step", "learning_rate": 0.3, "weight_decay": 0.0}],
    ids=["batch_norm", "sgd"],
)
def test_every_option_learns(tmp_path, options):
    config = replace(SMALL, **{"max_steps": 300, "learning_rate": 1e-2, "dropout": 0.0, **options})
    trainer = Trainer(config, CORPUS, tmp_path)
    trainer.run()
    assert trainer.best_nats < baselines(CORPUS)["unigram"].nats


def test_a_count_model_is_trained_by_counting(tmp_path):
    trainer = Trainer(replace(SMALL, type="bigram"), CORPUS, tmp_path)
    assert trainer.run()
    assert trainer.best_nats == baselines(CORPUS)["bigram"].nats
    assert checkpoint.load(tmp_path).build_model().log_probs.equal(trainer.model.log_probs)


def test_the_best_weights_on_dev_are_kept_when_the_run_overfits(tmp_path):
    corpus = build_corpus("\n".join(NAMES.split("\n")[:40]))
    config = replace(SMALL, n_hidden=64, max_steps=600, learning_rate=3e-2, schedule="constant", dropout=0.0)
    trainer = Trainer(config, corpus, tmp_path)
    trainer.run()
    dev = [line["nats"] for line in metrics(tmp_path) if line["split"] == "dev"]
    assert dev[-1] > min(dev) + 0.5
    model = checkpoint.load(tmp_path).build_model()
    assert evaluate(model, corpus.examples("dev", 3), "dev").nats == min(dev) == trainer.best_nats


def test_divergence_is_said_in_a_sentence(tmp_path):
    config = replace(SMALL, optimizer="sgd", learning_rate=1e30, warmup_steps=0)
    with pytest.raises(UserError, match=r"the loss became .* by step 7: try a lower --learning-rate"):
        Trainer(config, CORPUS, tmp_path).run()


def test_equal_seeds_give_equal_runs_and_leave_the_callers_randomness_alone(tmp_path):
    runs = []
    for name in ("a", "b"):
        torch.manual_seed(len(runs))
        before = torch.get_rng_state()
        trainer = Trainer(SMALL, CORPUS, tmp_path / name)
        trainer.run()
        assert torch.equal(before, torch.get_rng_state())
        runs.append(metrics(tmp_path / name))
    assert runs[0] == runs[1]


# ---- schedule and optimizer


def test_cosine_rises_then_falls_to_zero():
    config = Config(max_steps=1000, warmup_steps=99, learning_rate=1.0)
    rates = [learning_rate_at(config, step) for step in range(1000)]
    assert rates[0] == pytest.approx(0.01, rel=1e-3)
    assert all(a < b for a, b in pairwise(rates[:91]))
    assert all(a > b for a, b in pairwise(rates[100:]))
    assert rates[500] == pytest.approx(0.5)
    assert rates[-1] < 1e-4


def test_step_schedule_is_the_lectures():
    config = Config(max_steps=200_000, warmup_steps=0, learning_rate=0.1, schedule="step")
    assert [learning_rate_at(config, step) for step in (0, 99_999, 100_000, 199_999)] == pytest.approx(
        [0.1, 0.1, 0.01, 0.01]
    )


def test_only_linear_weights_decay(tmp_path):
    model = Trainer(replace(SMALL, batch_norm=True), CORPUS, tmp_path).model
    groups = build_optimizer(model, SMALL).param_groups
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert decayed == {id(model.hidden.weight), id(model.head.weight)}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


# ---- stopping and resuming


@pytest.mark.parametrize(
    "config",
    [SMALL, replace(SMALL, batch_norm=True), replace(SMALL, optimizer="sgd", learning_rate=0.1)],
    ids=["adamw", "batch_norm", "sgd"],
)
@pytest.mark.parametrize("stops", [(33,), (1, 20, 40, 59)])
def test_a_resumed_run_is_the_uninterrupted_one(tmp_path, config, stops):
    whole = Trainer(config, CORPUS, tmp_path / "whole")
    assert whole.run()

    parts = tmp_path / "parts"
    trainer = Trainer(config, CORPUS, parts)
    for stop in stops:
        torch.manual_seed(stop)  # what the process did in between does not matter
        assert not trainer.run(stop=StopAt(trainer, stop))
        saved = checkpoint.load(parts)
        assert saved.step == stop
        trainer = Trainer(saved.config, CORPUS, parts, saved)
    assert trainer.run()

    assert metrics(parts) == metrics(tmp_path / "whole")
    ours, theirs = checkpoint.load(parts), checkpoint.load(tmp_path / "whole")
    assert_equal_tensors(ours.weights, theirs.weights)
    assert_equal_tensors(ours.training, theirs.training)
    assert (ours.step, ours.best_step, ours.best_nats) == (theirs.step, theirs.best_step, theirs.best_nats)


def test_a_run_that_is_killed_goes_on_from_its_last_save_without_double_lines(tmp_path):
    whole = Trainer(SMALL, CORPUS, tmp_path / "whole")
    whole.run()
    killed = tmp_path / "killed"

    def kill(progress):
        if progress.step >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Trainer(SMALL, CORPUS, killed).run(kill)
    with (killed / METRICS).open("a") as file:
        file.write('{"step": 5')  # and its last line is cut short
    saved = checkpoint.load(killed)
    assert saved.step == 40
    Trainer(SMALL, CORPUS, killed, saved).run()
    assert metrics(killed) == metrics(tmp_path / "whole")


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    save, waited = checkpoint.save, []

    def slow(*arguments):
        end = time.monotonic() + 30
        while trainer.step == arguments[1].step < SMALL.max_steps and time.monotonic() < end:
            time.sleep(0.001)
        waited.append(trainer.step - arguments[1].step)
        save(*arguments)

    monkeypatch.setattr(checkpoint, "save", slow)
    trainer = Trainer(SMALL, CORPUS, tmp_path / "slow")
    assert trainer.run()
    assert len(waited) == 3
    assert min(waited[:2]) > 0
    assert waited[2] == 0
    monkeypatch.undo()
    Trainer(SMALL, CORPUS, tmp_path / "run").run()
    assert metrics(tmp_path / "slow") == metrics(tmp_path / "run")
    assert_equal_tensors(checkpoint.load(tmp_path / "slow").training, checkpoint.load(tmp_path / "run").training)


@pytest.mark.parametrize("failing", [20, 60])
def test_a_checkpoint_that_cannot_be_written_ends_the_run(tmp_path, monkeypatch, failing):
    save = checkpoint.save

    def full(directory, saved, processes):
        if saved.step == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "checkpoint.json")
        save(directory, saved, processes)

    monkeypatch.setattr(checkpoint, "save", full)
    trainer = Trainer(SMALL, CORPUS, tmp_path)
    with pytest.raises(OSError, match="No space left"):
        trainer.run()
    assert trainer.step <= failing + 20


def test_a_finished_run_can_be_made_longer(tmp_path):
    Trainer(SMALL, CORPUS, tmp_path).run()
    saved = checkpoint.load(tmp_path)
    longer = Trainer(replace(saved.config, max_steps=90), CORPUS, tmp_path, saved)
    assert longer.run()
    train = [line["step"] for line in metrics(tmp_path) if line["split"] == "train"]
    assert train == [7, 14, 21, 28, 35, 42, 49, 56, 60, 63, 70, 77, 84, 90]


def test_resuming_on_other_data_is_refused(tmp_path):
    Trainer(SMALL, CORPUS, tmp_path).run()
    with pytest.raises(UserError, match="not the one that the checkpoint was trained on"):
        Trainer(SMALL, build_corpus(NAMES, seed=1), tmp_path, checkpoint.load(tmp_path))


def test_signals_become_requests_and_the_second_interrupts():
    found = signal.getsignal(signal.SIGINT)
    with StopRequest().listening() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is found


# ---- metrics and config


def test_metrics_start_anew_at_step_zero_and_keep_what_was_before_a_resume(tmp_path):
    for start, kept in ((0, []), (20, [10, 20])):
        with MetricsLog(tmp_path, start) as log:
            log.checkpointed()
            assert [line["step"] for line in metrics(tmp_path)] == kept
            for step in (10, 20, 30):
                log.write(step, "train", 1.5, 100.04)
    assert (tmp_path / METRICS).read_text().splitlines()[0] == (
        '{"step": 10, "split": "train", "nats": 1.5, "tokens/s": 100.0}'
    )


def test_metrics_of_an_earlier_run_stay_until_the_first_checkpoint_of_the_next(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        log.write(10, "train", 1.5, 100)
        log.checkpointed()
    before = (tmp_path / METRICS).read_bytes()
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, "train", 2.5, 100)
    assert (tmp_path / METRICS).read_bytes() == before
    with MetricsLog(tmp_path, 0) as log:
        log.write(1, "train", 2.5, 100)
        log.checkpointed()
        log.write(2, "train", 2.25, 100)
        assert [line["step"] for line in metrics(tmp_path)] == [1, 2]


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe garbage\n", b'{"step": "x"}\n', b'{"step"', b"[]\n", b'{"step": null}\n']
)
def test_resuming_drops_damaged_lines_of_the_metrics(tmp_path, damage):
    with MetricsLog(tmp_path, 0) as log:
        log.write(10, "train", 1.5, 100)
        log.checkpointed()
    with (tmp_path / METRICS).open("ab") as file:
        file.write(damage)
    with MetricsLog(tmp_path, 10) as log:
        log.write(20, "train", 1.25, 100)
    assert [line["step"] for line in metrics(tmp_path)] == [10, 20]


@pytest.mark.parametrize(
    "options",
    [
        {"max_steps": 0},
        {"dropout": 1.0},
        {"token_noise": 1.0},
        {"learning_rate": 0.0},
        {"add_k": 0.0},
        {"add_k": math.inf},
        {"grad_clip": math.inf},
        {"weight_decay": math.nan},
        {"optimizer": "lion"},
        {"schedule": "linear"},
        {"eval_interval": 0},
        {"batch_norm": True, "batch_size": 1},
        {"type": "gpt9"},
    ],
)
def test_a_config_that_cannot_work_is_a_user_error(options):
    with pytest.raises(UserError, match=f"^{list(options)[-1]} is .*, but must be "):
        Config(**options)


def test_a_count_model_without_a_finite_loss_is_told_what_to_change(tmp_path):
    with pytest.raises(UserError, match=r"inf by step .*: try an --add-k closer to 1"):
        Trainer(Config(type="bigram", add_k=1e308), CORPUS, tmp_path).run()


def test_an_unusable_device_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="device 'abacus' cannot be used here"):
        Trainer(replace(SMALL, device="abacus"), CORPUS, tmp_path)


# ---- the step


def small(type: str, **given) -> Config:
    widths = {"n_embd": 8, "n_hidden": 16, "n_layer": 2, "n_head": 2, "block_size": 8}
    run = {"max_steps": 12, "batch_size": 16, "eval_interval": 4, "log_interval": 3, "warmup_steps": 2}
    return Config.of_type(type, **{**widths, **run, "dropout": 0.0, **given})


@pytest.mark.parametrize("type", ["mlp", "gru", "gpt"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_accumulated_batches_are_one_large_batch(tmp_path, type, optimizer):
    """Token by token: items are of many lengths, and so no two batches of a GPT hold as many."""
    runs = []
    for parts in (1, 4):
        config = small(type, batch_size=16 // parts, gradient_accumulation_steps=parts, optimizer=optimizer)
        trainer = Trainer(config, CORPUS, tmp_path / str(parts))
        trainer.run()
        runs.append((metrics(tmp_path / str(parts)), trainer.model.state_dict()))
    for one, four in zip(runs[0][0], runs[1][0], strict=True):
        assert (one["step"], one["split"]) == (four["step"], four["split"])
        assert one["nats"] == pytest.approx(four["nats"], rel=1e-4)
    for name, tensor in runs[0][1].items():
        torch.testing.assert_close(tensor, runs[1][1][name], rtol=1e-3, atol=1e-4)


def test_an_accumulated_gradient_weighs_tokens_not_batches(tmp_path):
    corpus = build_corpus("\n".join(["a", "abcdefg"] * 40))
    gradients = []
    for parts in (1, 8):
        config = small("gpt", batch_size=16 // parts, gradient_accumulation_steps=parts)
        trainer = Trainer(config, corpus, tmp_path / str(parts))
        trainer._backward(
            SharedLoss(trainer.model, trainer.model.loss, trainer.processes), corpus.sequences("train", 8)
        )
        gradients.append([p.grad for p in trainer.model.parameters()])
    for one, eight in zip(*gradients, strict=True):
        torch.testing.assert_close(one, eight, rtol=1e-4, atol=1e-6)


def test_a_clipped_gradient_moves_plain_sgd_by_its_norm_at_most(tmp_path):
    norms = []
    for grad_clip in (0.0, 0.01):
        config = small("mlp", optimizer="sgd", learning_rate=1.0, weight_decay=0.0, schedule="constant", warmup_steps=0)
        trainer = Trainer(replace(config, max_steps=1, grad_clip=grad_clip), CORPUS, tmp_path / str(grad_clip))
        before = [p.detach().clone() for p in trainer.model.parameters()]
        trainer.run()
        moved = [(p.detach() - b).norm() for p, b in zip(trainer.model.parameters(), before, strict=True)]
        norms.append(torch.stack(moved).norm().item())
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


def test_training_ends_when_dev_has_not_become_better_for_so_long(tmp_path):
    corpus = build_corpus("\n".join(NAMES.split("\n")[:40]))
    config = replace(
        SMALL, n_hidden=64, max_steps=600, learning_rate=3e-2, schedule="constant", dropout=0.0, patience=3
    )
    trainer = Trainer(config, corpus, tmp_path)
    assert trainer.run()
    assert trainer.step < 600
    assert trainer.step == trainer.best_step + 3 * 20
    again = Trainer(config, corpus, tmp_path, checkpoint.load(tmp_path))
    assert again.run()
    assert again.step == trainer.step


@pytest.mark.parametrize("type", NETWORKS)
def test_bfloat16_trains_beside_float32(tmp_path, type):
    last = []
    for dtype in ("float32", "bfloat16"):
        trainer = Trainer(small(type, dtype=dtype, max_steps=40), CORPUS, tmp_path / dtype)
        trainer.run()
        assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
        last.append(trainer.best_nats)
    assert last[0] != last[1]
    assert last[0] == pytest.approx(last[1], abs=0.1)


@pytest.mark.parametrize(
    "type", ["mlp", *(pytest.param(t, marks=pytest.mark.exhaustive) for t in ("bow", "gpt"))]
)  # compiling takes 30 s
def test_a_compiled_run_is_the_run(tmp_path, type):
    runs = []
    for compile in (False, True):
        trainer = Trainer(small(type, compile=compile, max_steps=4), CORPUS, tmp_path / str(compile))
        trainer.run()
        runs.append(trainer.model.state_dict())
    for name, tensor in runs[0].items():
        torch.testing.assert_close(tensor, runs[1][name], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("type", NETWORKS)
def test_every_neural_type_resumes_exactly(tmp_path, type):
    config = small(type, dropout=0.2, token_noise=0.2, gradient_accumulation_steps=2, grad_clip=1.0)
    whole = Trainer(config, CORPUS, tmp_path / "whole")
    whole.run()
    trainer = Trainer(config, CORPUS, tmp_path / "parts")
    assert not trainer.run(stop=StopAt(trainer, 5))
    saved = checkpoint.load(tmp_path / "parts")
    Trainer(saved.config, CORPUS, tmp_path / "parts", saved).run()
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert_equal_tensors(checkpoint.load(tmp_path / "parts").training, checkpoint.load(tmp_path / "whole").training)


@pytest.mark.parametrize(
    ("type", "given", "words"),
    [
        ("wavenet", {"block_size": 6}, "block_size is 6, but must be a power of two"),
        ("wavenet", {"batch_size": 1}, "batch_size is 1, but must be at least 2 with batch norm"),
        ("gpt", {"n_head": 5, "n_embd": 12}, "n_head is 5, but must be a divisor of n_embd"),
        ("gpt", {"dtype": "float16"}, "dtype is float16, but must be one of float32, bfloat16"),
        ("lstm", {"compile": True}, "compile is True, but must be left out for the lstm: torch.compile would unroll"),
        ("mlp", {"patience": 0}, "patience is 0, but must be at least 1"),
    ],
)
def test_a_model_that_cannot_be_built_is_a_user_error(type, given, words):
    with pytest.raises(UserError, match=words):
        Config.of_type(type, **given)
