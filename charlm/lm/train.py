"""The training loop over random batches, which can be stopped and resumed exactly.

The state after step s consists of the weights, the optimizer state, the state of the generator of the batches, the loss
summed since the last report, the best weights so far, and a flag for an evaluation that a signal interrupted. A batch
is a pure function of the state of its generator; dropout and noise are functions of seed, step and sample (see
`models.dropout`). Therefore a resumed run has bit for bit the losses of an uninterrupted one, on the same machine with
the same number of threads.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from charlm._errors import UserError
from charlm.lm import checkpoint as checkpoints
from charlm.lm import held_out, threads
from charlm.lm.calibration import Calibration
from charlm.lm.checkpoint import Checkpoint
from charlm.lm.config import Config
from charlm.lm.data import Corpus
from charlm.lm.diagnostics import Diagnostics
from charlm.lm.evaluate import Evaluation, evaluate, predictions, rows_per_pass
from charlm.lm.examples import Examples, Sequences, sample_rows
from charlm.lm.init_from import copy_weights
from charlm.lm.metrics import MetricsLog
from charlm.lm.models import CountModel, LanguageModel, Mixture, build_model
from charlm.lm.models.dropout import sample_keys
from charlm.lm.optimizer import build_optimizer, learning_rate_at
from charlm.lm.parallel import SharedLoss, check_parallel, distribute, gathered, is_sharded, parts_to_save, scattered
from charlm.lm.processes import Processes
from charlm.lm.stop import Interrupted, StopRequest
from charlm.lm.tensorboard import TensorBoard
from charlm.lm.token_noise import COUNTED_TOKENS, TokenNoise


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


class Trainer:
    """One training run.

    Args:
        config: The configuration; its `format` is that of `corpus`.
        corpus: The data.
        directory: The folder for checkpoints and metrics.
        resumed: The checkpoint to resume from; None starts a new run.
        processes: The processes that train this run together, each with a trainer of equal arguments.
        parallel: "ddp" replicates the model in each process, "fsdp" shards that of type gpt over them.
        memory: The most bytes for counting the n-grams of an `NGram`, with sorted runs in `directory`; None counts in
            memory.
        diagnostics: Whether to record activations, gradients and updates, see `charlm.lm.diagnostics`.
        initial: The checkpoint of `config.init_from`, whose weights a new run begins with; not for a resumed one.
        tensorboard: Whether to write event files, see `charlm.lm.tensorboard`.

    Raises:
        UserError: `resumed` was trained on other data, the device cannot be used, or the processes cannot train this
            model together.
    """

    def __init__(
        self,
        config: Config,
        corpus: Corpus,
        directory: Path,
        resumed: Checkpoint | None = None,
        *,
        processes: Processes | None = None,
        parallel: str = "ddp",
        memory: int | None = None,
        diagnostics: bool = True,
        initial: Checkpoint | None = None,
        tensorboard: bool = False,
    ) -> None:
        self.processes = processes or Processes()
        check_parallel(parallel, config, self.processes)
        if config.mix_ngram is None:
            order, most = held_out.choose_order(corpus, config.largest_mixed_order)
            config = replace(config, mix_ngram=order, mix_tokens=min(config.mix_tokens, most))
        self.config = config
        self.corpus = corpus
        self.directory = directory
        self.memory = memory
        self.parallel = parallel
        self.commands = () if resumed is None else resumed.commands  # what the checkpoints say of the run's start
        self.diagnostics = diagnostics
        self.tensorboard = tensorboard
        self.board: TensorBoard | None = None  # during `run`, in one process
        self.device = usable_device(self.processes.device(config.device))
        vocabulary = corpus.vocabulary
        self.model_config = config.model_config(len(vocabulary), vocabulary.pad_token)
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            self.model = build_model(**self.model_config).to(self.device)
        self.origin: dict[str, str] = {}  # what the checkpoints say of `initial`
        if initial is not None:
            network = self.model.network if isinstance(self.model, Mixture) else self.model
            self.origin = {"init_from": f"{config.init_from}: {copy_weights(initial, network, vocabulary)}"}
        if isinstance(self.model, Mixture) and resumed is None:
            end = corpus.tokens("train")
            self.model.fit(held_out.counted(corpus, config.mix_ngram, end, config.mix_tokens).to(self.device))
        self._calibration: Calibration | None = None
        distribute(self.model, parallel, self.processes, self.device)
        self.batches = torch.Generator().manual_seed(config.seed)
        self.step = 0
        # The loss of this process, over the loss_steps steps since the last report.
        self.loss_sum = torch.zeros((), device=self.device)
        self.loss_steps = 0
        self.is_evaluation_due = False  # whether the weights after `step` have yet to be evaluated
        self.best_step: int | None = None
        self.best_nats: float | None = None
        self.dev_error: float | None = None  # the standard error of the last evaluation, if it was of a sample
        self.best_weights = copy.deepcopy(self.model.state_dict())
        self._metrics: MetricsLog | None = None  # the logs of the last `run`
        self._diagnostics: Diagnostics | None = None
        self._writing: Future[None] | None = None  # the checkpoint that is being written
        self._writers = self.processes.in_a_thread()
        self.optimizer = None if isinstance(self.model, CountModel) else build_optimizer(self.model, config)
        if resumed is not None:
            self._restore(resumed)

    def run(
        self,
        on_progress: Callable[[Progress], None] | None = None,
        stop: StopRequest | None = None,
        on_advice: Callable[[str], None] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> bool:
        """Trains until max_steps, or until `patience` evaluations in a row have not improved the loss on dev.

        The state is saved with each evaluation and at the end. Afterwards `self.model` is the best model on dev, in
        evaluation mode.

        Args:
            on_progress: Called with each reported loss.
            stop: A request to stop early, which is checked after every step.
            on_advice: Called with a recommendation if the run would be faster with one thread.
            on_step: Called after every step of an optimizer; it must not change the state of the run.

        Returns:
            Whether the run is finished; False if `stop` ended it.
        """
        with ExitStack() as stack:
            if self.processes.rank == 0:
                self._metrics = stack.enter_context(MetricsLog(self.directory, self.step))
                self._diagnostics = stack.enter_context(Diagnostics(self.directory, self.step))
                self.board = TensorBoard(self.directory, self.step, self.tensorboard)
                stack.callback(self.board.close)
            stack.callback(self.finish_saving)

            def report(split: str, nats: float, tokens_per_second: float) -> None:
                if self._metrics is not None:
                    self._metrics.write(self.step, split, nats, tokens_per_second)
                if self.board is not None:
                    values = {f"loss/{split}": nats, f"tokens_per_second/{split}": tokens_per_second}
                    self.board.scalars(self.step, values)
                if on_progress is not None:
                    error = self.dev_error if split == "dev" else None
                    on_progress(Progress(self.step, split, nats, tokens_per_second, error))

            if self.optimizer is None:
                self._count(report)
            else:
                self._optimize(self.optimizer, report, stop or StopRequest(), on_advice, on_step)
        self.model.load_state_dict(self.best_weights)
        self.model.eval()
        return self._is_finished()

    def evaluate_best(self, on_progress: Callable[[int, int], None] = lambda done, total: None) -> Evaluation:
        """The loss of the best weights on all of dev; after `run`, by all processes together.

        Args:
            on_progress: Called with the number of predictions of this process that are done, and of all its own.
        """
        return self._of_all(self._evaluate(self._predictions("dev"), on_progress))

    def whole_model(self) -> LanguageModel | None:
        """The best model, whole on rank 0; None on other ranks of a sharded run. All processes must call it."""
        if not is_sharded(self.model):
            return self.model
        weights = gathered(self.best_weights, self.processes)
        if self.processes.rank != 0:
            return None
        model = build_model(**self.model_config)
        model.load_state_dict(weights)
        return model.to(self.device).eval()

    # ---- checkpoints

    def save(self) -> None:
        """Begins to write the state after `self.step` steps to `self.directory`; `finish_saving` waits for the end.

        Training goes on when the state is copied. All processes must call it; each copies and writes its part.
        """
        self.finish_saving()  # before the copies: a checkpoint and its file are in memory once
        (nats,) = self.processes.sums(self.loss_sum.item())
        self.loss_sum.fill_(nats if self.processes.rank == 0 else 0.0)  # as after a resume, for the order of additions
        weights = self.model.state_dict() if self.best_step is None else self.best_weights
        saved = Checkpoint(
            step=self.step,
            config=self.config,
            model=self.model_config,
            vocabulary=self.corpus.vocabulary,
            digest=self.corpus.digest,
            best_step=self.best_step,
            best_nats=self.best_nats,
            weights=parts_to_save(weights, self.processes.rank),
            training=parts_to_save(self._training_state(), self.processes.rank),
            commands=self.commands,
        )
        writer = ThreadPoolExecutor(max_workers=1)
        self._writing = writer.submit(self._write, saved)
        writer.shutdown(wait=False)

    def finish_saving(self) -> None:
        """Waits until the last `save` is on disk, and raises its error if it failed."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, saved: Checkpoint) -> None:
        checkpoints.save(self.directory, saved, self._writers)
        for log in (self._metrics, self._diagnostics, self.board):
            if log is not None:
                log.checkpointed()

    def _training_state(self) -> dict[str, Tensor]:
        """The state for resuming by name, without copies."""
        state = {}
        if self.optimizer is not None:
            state |= {f"weights.{name}": tensor for name, tensor in self.model.state_dict().items()}
            for index, moments in self.optimizer.state_dict()["state"].items():
                tensors = {key: value for key, value in moments.items() if isinstance(value, Tensor)}
                state |= {f"optimizer.{index}.{key}": value for key, value in tensors.items()}
        return state | {
            "random.batches": self.batches.get_state(),
            "loss_sum": self.loss_sum,
            "loss_steps": torch.tensor(self.loss_steps),
            "is_evaluation_due": torch.tensor(self.is_evaluation_due),
        }

    def _restore(self, saved: Checkpoint) -> None:
        """Restores the state of `save`, with tensors on the device of this run."""
        if saved.digest != self.corpus.digest:
            raise UserError("the data or its split is not the one that the checkpoint was trained on: give that data")
        tensors = saved.training
        try:
            self.step, self.best_step, self.best_nats = saved.step, saved.best_step, saved.best_nats
            state = self.model.state_dict()
            current = saved.weights.items() if self.optimizer is None else _with_prefix(tensors, "weights.")
            self.model.load_state_dict(scattered(current, state))
            self.best_weights = scattered(saved.weights.items(), state)
            self.batches.set_state(tensors["random.batches"])
            if self.processes.rank == 0:
                self.loss_sum.copy_(tensors["loss_sum"])
            self.loss_steps = int(tensors["loss_steps"].item())
            if "is_evaluation_due" in tensors:
                self.is_evaluation_due = bool(tensors["is_evaluation_due"].item())
            if self.optimizer is not None:
                moments: dict[int, dict[str, Tensor]] = {}
                parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
                for name, tensor in _with_prefix(tensors, "optimizer."):
                    index, key = name.split(".", 1)
                    parameter = parameters[int(index)]
                    shape = torch.Size() if key == "step" else parameter.shape
                    if tensor.shape != shape:
                        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, not {tuple(shape)}")
                    like = {} if key == "step" else {key: parameter}
                    moments.setdefault(int(index), {}).update(scattered([(key, tensor)], like))
                groups = self.optimizer.state_dict()["param_groups"]
                self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        except (LookupError, ValueError, RuntimeError) as error:
            raise UserError(f"the checkpoint does not fit its own config: {error}") from error

    # ---- training

    def _count(self, report: Report) -> None:
        """Trains a count model; this takes one step, which cannot be interrupted and resumed."""
        if self.step < self.config.max_steps:
            rows = self._predictions("train")
            if self.memory is None:
                self.model.fit(rows)
            else:
                try:
                    self.model.fit(rows, memory=self.memory, directory=self.directory)
                except ValueError as error:  # too little memory
                    raise UserError(str(error)) from error
            self.step = self.config.max_steps
            self._evaluate_and_save(self._dev(), report, StopRequest())

    def _optimize(
        self,
        optimizer: torch.optim.Optimizer,
        report: Report,
        stop: StopRequest,
        on_advice: Callable[[str], None] | None,
        on_step: Callable[[], None] | None,
    ) -> None:
        config, model = self.config, self.model
        train, dev, noise = None, None, None
        with suppress(Interrupted), stop.interrupting():
            rows = self.corpus.sequences if model.predicts_every_position else self.corpus.examples
            train, dev = rows("train", config.block_size).to(self.device), self._dev()
            if isinstance(model, Mixture):
                train = held_out.before(train, held_out.training_end(self.corpus, config.block_size))
            if config.token_noise:
                chunks = self.corpus.examples("train", block_size=1).chunks(COUNTED_TOKENS)
                tokens = (targets.to(self.device) for _, targets in chunks)
                noise = TokenNoise(config.token_noise, tokens, model.vocab_size)
            if on_advice is not None:
                self._advise(train, on_advice)
        if self.processes.stopping(stop)() is not None or train is None or dev is None:
            self.save()
            return
        loss_of = model.loss
        if config.compile:
            loss_of = torch.compile(loss_of, dynamic=model.predicts_every_position)  # batches differ in width
        loss = SharedLoss(model, loss_of, self.processes)
        parameters = list(model.parameters())
        model.train()
        recording: Callable[[int], AbstractContextManager[Any]] = nullcontext
        if self.diagnostics and self._diagnostics is not None and not is_sharded(model):
            recording = self._diagnostics.watching(model, train, config)
        is_stopping = False
        if self.is_evaluation_due:
            is_stopping = not self._evaluate_and_save(dev, report, stop)
        clock, tokens = time.perf_counter(), 0
        while not self._is_finished() and not is_stopping:
            stopping = self.processes.stopping(stop)
            rate = learning_rate_at(config, self.step)
            for group in optimizer.param_groups:
                group["lr"] = rate
            # At batch size 32 a step is mostly overhead: this loop takes a fiftieth of the time of
            # optimizer.zero_grad().
            for parameter in parameters:
                parameter.grad = None
            tokens += self._backward(loss, train, noise)
            norm = None
            with recording(self.step + 1):
                if config.grad_clip:
                    norm = nn.utils.clip_grad_norm_(parameters, config.grad_clip)
                optimizer.step()
            self.loss_steps += 1
            self.step += 1
            is_stopping = stopping() is not None
            last = self.step == config.max_steps
            if self.step % config.log_interval == 0 or last:
                nats = self._take_mean_loss()
                now = time.perf_counter()
                report("train", nats, tokens / (now - clock))
                if self.board is not None and self.tensorboard:
                    values = {"learning_rate": rate, "gradient_norm": self._gradient_norm(norm)}
                    self.board.scalars(self.step, values)
                clock, tokens = now, 0
            if self.step % config.steps_between_evaluations == 0 or last:
                paused = time.perf_counter()
                self.is_evaluation_due = True
                is_stopping |= not self._evaluate_and_save(dev, report, stop)
                clock += time.perf_counter() - paused
            if on_step is not None:
                paused = time.perf_counter()
                on_step()
                clock += time.perf_counter() - paused
        if not self._is_finished():
            self.save()

    def _gradient_norm(self, norm: Tensor | None) -> float | None:
        """The norm of the gradient of the last step, for which `norm` is that before clipping."""
        if is_sharded(self.model):  # all processes would have to compute it
            return None
        if norm is None:
            norm = nn.utils.get_total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        return norm.item()

    def _advise(self, train: Examples | Sequences, on_advice: Callable[[str], None]) -> None:
        """Times a few steps of a copy of the model; the run itself is not changed."""
        is_long = self.config.max_steps - self.step >= threads.MIN_STEPS
        has_threads = self.device.type == "cpu" and torch.get_num_threads() > 1
        if not (is_long and has_threads) or self.processes.size > 1 or self.config.compile:
            return
        model = copy.deepcopy(self.model).train()
        idx, targets, _ = train.select(torch.arange(self.config.batch_size) % len(train))
        keys = sample_keys(self.config.seed, self.step, range(len(idx)), self.device)

        def step() -> None:
            with self._precision():
                loss = model.loss(idx, targets, keys=keys)
            loss.backward()

        advice = threads.advice(step)
        if advice is not None:
            on_advice(advice)

    def _backward(self, loss_of: SharedLoss, train: Examples | Sequences, noise: TokenNoise | None = None) -> int:
        """Computes the gradients of one step and adds its loss to loss_sum; returns the number of tokens.

        The rows are those of all processes, and each process computes its share of every accumulated batch. Each token
        of a step has the same weight: the gradients of SharedLoss are averages over the processes.
        """
        config, size = self.config, self.processes.size
        parts = config.gradient_accumulation_steps
        rows = torch.randint(len(train), (parts * config.batch_size,), generator=self.batches)
        # At batch size 32 a step is mostly overhead: counting takes 6 µs, and the keys take 10.
        is_shared = parts * size > 1
        total = int(train.count(rows).sum().item()) if is_shared else 0
        share, keys = self.processes.share(config.batch_size), None
        for part in range(parts):
            start = part * config.batch_size
            samples = range(start + share.start, start + share.stop)
            idx, targets, tokens = train.select(rows[samples.start : samples.stop])
            if config.dropout or noise is not None:
                keys = sample_keys(config.seed, self.step, samples, self.device)
            if noise is not None:
                idx = noise(idx, keys)
            with loss_of.exchanging(part == parts - 1):
                with self._precision():
                    loss = loss_of(idx, targets, keys=keys)
                if is_shared and tokens * size != total:
                    loss = loss * (tokens * size / total)
                loss.backward()
            self.loss_sum.add_(loss.detach(), alpha=1 / size)
        return total if is_shared else tokens

    def _precision(self) -> AbstractContextManager[Any]:
        """The context for computing a loss: autocast to bfloat16, or none."""
        if self.config.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)

    # ---- evaluation

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
        nats = self.processes.sums(self.loss_sum.item())[0] / self.loss_steps
        if not math.isfinite(nats):
            raise UserError(f"the loss became {nats} by step {self.step}: try a lower --learning-rate")
        self.loss_sum.zero_()
        self.loss_steps = 0
        return nats

    def _evaluate_and_save(self, dev: Examples | Sequences, report: Report, stop: StopRequest) -> bool:
        """Evaluates on dev and saves; if `stop` interrupts the evaluation, it stays due and nothing is saved.

        Returns:
            Whether dev was evaluated.
        """
        start = time.perf_counter()
        result = None
        # The processes of a sharded model exchange weights, so that none may leave the others.
        interrupts = StopRequest() if is_sharded(self.model) else stop
        with suppress(Interrupted), interrupts.interrupting():
            if isinstance(self.model, Mixture):  # fits its weights to the network
                self._calibration = self._calibration or Calibration(self.corpus, self.model, self.config.mix_tokens)
                self._calibration.fit(self.model)
            result = self._evaluate(dev)
        if self.processes.stopping(stop)() is not None or result is None:
            return False
        result = self._of_all(result)
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
        return True

    def _evaluate(
        self, dev: Examples | Sequences, on_progress: Callable[[int, int], None] = lambda done, total: None
    ) -> Evaluation:
        """The loss on this process's share of `dev`."""
        share = self.processes.share(len(dev))
        if is_sharded(self.model):  # every process must run the blocks equally often
            rows = rows_per_pass(self.model)
            most, own = (-(-count // rows) for count in (-(-len(dev) // self.processes.size), share.stop - share.start))
            for _ in range(most - own):
                evaluate(self.model, dev.slice(0, 1), "dev")
        if share.start == share.stop:
            return Evaluation("dev", dev.protocol, 0.0, 0)
        return evaluate(self.model, dev.slice(share.start, share.stop), "dev", on_progress)

    def _of_all(self, result: Evaluation) -> Evaluation:
        """The evaluation of all shares."""
        if self.processes.size == 1:
            return result
        # Of a sample the shares are strata, whose errors are independent.
        of_share = math.nan if result.standard_error is None else result.standard_error * result.tokens
        variance = of_share**2 if result.tokens else 0.0
        nats, tokens, variance = self.processes.sums(result.nats * result.tokens, result.tokens, variance)
        error = math.sqrt(variance) / tokens if math.isfinite(variance) else None
        return replace(result, nats=nats / tokens, tokens=round(tokens), standard_error=error)

    def _dev(self) -> Examples | Sequences:
        return sample_rows(self._predictions("dev"), self.config.eval_tokens)

    def _predictions(self, split: str) -> Examples | Sequences:
        return predictions(self.model, self.corpus, split).to(self.device)


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


def _with_prefix(tensors: Mapping[str, Tensor], prefix: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors whose name begins with `prefix`, one at a time, with their name without it."""
    return ((name.removeprefix(prefix), tensors[name]) for name in tensors if name.startswith(prefix))
