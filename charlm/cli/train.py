"""`charlm train`: starts a training run from its options, or resumes one from its checkpoint."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from charlm._errors import UserError
from charlm.cli.common import discard_stdout, new_console, print_samples
from charlm.cli.config_file import use_config_file
from charlm.lm.command import ONE_FORM, shell_command
from charlm.lm.config import DTYPES, NETWORKS, OPTIMIZERS, RECURRENT, SCHEDULES, TYPE_DEFAULTS, Config, RunOptions
from charlm.lm.defaults import OF_CORPUS
from charlm.lm.inputs import STREAM, flag, path_to_save

if TYPE_CHECKING:
    from rich.console import Console

    from charlm.lm.evaluate import Evaluation
    from charlm.lm.models import LanguageModel
    from charlm.lm.train import Trainer

DEFAULT_DIRECTORY = Path("out")
MAX_TIMEOUT = 1e6  # seconds
PASSAGE = 80  # length in characters of the samples that are printed after training on running text
DEFAULT = Config()
# The text of each option, by the panel of the help. Its type and its default are those of the argument of `train` with
# its name, or else those of the field of `Config` or `RunOptions`.
OPTIONS = {
    "Data": {
        "input_file": "Text file, also as .gz or .zst, table (--column), or folder of `charlm prepare`; - reads "
        "standard input. Default: the shipped names.",
        "format": "Data format: line (one item per line) or text. Default: guessed.",
        "split_seed": "Random seed of the 80/10/10 split.",
        "dedup": "Keep only the first of equal items.",
        "column": "Column of a .jsonl, .parquet, .csv or .tsv file; without a header in a .csv or .tsv its number, "
        "from 1.",
        "no_cache": "Read a large file into memory instead of preparing it once in the cache.",
    },
    "Output": {
        "config_file": "TOML file of options, such as max_steps = 5000; the command line overrides it.",
        "work_dir": "Folder for the checkpoint and the metrics.",
        "resume": "Resume from the checkpoint in the work dir.",
        "overwrite": "Replace the run in the work dir.",
        "sample_every": "Steps between samples that are printed during training; 0 for none.",
        "tensorboard": "Also write the losses and samples for TensorBoard.",
        "force": "Train even if the memory may not suffice.",
        "no_diagnostics": "Do not record activations, gradients and updates for `charlm report`.",
    },
    "Model": {
        "type": f"Model type: a network ({', '.join(NETWORKS)}) or a count model (ngram, bigram, unigram, uniform). "
        "Default: mlp for a list of at most 400,000 characters, otherwise gru.",
        "init_from": "Folder of a run whose weights the network begins with, to fine-tune it on other data.",
        "block_size": "Context in characters; a power of two for the wavenet.",
        "n_embd": "Width of an embedding.",
        "n_hidden": "Width of the hidden layers, or of the state.",
        "n_layer": "Number of layers of the rnn, gru and lstm, and of gpt blocks.",
        "n_head": "Attention heads per gpt block.",
        "batch_norm": "Batch norm before the tanh of the mlp.",
        "dropout": "Dropout probability of hidden units.",
        "mix_ngram": "Order of the n-gram that the network is mixed with. Default: chosen on a part of train.",
        "mix_tokens": "Most characters of train that this n-gram counts, the last ones.",
        "no_mix": "Train the network alone, as --mix-ngram 0.",
        "order": "Order of the ngram model; its context is order - 1.",
        "smoothing": "Smoothing of ngram: kneser-ney or add-k.",
        "add_k": "Constant added to the counts of count models.",
        "memory": "Most memory for counting the n-grams of type ngram, such as 2GB; the rest goes to disk.",
    },
    "Training": {
        "token_noise": "Probability of replacing an input token by a random one.",
        "max_steps": "Number of optimizer steps.",
        "batch_size": "Batch size in examples; for bow, rnn, gru, lstm and gpt in items or windows.",
        "gradient_accumulation_steps": "Batches per optimizer step.",
        "optimizer": f"Optimizer: {' or '.join(OPTIMIZERS)}.",
        "learning_rate": "Peak learning rate.",
        "weight_decay": "Weight decay of the linear layers.",
        "grad_clip": "Largest norm of the gradient; 0 disables clipping.",
        "schedule": f"Learning-rate schedule: {', '.join(SCHEDULES)}. step divides by 10 after half of the steps.",
        "warmup_steps": "Number of linear warm-up steps.",
        "eval_interval": "Steps between evaluations, which also save. Default: max-steps / 10.",
        "eval_tokens": "Predictions of dev per evaluation; of a larger dev a fixed sample. At the end: all.",
        "patience": "Evaluations without a better loss on dev before training stops. Default: no limit.",
        "log_interval": "Steps between reports of the training loss.",
        "seed": "Random seed of initialization, batches, dropout and noise.",
        "device": "Device to train on, such as cpu, cuda or cuda:1.",
        "dtype": f"Precision: {' or '.join(DTYPES)} (through autocast).",
        "compile": "Train through torch.compile.",
        "threads": "Number of CPU threads; on a shared machine fewer may be faster. Default: one per core.",
    },
    "Several processes": {
        "parallel": "Under torchrun: ddp replicates the model in each process, fsdp shards it (gpt).",
        "timeout": "Seconds that a process waits for the others before all stop.",
    },
}
# The names of an option where they are not its flag, with a --no- form for a bool.
NAMES = {
    "input_file": ("-i", "--input-file"),
    "config_file": ("--config",),
    "work_dir": ("-o", "--work-dir"),
    "batch_size": ("-b", "--batch-size"),
    "learning_rate": ("-l", "--learning-rate"),
    "weight_decay": ("-w", "--weight-decay"),
    **{name: (flag(name),) for name in ONE_FORM},
}


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the signature that typer reads, in which OPTIONS are arguments."""
    own = signature(command).parameters
    types = get_type_hints(Config) | get_type_hints(RunOptions) | get_type_hints(command)
    defaults = vars(DEFAULT) | vars(RunOptions()) | {name: argument.default for name, argument in own.items()}
    found = {"context": Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)}
    for panel, texts in OPTIONS.items():
        for name, text in texts.items():
            annotation = Annotated[types[name], _option(name, panel, text)]
            found[name] = Parameter(name, Parameter.KEYWORD_ONLY, default=defaults[name], annotation=annotation)
    command.__signature__ = Signature(list(found.values()))  # type: ignore[attr-defined]
    command.__annotations__ = {name: argument.annotation for name, argument in found.items()}
    return command


