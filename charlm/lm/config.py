"""The configuration of a training run, with the defaults of the command line."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from charlm._errors import UserError
from charlm.lm.models import MODELS, CountModel
from charlm.lm.models.ngram import SMOOTHINGS
from charlm.lm.models.recurrent import Recurrent
from charlm.ngrams import MAX_LENGTH

OPTIMIZERS = ("adamw", "sgd")
SCHEDULES = ("cosine", "step", "constant")
DTYPES = ("float32", "bfloat16")
RECURRENT = ("rnn", "gru", "lstm")

# Defaults by model type, chosen on makemore's names for two cores. The defaults of `Config` itself are those of the MLP
# and apply to every type unless they are listed here.
SEQUENCES = {"block_size": 32, "n_embd": 64, "max_steps": 3000, "batch_size": 256, "learning_rate": 3e-3}
TYPE_DEFAULTS: dict[str, dict[str, Any]] = {
    "wavenet": {
        "n_embd": 24,
        "n_hidden": 256,
        "dropout": 0.15,
        "max_steps": 8000,
        "batch_size": 512,
        "learning_rate": 3e-3,
    },
    "bow": SEQUENCES,
    **{type: {**SEQUENCES, "n_hidden": 192, "n_layer": 1, "dropout": 0.3, "grad_clip": 1.0} for type in RECURRENT},
    "gpt": {**SEQUENCES, "dropout": 0.15, "max_steps": 4000, "grad_clip": 1.0},
}
# The constructor arguments of each model beyond those that all models take.
MODEL_OPTIONS: dict[str, tuple[str, ...]] = {
    "mlp": ("n_embd", "n_hidden", "batch_norm", "dropout"),
    "wavenet": ("n_embd", "n_hidden", "dropout"),
    "bow": ("n_embd", "n_hidden", "dropout"),
    **dict.fromkeys(RECURRENT, ("n_layer", "n_embd", "n_hidden", "dropout")),
    "gpt": ("n_layer", "n_head", "n_embd", "dropout"),
    "ngram": ("order", "smoothing", "add_k"),
}
COUNT_OPTIONS = ("add_k",)
NETWORKS = ("mlp", "wavenet", "bow", *RECURRENT, "gpt")
# Options that only networks have. (Every type has add_k, because it also smooths the baselines in the tables.)
NETWORK_OPTIONS = (
    "init_from",
    "block_size",
    "token_noise",
    "max_steps",
    "batch_size",
    "gradient_accumulation_steps",
    "optimizer",
    "learning_rate",
    "weight_decay",
    "grad_clip",
    "schedule",
    "warmup_steps",
    "eval_interval",
    "patience",
    "log_interval",
    "dtype",
    "compile",
)

INT64 = range(-(2**63), 2**63)
SEEDS = range(-(2**63), 2**64)  # the range of torch.manual_seed


def check_numbers(values: Mapping[str, Any]) -> None:
    """Raises UserError for an integer beyond 64 bits, for infinity and for NaN."""
    for name, value in values.items():
        allowed = SEEDS if name == "seed" else INT64
        if isinstance(value, int) and value not in allowed:
            raise UserError(f"{name} is {value}, but must be an integer of 64 bits")
        if isinstance(value, float) and not math.isfinite(value):
            raise UserError(f"{name} is {value}, but must be a finite number")


def check_options(type: str, given: Iterable[str]) -> None:
    """Raises UserError for options that the model `type` does not have, and names the types that have them."""
    foreign = {name: types for name in given if type not in (types := types_with(name))}
    if foreign and type in MODELS:
        options = ", ".join(f"--{name.replace('_', '-')} ({' and '.join(types)})" for name, types in foreign.items())
        raise UserError(f"{type} does not have these options (the types that have them in brackets): {options}")


def types_with(option: str) -> tuple[str, ...]:
    """The model types whose runs depend on `option`, a field of Config."""
    if option in NETWORK_OPTIONS:
        return NETWORKS
    own = tuple(type for type, options in MODEL_OPTIONS.items() if option in options)
    return own if own and option not in COUNT_OPTIONS else tuple(MODELS)


@dataclass(frozen=True)
class Config:
    """One training run. Names follow makemore and nanoGPT where these have the option.

    Attributes:
        input_file: Path of the corpus; None is the names shipped with charlm.
        format: "line" or "text"; None guesses.
        split_seed: Random seed of the 80/10/10 split of items; 42 is makemore's.
        dedup: Keep only the first of equal items.
        column: The column of a .jsonl, .parquet, .csv or .tsv file, see `charlm.lm.sources`.
        type: A key of `charlm.lm.models.MODELS`.
        init_from: Folder of the run whose weights the network begins with, see `charlm.lm.init_from`.
        block_size: Length of the context in characters.
        n_embd: Width of an embedding.
        n_hidden: Width of the tanh layers of the MLP, the WaveNet and the BoW, and of the state of RNN, GRU and LSTM.
        batch_norm: Batch normalization before the tanh of the MLP.
        n_layer: Number of layers of RNN, GRU and LSTM, and of GPT blocks.
        n_head: Attention heads per GPT block.
        dropout: Dropout probability of hidden units.
        token_noise: Probability that training replaces an input token, padding included, by one drawn from the token
            frequencies (unigram noising, Xie et al. 2017, "Data Noising as Smoothing in Neural Network Language
            Models"). Targets are not changed.
        mix_ngram: Order of a Kneser–Ney n-gram that is mixed with the network, see `Mixture`; 0 for none. None, the
            default of the command, chooses it on a held-out part of train.
        mix_tokens: The most characters of train that this n-gram counts, the last ones.
        order: Length of the longest n-gram of the n-gram model, whose block_size is always order - 1.
        smoothing: Smoothing of the n-gram model, "kneser-ney" or "add-k".
        add_k: Constant added to every count of a count model.
        max_steps: Number of optimizer steps, at which the schedule ends.
        batch_size: Rows per forward pass: examples, or items or windows for the models that predict every position.
        gradient_accumulation_steps: Batches per optimizer step; each token of them has the same weight.
        optimizer: "adamw", or "sgd" without momentum as in makemore's lecture.
        learning_rate: Peak learning rate of the schedule.
        weight_decay: Weight decay of linear layers; biases, norms and embeddings do not decay.
        grad_clip: Largest norm of a step's gradient; 0 disables clipping.
        schedule: "cosine" decays to 0, "step" divides the rate by 10 after half of the steps, "constant" keeps it.
        warmup_steps: Number of steps of linear warm-up.
        eval_interval: Steps between two evaluations on dev, each of which saves; None is a tenth of max_steps.
        eval_tokens: Number of predictions of dev that an evaluation during training takes; a larger dev is sampled, the
            same sample each time. The result at the end is of all.
        patience: Number of evaluations without a better loss on dev after which training stops; None disables this.
        log_interval: Steps between two reports of the training loss.
        seed: Random seed of initialization, batches, dropout and noise.
        device: Device to train on, such as "cpu" or "cuda:1".
        dtype: "bfloat16" trains under autocast; weights and evaluation stay float32.
        compile: Train through torch.compile.
    """

    input_file: str | None = None
    format: str | None = None
    split_seed: int = 42
    dedup: bool = False
    column: str = "text"
    type: str = "mlp"
    init_from: str | None = None
    block_size: int = 8
    n_embd: int = 16
    n_hidden: int = 512
    batch_norm: bool = False
    n_layer: int = 4
    n_head: int = 4
    dropout: float = 0.1
    token_noise: float = 0.0
    mix_ngram: int | None = 0
    mix_tokens: int = 4_000_000
    order: int = 6
    smoothing: str = "kneser-ney"
    add_k: float = 1.0
    max_steps: int = 2500
    batch_size: int = 1024
    gradient_accumulation_steps: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-2
    weight_decay: float = 0.1
    grad_clip: float = 0.0
    schedule: str = "cosine"
    warmup_steps: int = 200
    eval_interval: int | None = None
    eval_tokens: int = 1_000_000
    patience: int | None = None
    log_interval: int = 100
    seed: int = 1337
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False

    def __post_init__(self) -> None:
        check_numbers(vars(self))
        sizes = ("block_size", "n_embd", "n_hidden", "n_layer", "n_head", "batch_size", "gradient_accumulation_steps")
        for name in (*sizes, "max_steps", "log_interval", "mix_tokens", "eval_tokens"):
            self._check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("eval_interval", "patience"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 1, "at least 1")
        for name in ("warmup_steps", "weight_decay", "grad_clip"):
            self._check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("learning_rate", "add_k"):
            self._check(name, getattr(self, name) > 0, "above 0")
        for name in ("dropout", "token_noise"):
            self._check(name, 0 <= getattr(self, name) < 1, "at least 0 and below 1")
        self._check("type", self.type in MODELS, f"one of {', '.join(MODELS)}")
        self._check("smoothing", self.smoothing in SMOOTHINGS, f"one of {', '.join(SMOOTHINGS)}")
        self._check("optimizer", self.optimizer in OPTIMIZERS, f"one of {', '.join(OPTIMIZERS)}")
        self._check("schedule", self.schedule in SCHEDULES, f"one of {', '.join(SCHEDULES)}")
        self._check("dtype", self.dtype in DTYPES, f"one of {', '.join(DTYPES)}")
        self._check("order", 1 <= self.order <= MAX_LENGTH, f"at least 1 and at most {MAX_LENGTH}")
        has_batch_norm = self.batch_norm or self.type == "wavenet"
        self._check("batch_size", not has_batch_norm or self.batch_size >= 2, "at least 2 with batch norm")
        if self.type == "wavenet":
            is_power = self.block_size >= 2 and self.block_size & (self.block_size - 1) == 0
            self._check("block_size", is_power, "a power of two for the wavenet")
        if self.type == "ngram":
            object.__setattr__(self, "block_size", max(1, self.order - 1))
        if self.mix_ngram is not None:
            self._check("mix_ngram", self.mix_ngram >= 0, "at least 0")
            most = self.largest_mixed_order
            self._check("mix_ngram", self.mix_ngram <= most, f"at most {most} for a block_size of {self.block_size}")
        is_network = not issubclass(MODELS[self.type], CountModel)
        self._check("mix_ngram", self.mix_ngram == 0 or is_network, f"0 for type {self.type}, which counts")
        is_recurrent = issubclass(MODELS[self.type], Recurrent)
        loops = f"left out for the {self.type}: torch.compile would unroll its loop over time for every length"
        self._check("compile", not (self.compile and is_recurrent), loops)
        if self.type == "gpt":
            self._check("n_head", self.n_embd % self.n_head == 0, f"a divisor of n_embd, which is {self.n_embd}")

    def _check(self, name: str, holds: bool, must_be: str) -> None:
        if not holds:
            raise UserError(f"{name} is {getattr(self, name)}, but must be {must_be}")

    @property
    def steps_between_evaluations(self) -> int:
        """`eval_interval`, or its default."""
        return self.eval_interval or max(1, self.max_steps // 10)

    def model_config(self, vocab_size: int, pad_token: int) -> dict[str, Any]:
        """The arguments of `build_model`."""
        own = MODEL_OPTIONS.get(self.type, COUNT_OPTIONS)
        mixed = {"mix_ngram": self.mix_ngram} if self.mix_ngram else {}
        return {
            "type": self.type,
            "vocab_size": vocab_size,
            "block_size": self.block_size,
            "pad_token": pad_token,
            **{name: getattr(self, name) for name in own},
            **mixed,
        }

    @property
    def largest_mixed_order(self) -> int:
        """The largest `mix_ngram`: beside a model that predicts every position, an n-gram sees no more than a row."""
        return min(self.block_size + 1, MAX_LENGTH) if MODELS[self.type].predicts_every_position else MAX_LENGTH

    @property
    def label(self) -> str:
        """The name of the model in tables: "mlp", or "mlp + 6-gram"."""
        return f"{self.type} + {self.mix_ngram}-gram" if self.mix_ngram else self.type

    @classmethod
    def of_type(cls, type: str, **given: Any) -> Config:
        """The defaults of the model `type`, overridden by `given`."""
        return cls(type=type, **{**TYPE_DEFAULTS.get(type, {}), **given})

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The inverse of `to_dict`: a missing key takes its default, an unknown one raises TypeError."""
        return cls(**values)

    @classmethod
    def names(cls) -> list[str]:
        return [field.name for field in fields(cls)]


@dataclass(frozen=True)
class RunOptions:
    """The options of a run that do not change what it computes: arguments of `charlm.train`, which documents them."""

    resume: bool = False
    overwrite: bool = False
    force: bool = False
    no_cache: bool = False
    no_diagnostics: bool = False
    tensorboard: bool = False
    sample_every: int = 0
    threads: int | None = None
    memory: str | None = None


SWITCHES = tuple(name for name, value in vars(RunOptions()).items() if value is False)
