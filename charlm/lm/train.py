"""The training loop over random batches, which can be stopped and resumed exactly.

The state after step s consists of the weights, the optimizer state, the states of two random generators (one for
batches, one for dropout and noise), the loss summed since the last report, the best weights so far, and a flag for an
evaluation that a signal interrupted. A batch is a pure function of the state of its generator. Therefore a resumed run
has bit for bit the losses of an uninterrupted one, on the same machine with the same number of threads.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from charlm._errors import UserError
from charlm.lm import checkpoint as checkpoints
from charlm.lm import threads
from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import Config
from charlm.lm.data import Corpus
from charlm.lm.evaluate import evaluate, predictions
from charlm.lm.examples import Examples, Sequences, sample_rows
from charlm.lm.metrics import MetricsLog
from charlm.lm.models import CountModel, Mixture, build_model
from charlm.lm.stop import Interrupted, StopRequest

STEP_DECAY = 0.1  # factor of the learning rate after half of the steps with schedule "step", as in makemore's lecture


@dataclass(frozen=True)
class Progress:
    """One report of a run: the loss of `split` at `step` in nats per character, and the speed of its computation.

    `standard_error` is that of the loss if only a sample of the split was evaluated.
    """

    step: int
    split: str
    nats: float
    tokens_per_second: float
    standard_error: float | None = None


Report = Callable[[str, float, float], None]  # split, nats, tokens per second


def learning_rate_at(config: Config, step: int) -> float:
    """The learning rate of step `step`, 0 ≤ step < max_steps."""
    warmup = min(1.0, (step + 1) / (config.warmup_steps + 1))
    done = step / config.max_steps
    if config.schedule == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * done))
    elif config.schedule == "step":
        factor = 1.0 if done < 0.5 else STEP_DECAY
    else:
        factor = 1.0
    return config.learning_rate * warmup * factor


def build_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """Builds the optimizer of `config`; only the weights of linear layers have weight decay."""
    linear = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    decayed = [p for p in model.parameters() if id(p) in linear]
    others = [p for p in model.parameters() if id(p) not in linear]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate, fused=True)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.99), fused=True)


class TokenNoise:
    """Replaces each input token, with the given probability, by one drawn from the frequencies of `tokens`."""

    def __init__(self, probability: float, tokens: Tensor, vocab_size: int) -> None:
        self.probability = probability
        self.frequencies = torch.bincount(tokens, minlength=vocab_size).float()

    def __call__(self, idx: Tensor) -> Tensor:
        """idx (B, T) → (B, T) with noise from torch's global generator."""
        drawn = torch.multinomial(self.frequencies, idx.numel(), replacement=True).view(idx.shape)
        return torch.where(torch.rand(idx.shape, device=idx.device) < self.probability, drawn.to(idx.dtype), idx)