def _option(name: str, panel: str, text: str) -> Any:
    """The option for the argument `name`; its help says how the default depends on --type."""
    shown: dict[str, Any] = {"help": text, "rich_help_panel": panel}
    given = {type: defaults[name] for type, defaults in TYPE_DEFAULTS.items() if name in defaults}
    if given or name in OF_CORPUS:
        by_data = RECURRENT if name in OF_CORPUS else ()
        others = [f"{type} {default}" for type, default in given.items() if type not in by_data]
        others += [f"{'/'.join(by_data)} by the data"] if by_data else []
        shown["show_default"] = ", ".join([str(getattr(DEFAULT, name)), *others])
    if name == "config_file":
        shown |= {"callback": use_config_file, "is_eager": True}
    return typer.Option(*NAMES.get(name, ()), **shown)


@with_options
def train(
    context: typer.Context,
    input_file: Path | None = None,
    config_file: Path | None = None,
    work_dir: Path = DEFAULT_DIRECTORY,
    type: str | None = None,
    init_from: Path | None = None,
    mix_ngram: int | None = None,
    no_mix: bool = False,
    parallel: str = "ddp",
    timeout: float = 600.0,
    **others: Any,
) -> None:
    """Train a model; show its loss and samples.

    Without options, train on the shipped names, on the CPU, into ./out. A network is mixed with an n-gram.

    Losses are in nats per character; the table at the end adds bits and the baselines.

    `torchrun --nproc-per-node N -m charlm train` shares each batch among N processes.
    """
    from charlm.lm.processes import Launch, joined
    from charlm.lm.start import Start

    options = {
        name: value
        for name, value in context.params.items()
        if name != "config_file"  # whose options are the DEFAULT_MAP
        and context.get_parameter_source(name).name in ("COMMANDLINE", "DEFAULT_MAP")
    }
    given = {name: options[name] for name in Config.names() if name in options}
    if no_mix:
        if mix_ngram:
            raise UserError("--mix-ngram and --no-mix exclude each other")
        given["mix_ngram"] = 0
    launch = Launch.from_environment()
    program = "charlm train" if launch.size == 1 else "torchrun … -m charlm train"
    with _naming(launch.rank if launch.size > 1 else None):
        if not 0 < timeout <= MAX_TIMEOUT:
            raise UserError(f"timeout is {timeout:g}, but must be above 0 and at most {MAX_TIMEOUT:g} seconds")
        if launch.size > 1 and input_file is not None and path_to_save(input_file) == STREAM:
            raise UserError("standard input and pipes can be read by one process only: give a file with -i")
        wanted = RunOptions(**{name: others[name] for name in vars(RunOptions())})
        start = Start(given, wanted, work_dir, shell_command(program, options), input_file, parallel=parallel)
        with joined(launch, timeout) as processes:
            console = new_console()
            console.quiet = processes.rank != 0
            with start.trainer(console, processes) as trainer:
                _run(console, trainer, wanted.sample_every, program)


