"""`charlm train`: starts a training run from its options, or resumes one from its checkpoint."""

from __future__ import annotations

import errno
import os
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from charlm._errors import UserError
from charlm._version import __version__
from charlm.cli.common import (
    discard_stdout,
    new_console,
    print_samples,
)
from charlm.cli.config_file import use_config_file
from charlm.lm.config import DTYPES, NETWORKS, OPTIMIZERS, SCHEDULES, TYPE_DEFAULTS, Config, check_options
from charlm.lm.defaults import OF_CORPUS, RECURRENT
from charlm.lm.inputs import STREAM, corpus_of, path_to_save

if TYPE_CHECKING:
    from rich.console import Console

    from charlm.lm.checkpoint import Checkpoint
    from charlm.lm.data import Corpus
    from charlm.lm.evaluate import Evaluation
    from charlm.lm.models import LanguageModel
    from charlm.lm.processes import Processes
    from charlm.lm.train import Trainer

DEFAULT_DIRECTORY = Path("out")
MAX_TIMEOUT = 1e6  # seconds
PASSAGE = 80  # length in characters of the samples that are printed after training on running text
DEFAULT = Config()
DATA, MODEL, TRAINING, PROCESSES, OUTPUT = "Data", "Model", "Training", "Several processes", "Output"


def option(group: str, text: str, *names: str, by_type: str | None = None) -> Any:
    """An option of `train` in a panel of its help; `by_type` names the field of Config whose default --type changes."""
    if by_type is None:
        return typer.Option(*names, help=text, rich_help_panel=group)
    given = {type: given[by_type] for type, given in TYPE_DEFAULTS.items() if by_type in given}
    follow = RECURRENT if by_type in OF_CORPUS else ()
    others = [f"{type} {default}" for type, default in given.items() if type not in follow]
    others += [f"{'/'.join(follow)} by the data"] if follow else []
    default = ", ".join([str(getattr(DEFAULT, by_type)), *others])
    return typer.Option(*names, help=text, rich_help_panel=group, show_default=default)