class Trainer:
    """One training run.

    Args:
        config: The configuration; its `format` is that of `corpus`.
        corpus: The data.
        directory: The folder for checkpoints and metrics.
        resumed: The checkpoint to resume from; None starts a new run.

    Raises:
        UserError: `resumed` was trained on other data, or the device cannot be used.
    """

    def __init__(self, config: Config, corpus: Corpus, directory: Path, resumed: Checkpoint | None = None) -> None:
        self.config = config
        self.corpus = corpus
        self.directory = directory
        self.device = usable_device(config.device)
        vocabulary = corpus.vocabulary
        self.model_config = config.model_config(len(vocabulary), vocabulary.pad_token)
        with self._own_randomness():
            torch.manual_seed(config.seed)
            self.model = build_model(**self.model_config).to(self.device)
            self.random_state = self._get_random_state()  # state for dropout and noise while `run` is not active
        if isinstance(self.model, Mixture) and resumed is None:
            self.model.fit(corpus.examples("train", self.model.ngram.block_size).to(self.device))
        self.batches = torch.Generator().manual_seed(config.seed)
        self.step = 0
        self.loss_sum = torch.zeros((), device=self.device)  # over the loss_steps steps since the last report
        self.loss_steps = 0
        self.is_evaluation_due = False  # whether the weights after `step` have yet to be evaluated
        self.best_step: int | None = None
        self.best_nats: float | None = None
        self.dev_error: float | None = None  # the standard error of the last evaluation, if it was of a sample
        self.best_weights = copy.deepcopy(self.model.state_dict())
        self._metrics: MetricsLog | None = None  # the log of the last `run`
        self.optimizer = None if isinstance(self.model, CountModel) else build_optimizer(self.model, config)
        if resumed is not None:
            self._restore(resumed)

    def run(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        stop: StopRequest | None = None,
        on_advice: Callable[[str], None] | None = None,
    ) -> bool:
        """Trains until max_steps, or until `patience` evaluations in a row have not improved the loss on dev.

        The state is saved with each evaluation and at the end. Afterwards `self.model` is the best model on dev, in
        evaluation mode.

        Args:
            on_progress: Called with each reported loss.
            stop: A request to stop early, which is checked after every step.
            on_advice: Called with a recommendation if the run would be faster with one thread.

        Returns:
            Whether the run is finished; False if `stop` ended it.
        """
        with MetricsLog(self.directory, self.step) as metrics, self._own_randomness():
            self._metrics = metrics

            def report(split: str, nats: float, tokens_per_second: float) -> None:
                metrics.write(self.step, split, nats, tokens_per_second)
                if on_progress is not None:
                    error = self.dev_error if split == "dev" else None
                    on_progress(Progress(self.step, split, nats, tokens_per_second, error))

            self._set_random_state(self.random_state)
            if self.optimizer is None:
                self._count(report)
            else:
                self._optimize(self.optimizer, report, stop or StopRequest(), on_advice)
            self.random_state = self._get_random_state()
        self.model.load_state_dict(self.best_weights)
        self.model.eval()
        return self._is_finished()

    def save(self) -> None:
        """Writes the state after `self.step` steps to `self.directory`."""
        model = self.model.state_dict()
        training = {}
        if self.optimizer is not None:
            training |= {f"weights.{name}": tensor for name, tensor in model.items()}
            for index, state in self.optimizer.state_dict()["state"].items():
                tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
                training |= {f"optimizer.{index}.{key}": value for key, value in tensors.items()}
        training |= {f"random.{name}": state for name, state in self._get_random_state().items()}
        training["random.batches"] = self.batches.get_state()
        training["loss_sum"] = self.loss_sum
        training["loss_steps"] = torch.tensor(self.loss_steps)
        training["is_evaluation_due"] = torch.tensor(self.is_evaluation_due)
        checkpoints.save(
            self.directory,
            Checkpoint(
                step=self.step,
                config=self.config,
                model=self.model_config,
                vocabulary=self.corpus.vocabulary,
                digest=self.corpus.digest,
                best_step=self.best_step,
                best_nats=self.best_nats,
                weights=model if self.best_step is None else self.best_weights,
                training=training,
            ),
        )
        if self._metrics is not None:
            self._metrics.checkpointed()

    def _restore(self, saved: Checkpoint) -> None:
        """Restores the state of `save`, with tensors on the device of this run."""
        if saved.digest != self.corpus.digest:
            raise UserError("the data or its split is not the one that the checkpoint was trained on: give that data")
        tensors = saved.training
        try:
            self.step, self.best_step, self.best_nats = saved.step, saved.best_step, saved.best_nats
            self.model.load_state_dict(saved.weights if self.optimizer is None else _strip_prefix(tensors, "weights."))
            self.best_weights = {name: tensor.to(self.device) for name, tensor in saved.weights.items()}
            self.batches.set_state(tensors["random.batches"])
            self.random_state |= _strip_prefix(tensors, "random.")
            self.loss_sum.copy_(tensors["loss_sum"])
            self.loss_steps = int(tensors["loss_steps"].item())
            if "is_evaluation_due" in tensors:
                self.is_evaluation_due = bool(tensors["is_evaluation_due"].item())
        except (KeyError, RuntimeError) as error:
            raise UserError(f"the checkpoint does not fit its own config: {error}") from error
        if self.optimizer is not None:
            state: dict[int, dict[str, Tensor]] = {}
            for name, tensor in _strip_prefix(tensors, "optimizer.").items():
                index, key = name.split(".", 1)
                state.setdefault(int(index), {})[key] = tensor
            groups = self.optimizer.state_dict()["param_groups"]
            self.optimizer.load_state_dict({"state": state, "param_groups": groups})

    def _count(self, report: Report) -> None:
        """Trains a count model; this takes one step, which cannot be interrupted and resumed."""
        if self.step < self.config.max_steps:
            self.model.fit(predictions(self.model, self.corpus, "train").to(self.device))
            self.step = self.config.max_steps
            self._evaluate_and_save(self._dev(), report, StopRequest())

    def _optimize(
        self,
        optimizer: torch.optim.Optimizer,
        report: Report,
        stop: StopRequest,
        on_advice: Callable[[str], None] | None,
    ) -> None:
        config, model = self.config, self.model
        rows = self.corpus.sequences if model.predicts_every_position else self.corpus.examples
        noise = None
        try:
            with stop.interrupting():
                train, dev = rows("train", config.block_size).to(self.device), self._dev()
                if config.token_noise:
                    tokens = self.corpus.examples("train", block_size=1).targets.to(self.device)
                    noise = TokenNoise(config.token_noise, tokens, model.vocab_size)
                if on_advice is not None:
                    self._advise(train, on_advice)
        except Interrupted:
            self.save()
            return
        loss_of = model.loss
        if config.compile:
            loss_of = torch.compile(loss_of, dynamic=model.predicts_every_position)  # batches differ in width
        parameters = list(model.parameters())
        model.train()
        if self.is_evaluation_due:
            self._evaluate_and_save(dev, report, stop)
        clock, tokens = time.perf_counter(), 0
        while not self._is_finished() and stop.signal is None:
            rate = learning_rate_at(config, self.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # At batch size 32 a step is mostly overhead: this loop takes a fiftieth of the time of
            # optimizer.zero_grad().
            for parameter in parameters:
                parameter.grad = None
            tokens += self._backward(loss_of, train, noise)
            if config.grad_clip:
                nn.utils.clip_grad_norm_(parameters, config.grad_clip)
            optimizer.step()
            self.loss_steps += 1
            self.step += 1
            last = self.step == config.max_steps
            if self.step % config.log_interval == 0 or last:
                nats = self._take_mean_loss()
                now = time.perf_counter()
                report("train", nats, tokens / (now - clock))
                clock, tokens = now, 0
            if self.step % config.steps_between_evaluations == 0 or last:
                paused = time.perf_counter()
                self.is_evaluation_due = True
                self._evaluate_and_save(dev, report, stop)
                clock += time.perf_counter() - paused
        if not self._is_finished():
            self.save()

    def _advise(self, train: Examples | Sequences, on_advice: Callable[[str], None]) -> None:
        """Times a few steps of a copy of the model; the run itself is not changed."""
        too_short = self.config.max_steps - self.step < threads.MIN_STEPS
        if too_short or self.device.type != "cpu" or self.config.compile or torch.get_num_threads() == 1:
            return
        model = copy.deepcopy(self.model).train()
        idx, targets, _ = train.select(torch.arange(self.config.batch_size) % len(train))

        def step() -> None:
            with self._precision():
                loss = model.loss(idx, targets)
            loss.backward()

        with self._own_randomness():
            advice = threads.advice(step)
        if advice is not None:
            on_advice(advice)

    def _backward(
        self, loss_of: Callable[..., Tensor], train: Examples | Sequences, noise: TokenNoise | None = None
    ) -> int:
        """Computes the gradients of one step and adds its loss to loss_sum; returns the number of tokens."""
        config = self.config
        count = config.batch_size * config.gradient_accumulation_steps
        rows = torch.randint(len(train), (count,), generator=self.batches)
        # At batch size 32 a step is mostly overhead: splitting one batch into one part takes 10 µs, and so does
        # entering a disabled autocast.
        parts = rows.split(config.batch_size) if config.gradient_accumulation_steps > 1 else [rows]
        batches = [train.select(part) for part in parts]
        total = sum(tokens for _, _, tokens in batches)
        for idx, targets, tokens in batches:
            if noise is not None:
                idx = noise(idx)
            with self._precision():
                loss = loss_of(idx, targets)
            if len(batches) > 1:
                loss = loss * (tokens / total)
            loss.backward()
            self.loss_sum += loss.detach()
        return total

    def _precision(self) -> AbstractContextManager[Any]:
        """The context for computing a loss: autocast to bfloat16, or none."""
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    def _is_finished(self) -> bool:
        """Whether max_steps are done and evaluated, or the patience is exhausted."""
        config = self.config
        if self.is_evaluation_due:
            return False
        if self.step >= config.max_steps:
            return True
        if config.patience is None or self.best_step is None:
            return False
        return self.step - self.best_step >= config.patience * config.steps_between_evaluations

    def _take_mean_loss(self) -> float:
        """Returns and resets the mean loss since the last call; only here does the loop synchronize with the device."""
        nats = self.loss_sum.item() / self.loss_steps
        if not math.isfinite(nats):
            raise UserError(f"the loss became {nats} by step {self.step}: try a lower --learning-rate")
        self.loss_sum.zero_()
        self.loss_steps = 0
        return nats

    def _evaluate_and_save(self, dev: Examples | Sequences, report: Report, stop: StopRequest) -> None:
        """Evaluates on dev and saves; if `stop` interrupts the evaluation, it stays due and nothing is saved."""
        start = time.perf_counter()
        try:
            with stop.interrupting():
                result = evaluate(self.model, dev, "dev")
        except Interrupted:
            return
        self.is_evaluation_due, self.dev_error = False, result.standard_error
        seconds = time.perf_counter() - start
        if not math.isfinite(result.nats):
            remedy = "an --add-k closer to 1" if isinstance(self.model, CountModel) else "a lower --learning-rate"
            raise UserError(f"the loss on dev became {result.nats} by step {self.step}: try {remedy}")
        if self.best_nats is None or result.nats < self.best_nats:
            self.best_step, self.best_nats = self.step, result.nats
            self.best_weights = copy.deepcopy(self.model.state_dict())
        # The report comes first: if the save then fails, resuming drops the extra line of metrics. In the other order
        # the line would be missing.
        report("dev", result.nats, result.tokens / seconds)
        self.save()

    def _dev(self) -> Examples | Sequences:
        return sample_rows(predictions(self.model, self.corpus, "dev"), self.config.eval_tokens).to(self.device)

    # ---- the state of torch's global generators, which dropout and noise use

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Restores the caller's state of the global generators afterwards."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            yield

    def _get_random_state(self) -> dict[str, Tensor]:
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: dict[str, Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"], self.device)


def usable_device(name: str) -> torch.device:
    """The torch device called `name`.

    Raises:
        UserError: torch does not know the device, or this machine does not have it.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()  # refuses "meta", whose tensors have no values
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].split(". ")[0].rstrip(".")
        raise UserError(f"device {name!r} cannot be used here: {reason}") from error
    return device


def _strip_prefix(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose name begins with `prefix`, by their name without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