@contextmanager
def _naming(rank: int | None) -> Iterator[None]:
    """Puts the rank in front of an error that the user is told of; None puts nothing."""
    try:
        yield
    except UserError as error:
        if rank is None:
            raise
        raise UserError(f"rank {rank}: {error}") from error
    except OSError as error:
        if rank is None or error.filename is None:
            raise
        raise UserError(f"rank {rank}: cannot write {error.filename}: {error.strerror}") from error


def end_process(end: SystemExit) -> None:
    """Ends a process of several without finalizing the interpreter.

    A thread of gloo may still hold tensors of the last collective, and aborts the process if it releases them then.
    """
    if os.environ.get("WORLD_SIZE", "1") not in ("", "1"):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code if isinstance(end.code, int) else int(end.code is not None))


def _run(console: Console, trainer: Trainer, sample_every: int, program: str) -> None:
    """Trains until the end or a signal, and prints the result; a stopped run is resumed with `program`."""
    from charlm.lm.display import ProgressReport, progress_bar, sampling_every
    from charlm.lm.processes import is_under_torchrun
    from charlm.lm.train import StopRequest

    config, folder, is_first = trainer.config, trainer.directory, trainer.processes.rank == 0
    print_samples_of = sampling_every(console, trainer, sample_every)
    stop = StopRequest(ignores_repeats=is_under_torchrun())
    lost: list[str] = []  # the reason why the output cannot be written
    # A count model has nothing to save before its end, so that a signal ends the process as usual.
    with (
        nullcontext() if trainer.optimizer is None else stop.listening(),
        ProgressReport(console, config.max_steps, trainer.step) as report,
    ):

        def safely(show: Callable[..., None], *shown: Any) -> None:
            try:
                show(*shown)
            except OSError as error:  # `charlm train | head` or a full disk: save and stop, as for a signal
                discard_stdout()
                stop.signal = stop.signal or signal.SIGPIPE
                lost.append(
                    "the output pipe was closed"
                    if error.errno == errno.EPIPE
                    else f"cannot write the output: {error.strerror}"
                )

        on_step = None if print_samples_of is None else partial(safely, print_samples_of)
        finished = trainer.run(partial(safely, report), stop, partial(console.print, soft_wrap=True), on_step)
        report.stopped_at(trainer.step)
    if not finished:
        if lost:
            typer.echo(f"charlm: {lost[0]}; stopped and saved step {trainer.step} in {folder}", err=True)
        data = " -i FILE" if config.input_file == STREAM else ""
        sharded = " --parallel fsdp" if trainer.parallel == "fsdp" else ""
        again = f"{program} -o {shlex.quote(str(folder))} --resume{data}{sharded}"
        where = f"stopped at step {trainer.step} of {config.max_steps} and saved in {folder}"
        console.print(f"{where}; resume with:\n{again}", soft_wrap=True)
        raise typer.Exit(128 + (stop.signal or 0))
    with progress_bar("dev", silent=not is_first) as bar:
        result = trainer.evaluate_best(partial(bar, "evaluating"))
    model = trainer.whole_model()
    if is_first:
        assert model is not None
        _print_result(console, trainer, model, result)


def _print_result(console: Console, trainer: Trainer, model: LanguageModel, result: Evaluation) -> None:
    from charlm.lm.display import print_losses
    from charlm.lm.evaluate import LARGE_SPLIT, baselines, evaluate, predictions
    from charlm.lm.examples import PROTOCOLS
    from charlm.lm.models import Mixture
    from charlm.lm.sample import SamplingOptions, sample

    config, corpus = trainer.config, trainer.corpus
    rows = baselines(corpus, "dev", config.add_k, model.ngram.cpu() if isinstance(model, Mixture) else None)
    if isinstance(model, Mixture) and result.tokens <= LARGE_SPLIT:
        network = model.to(trainer.device).network
        dev = predictions(network, corpus, "dev").to(trainer.device)
        rows[f"the {config.type} alone"] = evaluate(network, dev, "dev")
    rows[f"this model ({config.label}, step {trainer.best_step})"] = result
    print_losses(console, f"loss on dev, {result.tokens:,} tokens, {PROTOCOLS[result.protocol]}", rows)
    options = SamplingOptions(max_new_tokens=None if corpus.format == "line" else PASSAGE)
    samples = sample(model, corpus.vocabulary, options, trainer.device)
    print_samples(console, samples, corpus.format, corpus)