def train(
    context: typer.Context,
    input_file: Annotated[
        Path | None,
        option(
            DATA,
            "Text file, also as .gz or .zst, table (--column), or folder of `charlm prepare`; - reads standard input. "
            "Default: the shipped names.",
            "-i",
            "--input-file",
        ),
    ] = None,
    format: Annotated[
        str | None, option(DATA, "Data format: line (one item per line) or text. Default: guessed.")
    ] = None,
    split_seed: Annotated[int, option(DATA, "Random seed of the 80/10/10 split.")] = DEFAULT.split_seed,
    dedup: Annotated[bool, option(DATA, "Keep only the first of equal items.")] = DEFAULT.dedup,
    column: Annotated[
        str,
        option(
            DATA,
            "Column of a .jsonl, .parquet, .csv or .tsv file; without a header in a .csv or .tsv its number, from 1.",
        ),
    ] = DEFAULT.column,
    config_file: Annotated[
        Path | None,
        typer.Option(
            "--config",
            help="TOML file of options, such as max_steps = 5000; the command line overrides it.",
            callback=use_config_file,
            is_eager=True,
            rich_help_panel=OUTPUT,
            show_default=False,
        ),
    ] = None,
    no_cache: Annotated[
        bool, option(DATA, "Read a large file into memory instead of preparing it once in the cache.", "--no-cache")
    ] = False,
    work_dir: Annotated[
        Path, option(OUTPUT, "Folder for the checkpoint and the metrics.", "-o", "--work-dir")
    ] = DEFAULT_DIRECTORY,
    resume: Annotated[bool, option(OUTPUT, "Resume from the checkpoint in the work dir.", "--resume")] = False,
    overwrite: Annotated[bool, option(OUTPUT, "Replace the run in the work dir.", "--overwrite")] = False,
    sample_every: Annotated[
        int, option(OUTPUT, "Steps between samples that are printed during training; 0 for none.")
    ] = 0,
    tensorboard: Annotated[
        bool, option(OUTPUT, "Also write the losses and samples for TensorBoard.", "--tensorboard")
    ] = False,
    force: Annotated[bool, option(OUTPUT, "Train even if the memory may not suffice.", "--force")] = False,
    no_diagnostics: Annotated[
        bool,
        option(OUTPUT, "Do not record activations, gradients and updates for `charlm report`.", "--no-diagnostics"),
    ] = False,
    type: Annotated[
        str | None,
        option(
            MODEL,
            f"Model type: a network ({', '.join(NETWORKS)}) or a count model (ngram, bigram, unigram, uniform). "
            "Default: mlp for a list of at most 400,000 characters, otherwise gru.",
        ),
    ] = None,
    init_from: Annotated[
        Path | None,
        option(MODEL, "Folder of a run whose weights the network begins with, to fine-tune it on other data."),
    ] = None,
    block_size: Annotated[
        int, option(MODEL, "Context in characters; a power of two for the wavenet.", by_type="block_size")
    ] = DEFAULT.block_size,
    n_embd: Annotated[int, option(MODEL, "Width of an embedding.", by_type="n_embd")] = DEFAULT.n_embd,
    n_hidden: Annotated[
        int, option(MODEL, "Width of the hidden layers, or of the state.", by_type="n_hidden")
    ] = DEFAULT.n_hidden,
    n_layer: Annotated[
        int, option(MODEL, "Number of layers of the rnn, gru and lstm, and of gpt blocks.", by_type="n_layer")
    ] = DEFAULT.n_layer,
    n_head: Annotated[int, option(MODEL, "Attention heads per gpt block.")] = DEFAULT.n_head,
    batch_norm: Annotated[bool, option(MODEL, "Batch norm before the tanh of the mlp.")] = DEFAULT.batch_norm,
    dropout: Annotated[
        float, option(MODEL, "Dropout probability of hidden units.", by_type="dropout")
    ] = DEFAULT.dropout,
    token_noise: Annotated[
        float, option(TRAINING, "Probability of replacing an input token by a random one.")
    ] = DEFAULT.token_noise,
    mix_ngram: Annotated[
        int | None,
        option(MODEL, "Order of the n-gram that the network is mixed with. Default: chosen on a part of train."),
    ] = None,
    mix_tokens: Annotated[
        int, option(MODEL, "Most characters of train that this n-gram counts, the last ones.")
    ] = DEFAULT.mix_tokens,
    no_mix: Annotated[bool, option(MODEL, "Train the network alone, as --mix-ngram 0.", "--no-mix")] = False,
    order: Annotated[int, option(MODEL, "Order of the ngram model; its context is order - 1.")] = DEFAULT.order,
    smoothing: Annotated[str, option(MODEL, "Smoothing of ngram: kneser-ney or add-k.")] = DEFAULT.smoothing,
    add_k: Annotated[float, option(MODEL, "Constant added to the counts of count models.")] = DEFAULT.add_k,
    memory: Annotated[
        str | None,
        option(MODEL, "Most memory for counting the n-grams of type ngram, such as 2GB; the rest goes to disk."),
    ] = None,
    max_steps: Annotated[int, option(TRAINING, "Number of optimizer steps.", by_type="max_steps")] = DEFAULT.max_steps,
    batch_size: Annotated[
        int,
        option(
            TRAINING,
            "Batch size in examples; for bow, rnn, gru, lstm and gpt in items or windows.",
            "-b",
            "--batch-size",
            by_type="batch_size",
        ),
    ] = DEFAULT.batch_size,
    gradient_accumulation_steps: Annotated[
        int, option(TRAINING, "Batches per optimizer step.")
    ] = DEFAULT.gradient_accumulation_steps,
    optimizer: Annotated[str, option(TRAINING, f"Optimizer: {' or '.join(OPTIMIZERS)}.")] = DEFAULT.optimizer,
    learning_rate: Annotated[
        float, option(TRAINING, "Peak learning rate.", "-l", "--learning-rate", by_type="learning_rate")
    ] = DEFAULT.learning_rate,
    weight_decay: Annotated[
        float,
        option(TRAINING, "Weight decay of the linear layers.", "-w", "--weight-decay", by_type="weight_decay"),
    ] = DEFAULT.weight_decay,
    grad_clip: Annotated[
        float, option(TRAINING, "Largest norm of the gradient; 0 disables clipping.", by_type="grad_clip")
    ] = DEFAULT.grad_clip,
    schedule: Annotated[
        str,
        option(
            TRAINING,
            f"Learning-rate schedule: {', '.join(SCHEDULES)}. step divides by 10 after half of the steps.",
        ),
    ] = DEFAULT.schedule,
    warmup_steps: Annotated[int, option(TRAINING, "Number of linear warm-up steps.")] = DEFAULT.warmup_steps,
    eval_interval: Annotated[
        int | None, option(TRAINING, "Steps between evaluations, which also save. Default: max-steps / 10.")
    ] = DEFAULT.eval_interval,
    eval_tokens: Annotated[
        int,
        option(
            TRAINING,
            "Predictions of dev per evaluation; of a larger dev a fixed sample. At the end: all.",
            by_type="eval_tokens",
        ),
    ] = DEFAULT.eval_tokens,
    patience: Annotated[
        int | None,
        option(TRAINING, "Evaluations without a better loss on dev before training stops. Default: no limit."),
    ] = DEFAULT.patience,
    log_interval: Annotated[
        int, option(TRAINING, "Steps between reports of the training loss.")
    ] = DEFAULT.log_interval,
    seed: Annotated[int, option(TRAINING, "Random seed of initialization, batches, dropout and noise.")] = DEFAULT.seed,
    device: Annotated[str, option(TRAINING, "Device to train on, such as cpu, cuda or cuda:1.")] = DEFAULT.device,
    dtype: Annotated[str, option(TRAINING, f"Precision: {' or '.join(DTYPES)} (through autocast).")] = DEFAULT.dtype,
    compile: Annotated[bool, option(TRAINING, "Train through torch.compile.", "--compile")] = DEFAULT.compile,
    threads: Annotated[
        int | None,
        option(TRAINING, "Number of CPU threads; on a shared machine fewer may be faster. Default: one per core."),
    ] = None,
    parallel: Annotated[
        str,
        option(
            PROCESSES,
            "Under torchrun: ddp replicates the model in each process, fsdp shards it (gpt).",
        ),
    ] = "ddp",
    timeout: Annotated[
        float, option(PROCESSES, "Seconds that a process waits for the others before all stop.")
    ] = 600.0,
) -> None:
    """Train a model; show its loss and samples.

    Without options, train on the shipped names, on the CPU, into ./out. A network is mixed with an n-gram.

    Losses are in nats per character; the table at the end adds bits and the baselines.

    `torchrun --nproc-per-node N -m charlm train` shares each batch among N processes.
    """
    from charlm.lm import checkpoint
    from charlm.lm.command import shell_command
    from charlm.lm.files import locked
    from charlm.lm.init_from import options_of
    from charlm.lm.processes import Launch, joined
    from charlm.lm.start import check_folder
    from charlm.lm.tensorboard import require_tensorboard
    from charlm.lm.threads import using_threads

    options = {
        name: value
        for name, value in context.params.items()
        if name != "config_file"  # whose options are the DEFAULT_MAP
        and context.get_parameter_source(name).name in ("COMMANDLINE", "DEFAULT_MAP")
    }
    given = {name: options[name] for name in Config.names() if name in options}
    if no_mix:
        if given.get("mix_ngram"):
            raise UserError("--mix-ngram and --no-mix exclude each other")
        given["mix_ngram"] = 0
    if input_file is not None:
        given["input_file"] = path_to_save(input_file)
    if tensorboard:
        require_tensorboard()
    if resume and overwrite:
        raise UserError("--resume and --overwrite exclude each other")
    launch = Launch.from_environment()
    with _naming(launch.rank if launch.size > 1 else None):
        if not 0 < timeout <= MAX_TIMEOUT:
            raise UserError(f"timeout is {timeout:g}, but must be above 0 and at most {MAX_TIMEOUT:g} seconds")
        if launch.size > 1 and given.get("input_file") == STREAM:
            raise UserError("standard input and pipes can be read by one process only: give a file with -i")
        of_trainer = {"diagnostics": not no_diagnostics, "tensorboard": tensorboard, "initial": None}
        if init_from is not None:
            given["init_from"] = str(init_from.resolve())
        if init_from is not None and not resume:
            of_trainer["initial"], given = options_of(init_from, given)
        if not resume and "type" in given:
            check_options(given["type"], given)
        config = None if resume else Config.of_type(**{"type": DEFAULT.type, **given})
        with using_threads(threads), joined(launch, timeout) as processes, ExitStack() as stack:
            if processes.rank == 0:
                # Processes that torchrun has restarted go on from what they have saved themselves.
                resume = resume or not processes.first_time("manifest", checkpoint.fingerprint(work_dir))
                check_folder(work_dir, resume, overwrite)
                stack.enter_context(locked(work_dir))
                check_folder(work_dir, resume, overwrite)  # it may have changed before it was locked
            if processes.from_first(resume):
                config = of_trainer["initial"] = None
            command = shell_command("charlm train" if launch.size == 1 else "torchrun … -m charlm train", options)
            _run(
                config,
                given,
                input_file,
                work_dir,
                force,
                not no_cache,
                processes,
                parallel,
                memory,
                command,
                sample_every,
                of_trainer,
            )


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


