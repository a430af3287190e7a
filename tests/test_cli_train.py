"""`charlm train`: invalid options, memory, threads, progress output, and signals."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from itertools import product

import pytest
import torch
from lm_support import fails, run, succeeds
from rich.console import Console

import charlm
import charlm.lm.sample  # imported before tests patch the machine's memory
from charlm._errors import UserError
from charlm.lm import checkpoint, display, inputs, memory, threads, train
from charlm.lm.config import NETWORKS, TYPE_DEFAULTS, Config, check_options
from charlm.lm.data import build_corpus, read_text
from charlm.lm.display import ProgressReport
from charlm.lm.metrics import METRICS
from charlm.lm.models import MODELS, build_model
from charlm.lm.train import Progress, StopRequest, Trainer

NAMES = "\n".join(read_text(None).split("\n")[:300])
CORPUS = build_corpus(NAMES)
SMALL = Config(block_size=3, n_embd=4, n_hidden=16, max_steps=40, batch_size=16, eval_interval=20, log_interval=7)


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text(NAMES)
    return path


# ---- invalid options


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--n-layer", 12, "--order", 3), "mlp does not have these options (the types that have them in brackets): "),
        (("--n-layer", 12, "--order", 3), "--n-layer (rnn and gru and lstm and gpt), --order (ngram)"),
        (
            ("--type", "mlp", "--n-layer", 4),
            "--n-layer (rnn and gru and lstm and gpt)",
        ),  # its default: given, and of no effect
        (
            ("--type", "gpt", "--n-hidden", 9, "--batch-norm"),
            "--n-hidden (mlp and wavenet and bow and rnn and gru and lstm), --batch-norm (mlp)",
        ),
        (("--type", "wavenet", "--smoothing", "add-k"), "--smoothing (ngram)"),
        (("--type", "ngram", "--block-size", 3), f"--block-size ({' and '.join(NETWORKS)})"),
        (("--type", "bigram", "--max-steps", 9, "-l", 0.1), f"--max-steps ({' and '.join(NETWORKS)}), --learning-rate"),
    ],
)
def test_an_option_of_another_type_is_refused_naming_the_types_that_have_it(tmp_path, data, flags, words):
    assert words in fails("train", "-i", data, "-o", tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_every_option_that_changes_a_model_is_one_that_its_type_accepts():
    for type in MODELS:
        has = set(Config.of_type(type).model_config(5, 0)) - {"vocab_size", "pad_token"}
        check_options(type, has - ({"block_size"} if type not in NETWORKS else set()))
        check_options(type, TYPE_DEFAULTS.get(type, {}))
        check_options(type, ("input_file", "seed", "device", "split_seed", "dedup", "format", "add_k"))


def test_an_option_of_another_type_is_refused_on_resume_too(tmp_path, data):
    run = tmp_path / "run"
    succeeds("train", "-i", data, "-o", run, "--max-steps", 1, "--n-hidden", 4)
    assert "--n-layer (rnn and" in fails("train", "-o", run, "--resume", "--n-layer", 4)


def test_a_finished_run_that_is_resumed_says_how_to_continue(tmp_path, data):
    run = tmp_path / "run"
    succeeds("train", "-i", data, "-o", run, "--max-steps", 2, "--n-hidden", 4)
    assert "these were all its steps: more --max-steps than 2 continue it" in succeeds("train", "-o", run, "--resume")
    assert "all its steps" not in succeeds("train", "-o", run, "--resume", "--max-steps", 3)


@pytest.mark.parametrize("value", [99999999999999999999, -99999999999999999999, 2**64, -(2**63) - 1])
def test_a_seed_beyond_64_bits_is_one_sentence(tmp_path, data, value):
    for command in (("train", "-i", data, "-o", tmp_path / "run"), ("sample", tmp_path)):
        assert f"seed is {value}, but must be an integer of 64 bits" in fails(*command, "--seed", value)


@pytest.mark.parametrize("seed", [2**64 - 1, -(2**63), -1])
def test_every_seed_that_torch_takes_is_taken(tmp_path, data, seed):
    flags = ("--max-steps", 1, "--n-hidden", 4, "--seed", seed)
    succeeds("train", "-i", data, "-o", tmp_path / "run", *flags)
    succeeds("sample", tmp_path / "run", "--seed", seed)


@pytest.mark.parametrize("name", [n for n, value in vars(Config()).items() if isinstance(value, int) and n != "seed"])
def test_no_integer_option_goes_beyond_64_bits(name):
    if not isinstance(getattr(Config(), name), bool):
        with pytest.raises(UserError, match=rf"^{name} is {2**63}, but must be an integer of 64 bits"):
            Config(**{name: 2**63})


def test_threads_are_those_of_the_machine(tmp_path, data):
    cores = os.cpu_count()
    for count in (0, cores + 1):
        message = fails("train", "-i", data, "-o", tmp_path / "run", "--threads", count)
        assert f"threads is {count}, but must be at least 1 and at most {cores}, the cores of this machine" in message
    before = torch.get_num_threads()
    try:
        succeeds("train", "-i", data, "-o", tmp_path / "run", "--threads", 1, "--max-steps", 1, "--n-hidden", 4)
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


# ---- memory


@pytest.mark.parametrize(
    ("n_embd", "n_hidden", "block_size", "vocab_size"), [*product((4, 12), (6, 9), (2, 8), (5, 30))]
)
def test_parameters_are_counted_without_the_model(n_embd, n_hidden, block_size, vocab_size):
    sizes = {"n_embd": n_embd, "n_hidden": n_hidden, "block_size": block_size, "n_layer": 3, "n_head": 2}
    for type, options in ((type, {"batch_norm": type == "mlp"}) for type in (*NETWORKS, "bigram")):
        config = Config(type=type, **sizes, **options)
        model = build_model(**config.model_config(vocab_size, 0))
        assert memory.count_parameters(config, vocab_size) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 100_000},
        {"type": "wavenet", "block_size": 2**40},
        {"type": "gpt", "n_layer": 10**15},
        {"type": "gpt", "n_embd": 2**62, "n_head": 1},
        {"n_hidden": 2**62},
        {"batch_size": 10**15},
        {"gradient_accumulation_steps": 10**9},
        {"gradient_accumulation_steps": 2**63 - 1},
    ],
    ids=str,
)
def test_a_run_beyond_the_memory_is_refused_before_any_is_taken(tmp_path, data, options, monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda device: 8 * 10**9)
    flags = [text for name, value in options.items() for text in (inputs.flag(name), value)]
    message = fails("train", "-i", data, "-o", tmp_path / "run", *flags)
    assert " parameters, and training it takes about " in message
    assert " GB of memory, but cpu has 8.0 GB: make --block-size" in message
    assert not (tmp_path / "run").exists()


def test_a_run_whose_output_cannot_be_written_is_saved_and_says_so(tmp_path, data, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ProgressReport, "__call__", full)
    result = run("train", "-i", data, "-o", tmp_path / "run", "--max-steps", 40, "--eval-interval", 10)
    assert result.exit_code == 128 + signal.SIGPIPE
    step = checkpoint.load(tmp_path / "run").step
    assert 0 < step < 40
    assert (
        f"charlm: cannot write the output: No space left on device; stopped and saved step {step} in" in result.stderr
    )


def test_force_trains_beyond_the_memory(tmp_path, data, monkeypatch):
    monkeypatch.setattr(memory, "machine_bytes", lambda device: 1)
    flags = ("train", "-i", data, "-o", tmp_path / "run", "--max-steps", 1, "--n-hidden", 4)
    assert "but cpu has 1 MB" in fails(*flags)
    assert re.search(
        r"mlp \+ \d-gram: [\d,]+ parameters, 1 steps on cpu, about \d MB of memory\n", succeeds(*flags, "--force")
    )


@pytest.mark.parametrize("type", list(MODELS))
def test_the_defaults_fit_a_small_machine(type):
    assert memory.estimate_bytes(Config.of_type(type), build_corpus(read_text(None))) < 5e8


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("type", "options"),
    [
        ("mlp", {"block_size": 2000}),
        ("mlp", {"n_hidden": 20_000, "block_size": 64, "n_embd": 32}),
        ("wavenet", {"block_size": 64, "batch_size": 2048}),
        ("bow", {"format": "text", "block_size": 512, "batch_size": 256}),
        ("rnn", {"format": "text", "block_size": 512, "batch_size": 128}),
        ("gru", {"format": "text", "block_size": 512, "batch_size": 64, "n_layer": 2}),
        ("lstm", {"format": "text", "block_size": 512, "batch_size": 64}),
        ("gpt", {"format": "text", "block_size": 512, "batch_size": 16}),
    ],
)
def test_the_estimate_is_within_a_factor_of_two_of_what_is_taken(tmp_path, type, options):
    code = (
        "import re, sys; from pathlib import Path; from charlm.lm.config import Config\n"
        "from charlm.lm.data import build_corpus, read_text; from charlm.lm.memory import estimate_bytes\n"
        "from charlm.lm.train import Trainer\n"
        # Not ru_maxrss, which a process inherits from the one that started it.
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) * 1024\n"
        f"config = Config.of_type({type!r}, max_steps=2, **{options!r})\n"
        "corpus = build_corpus(read_text(None), format=config.format)\n"
        "before = peak(); Trainer(config, corpus, Path(sys.argv[1])).run()\n"
        "print((peak() - before) / estimate_bytes(config, corpus))"
    )
    found = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout
    assert 0.5 < float(found) < 2


def test_the_memory_is_that_of_the_control_group_where_it_is_less(tmp_path, monkeypatch):
    whole = memory.machine_bytes(torch.device("cpu"))
    for text, expected in (("123456\n", 123456), ("max\n", whole), (str(2**63), whole)):
        (tmp_path / "memory.max").write_text(text)
        monkeypatch.setattr(memory, "CGROUP_LIMITS", (tmp_path / "memory.max", tmp_path / "nowhere"))
        assert memory.machine_bytes(torch.device("cpu")) == expected


# ---- threads


def test_advice_is_given_where_one_thread_is_faster(monkeypatch):
    for one, many, expected in (
        (0.010, 0.050, "a step takes 50 ms with 2 threads, but 10 ms with one: --threads 1 is faster here"),
        (0.010, 0.0105, None),
        (0.010, 0.006, None),
    ):
        monkeypatch.setattr(threads, "seconds_of", lambda step, count, found=(one, many): found)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        assert threads.advice(lambda: None) == expected


def test_steps_are_timed_with_one_thread_and_with_all_and_the_number_is_restored():
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        one, two = threads.seconds_of(lambda: (seen.append(torch.get_num_threads()), time.sleep(0.001)), 2)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == [1, 2] * (threads.WARM_UP + threads.REPEATS)
    assert min(one, two) >= 0.001


@pytest.mark.parametrize("type", NETWORKS)
def test_timing_steps_changes_nothing_of_the_run(tmp_path, monkeypatch, type):
    monkeypatch.setattr(threads, "MIN_STEPS", 1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    config = Config.of_type(
        type, n_embd=8, n_hidden=16, n_layer=1, n_head=2, max_steps=4, batch_size=16, eval_interval=2
    )
    advised, states = [], []
    monkeypatch.setattr(threads, "seconds_of", lambda step, count: (step(), (1.0, 2.0))[1])
    try:
        for on_advice in (advised.append, None):
            trainer = Trainer(config, CORPUS, tmp_path / type)
            trainer.run(on_advice=on_advice)
            states.append(checkpoint.load(tmp_path / type).training)
    finally:
        torch.set_num_threads(before)
    assert advised == ["a step takes 2e+03 ms with 2 threads, but 1e+03 ms with one: --threads 1 is faster here"]
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in states[0].items())


# ---- progress output


def lines_of(*progress: Progress, seconds: float = 0.0, monkeypatch=None) -> list[str]:
    clock = iter(range(1000))
    if monkeypatch is not None:
        monkeypatch.setattr(display.time, "monotonic", lambda: seconds * next(clock))
    output = io.StringIO()
    with ProgressReport(Console(file=output, width=200), 1000, 0) as report:
        for one in progress:
            report(one)
    return output.getvalue().splitlines()


def test_a_line_has_no_loss_of_an_earlier_line_and_says_of_which_step_it_is():
    lines = lines_of(
        Progress(100, "train", 2.5, 1000.0),
        Progress(150, "dev", 2.4, 9.0),
        Progress(175, "dev", 2.3, 9.0),
        Progress(200, "train", 2.25, 2000.0),
        Progress(200, "dev", 2.2, 9.0),
    )
    assert lines == [
        "step 150/1000 · train 2.5000 (at step 100) · dev 2.4000 nats · 1,000 tokens/s",
        "step 175/1000 · dev 2.3000 nats",
        "step 200/1000 · train 2.2500 · dev 2.2000 nats · 2,000 tokens/s",
    ]


def test_a_long_wait_for_an_evaluation_has_lines_of_the_training_loss(monkeypatch):
    progress = [Progress(step, "train", 2.0, 10.0) for step in (10, 20, 30, 40)]
    lines = lines_of(*progress, seconds=6.0, monkeypatch=monkeypatch)
    assert [line.split()[1] for line in lines] == ["20/1000", "40/1000"]
    assert lines[0] == "step 20/1000 · train 2.0000 nats · 10 tokens/s"


@pytest.mark.parametrize("columns", [40, 60, 80, 100])
def test_the_bar_fits_its_terminal_beside_ctrl_c_and_shows_all_digits_of_the_step(columns):
    output = io.StringIO()
    console = Console(file=output, width=columns, force_terminal=True, color_system=None)
    with ProgressReport(console, 1_000_000, 0) as report:
        report(Progress(123_400, "train", 2.5, 345_678.0))
        report(Progress(123_400, "dev", 2.4, 1e6))
        report.stopped_at(123_456)
    shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", output.getvalue())
    bars = [line for line in re.split(r"[\r\n]+", shown) if "training" in line]
    assert len(bars) > 2
    assert all(len(line) <= columns - len("^C^C") for line in bars)
    assert "training 123456/1000000 " in bars[-1]


# ---- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("at", [20, 40])
def test_a_signal_ends_an_evaluation_at_once_and_resuming_makes_it(tmp_path, monkeypatch, number, at):
    assert Trainer(SMALL, CORPUS, tmp_path / "whole").run()
    trainer, evaluate, signalled = Trainer(SMALL, CORPUS, tmp_path / "parts"), train.evaluate, []

    def endless(*arguments):
        if trainer.step == at:
            signalled.append(time.monotonic())
            os.kill(os.getpid(), number)
            time.sleep(60)
        return evaluate(*arguments)

    with monkeypatch.context() as patch, StopRequest().listening() as stop:
        patch.setattr(train, "evaluate", endless)
        assert not trainer.run(stop=stop)
    assert time.monotonic() - signalled[0] < 2
    assert stop.signal == number
    saved = checkpoint.load(tmp_path / "parts")
    assert saved.step == at
    resumed = Trainer(SMALL, CORPUS, tmp_path / "parts", saved)
    assert resumed.run()
    ours, theirs = (
        [
            {**json.loads(line), "tokens/s": 0} for line in (tmp_path / name / METRICS).read_text().splitlines()
        ]  # but the speed, which is the machine's
        for name in ("parts", "whole")
    )
    assert ours == theirs
    ours, theirs = (checkpoint.load(tmp_path / name) for name in ("parts", "whole"))
    assert (ours.best_step, ours.best_nats) == (theirs.best_step, theirs.best_nats)
    for part in ("weights", "training"):
        assert all(torch.equal(tensor, getattr(theirs, part)[name]) for name, tensor in getattr(ours, part).items())


def test_a_checkpoint_of_before_says_that_no_evaluation_is_due(tmp_path):
    trainer = Trainer(SMALL, CORPUS, tmp_path)
    trainer.run()
    saved = checkpoint.load(tmp_path)
    del saved.training["is_evaluation_due"]
    assert not Trainer(SMALL, CORPUS, tmp_path, saved).is_evaluation_due


# ---- the error


def test_user_error_is_a_value_error_of_charlm(tmp_path):
    assert charlm.UserError is UserError
    assert issubclass(UserError, ValueError)
    assert f"{UserError.__module__}.{UserError.__qualname__}" == "charlm.UserError"
    with pytest.raises(charlm.UserError, match="there is no checkpoint"):
        charlm.load(tmp_path)


def test_an_ngram_that_is_counted_on_disk_is_the_one_that_is_counted_in_memory(tmp_path, data):
    flags = ("-i", data, "--type", "ngram", "--order", 4)
    succeeds("train", "-o", tmp_path / "memory", *flags)
    succeeds("train", "-o", tmp_path / "disk", *flags, "--memory", "20MB")
    found, expected = (checkpoint.load(tmp_path / name).weights for name in ("disk", "memory"))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--type", "ngram", "--memory", "lots"), "memory is 'lots', but must be a size such as 2GB"),
        (("--type", "ngram", "--memory", "1MB"), "memory is 1000000 bytes, but must be at least"),
        (("--memory", "1GB"), "--memory bounds the counting of type ngram"),
    ],
)
def test_a_bound_of_memory_that_cannot_be_kept_is_refused(tmp_path, data, flags, words):
    assert words in fails("train", "-i", data, "-o", tmp_path / "run", *flags)
    assert not checkpoint.exists(tmp_path / "run")


@pytest.mark.parametrize(
    ("text", "count"), [("5", 5), ("2GB", 2 * 10**9), ("64 MiB", 2**26), ("1.5kb", 1500), ("7b", 7)]
)
def test_sizes_have_units_of_bytes(text, count):
    assert memory.parse_bytes(text) == count