def _run(
    config: Config | None,
    given: dict[str, Any],
    input_file: Path | None,
    work_dir: Path,
    force: bool,
    cache: bool,
    processes: Processes,
    parallel: str,
    memory: str | None,
    command: str,
    sample_every: int,
    of_trainer: dict[str, Any],
) -> None:
    """Trains until the end or a signal, and prints the result.

    `config` is that of a new run; None resumes the checkpoint in `work_dir` with the options `given`. `of_trainer` are
    arguments of the trainer.
    """
    from charlm.lm import checkpoint
    from charlm.lm.command import describe, started_by
    from charlm.lm.defaults import config_for
    from charlm.lm.display import ProgressReport, print_data, print_model, progress_bar, sampling_every
    from charlm.lm.memory import check_fits, parse_bytes
    from charlm.lm.parallel import check_parallel
    from charlm.lm.processes import is_under_torchrun
    from charlm.lm.sources import check_column
    from charlm.lm.start import config_on, resumed_config
    from charlm.lm.train import StopRequest, Trainer, usable_device

    resumed = None
    if config is None:
        resumed = checkpoint.load(work_dir, mapped=True)
        check_options(resumed.config.type, given)
        config = resumed_config(resumed.config, given)
    check_parallel(parallel, config, processes)
    if memory is not None and config.type != "ngram":
        raise UserError(f"--memory bounds the counting of type ngram; the {config.type} does not have it")
    bound = None if memory is None else parse_bytes(memory)
    console = new_console()
    console.quiet = processes.rank != 0
    check_column(given, input_file or config.input_file)
    corpus = corpus_of(config, input_file, cache, silent=processes.rank > 0)
    guessed = ", guessed" if config.format is None else ""
    if resumed is None:
        config = config_for(corpus, given)
    config = config_on(config, corpus)
    start = started_by(command)
    console.print(describe(start), soft_wrap=True)
    print_data(console, config, corpus, guessed)
    if not force:
        check_fits(config, corpus, usable_device(processes.device(config.device)), processes.launch, parallel)
    processes.check_equal(_what_must_be_equal(config, corpus, resumed or of_trainer["initial"], parallel))
    trainer = Trainer(
        config, corpus, work_dir, resumed, processes=processes, parallel=parallel, memory=bound, **of_trainer
    )
    config = trainer.config
    trainer.commands = (*trainer.commands, start | trainer.origin)
    of_trainer.clear()
    del resumed  # and so its files, which the next checkpoint replaces
    print_model(console, config, corpus, trainer, parallel)
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
        finished = trainer.run(partial(safely, report), stop, report.advise, on_step)
        report.stopped_at(trainer.step)
    if stop.signal == signal.SIGPIPE and not finished:
        typer.echo(f"charlm: {lost[0]}; stopped and saved step {trainer.step} in {work_dir}", err=True)
    if not finished and processes.rank == 0:
        again = " -i FILE" if config.input_file == STREAM else ""
        where = f"stopped at step {trainer.step} of {config.max_steps} and saved in {work_dir}"
        command = "charlm train" if processes.size == 1 else "torchrun … -m charlm train"
        sharded = " --parallel fsdp" if parallel == "fsdp" else ""
        again = f"{command} -o {shlex.quote(str(work_dir))} --resume{again}{sharded}"
        console.print(f"{where}; resume with:\n{again}", soft_wrap=True)
    if not finished:
        raise typer.Exit(128 + (stop.signal or 0))
    with progress_bar("dev", silent=processes.rank > 0) as bar:
        result = trainer.evaluate_best(lambda done, total: bar("evaluating", done, total))
    model = trainer.whole_model()
    if processes.rank == 0:
        assert model is not None
        _print_result(console, config, corpus, trainer, model, result)


def _what_must_be_equal(config: Config, corpus: Corpus, resumed: Checkpoint | None, parallel: str) -> dict[str, str]:
    """What the processes of a run must agree on, by the name of it in an error."""
    import torch

    options = {**config.to_dict(), "input_file": None, "parallel": parallel}
    return {
        "data": corpus.digest,
        "options": repr(options),
        "checkpoints": "" if resumed is None else repr((resumed.step, resumed.digest, resumed.best_nats)),
        "versions of charlm or torch": f"{__version__} {torch.__version__}",
    }


def _print_result(
    console: Console, config: Config, corpus: Corpus, trainer: Trainer, model: LanguageModel, result: Evaluation
) -> None:
    from charlm.lm.display import print_losses
    from charlm.lm.evaluate import LARGE_SPLIT, baselines, evaluate, predictions
    from charlm.lm.examples import PROTOCOLS
    from charlm.lm.models import Mixture
    from charlm.lm.sample import SamplingOptions, sample

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
