"""`charlm.train`: the data it takes, the run it returns, and that it trains as the command does."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from lm_support import succeeds
from typing_extensions import Self

import charlm
from charlm import UserError, _ext
from charlm.lm import cache
from charlm.lm.data import build_corpus
from charlm.lm.metrics import read_metrics
from charlm.lm.run import History
from charlm.lm.shards import load
from charlm.lm.start import FREE_ON_RESUME
from charlm.lm.train import Trainer
from charlm.lm.train_run import in_python

needs_module = pytest.mark.skipif(_ext._C is None, reason="preparing needs the compiled module")
NAMES = [f"{a}{b * n}" for n in range(1, 9) for a in "abcde" for b in "vwxyz"]
TINY = {"max_steps": 4, "n_embd": 2, "n_hidden": 8, "log_interval": 2, "progress": False}
VERSIONS = {"charlm": charlm.__version__, "torch": torch.__version__, "python": platform.python_version()}
FLAGS = ("--max-steps", "4", "--n-embd", "2", "--n-hidden", "8", "--log-interval", "2")


def weights(run: charlm.lm.Run) -> dict[str, torch.Tensor]:
    return run.model.model.state_dict()


def same(a: charlm.lm.Run, b: charlm.lm.CharacterModel | charlm.lm.Run) -> bool:
    other = (b.model if isinstance(b, charlm.lm.Run) else b).model.state_dict()
    return all(torch.equal(tensor, other[name]) for name, tensor in weights(a).items())


def stop_at(step: int, number: signal.Signals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sends a signal to this process in the middle of `step`."""
    backward = Trainer._backward

    def interrupted(self: Trainer, *arguments: object) -> int:
        if self.step == step - 1:
            os.kill(os.getpid(), number)
        return backward(self, *arguments)

    monkeypatch.setattr(Trainer, "_backward", interrupted)


# ---- data


def test_a_list_a_generator_a_file_and_the_command_train_the_same_model(tmp_path):
    (tmp_path / "names.txt").write_text("\n".join(NAMES))
    succeeds("train", "-i", tmp_path / "names.txt", "-o", tmp_path / "command", *FLAGS)
    command = charlm.load(tmp_path / "command")
    given = (NAMES, iter(NAMES), (f"{name}\r\n" for name in NAMES), np.array(NAMES), tmp_path / "names.txt")
    for data in (*given, str(tmp_path / "names.txt"), io.StringIO("\n".join(NAMES))):
        assert same(charlm.train(data, **TINY), command)


def test_the_shipped_names_are_the_default():
    run = charlm.train(**TINY)
    assert run.corpus.digest == charlm.lm.read_corpus(None).digest
    assert run.config.input_file is None


def test_one_text_is_a_list_of_one():
    run = charlm.train(["To be, or not to be, that is the question.\n" * 20], **TINY)
    assert run.model.format == "text"
    assert charlm.train(["x\ty"] * 9, separator="\t", format="text", **TINY).corpus.sizes["train"] == 28


@needs_module
def test_many_documents_are_prepared_and_read_once(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "MIN_BYTES", 100)
    run = charlm.train(iter(NAMES), tmp_path / "run", **TINY)
    assert load(tmp_path / "run-corpus").digest == run.corpus.digest == build_corpus("\n".join(NAMES)).digest
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "run-corpus"]
    assert "dev" in succeeds("eval", tmp_path / "run")
    with pytest.raises(UserError, match="leave the data out"):
        charlm.train(NAMES, tmp_path / "run", resume=True)
    assert charlm.train(directory=tmp_path / "run", resume=True, max_steps=6, progress=False).step == 6
    charlm.train(NAMES, tmp_path / "run", overwrite=True, **TINY)
    kept = charlm.train(NAMES, **TINY)
    kept.save(tmp_path / "kept")
    folder = kept.directory.parent
    del kept
    gc.collect()
    assert not folder.exists()
    assert "dev" in succeeds("eval", tmp_path / "kept")
    (tmp_path / "new-corpus").mkdir()
    with pytest.raises(UserError, match="is that of an earlier run: overwrite=True replaces it"):
        charlm.train(NAMES, tmp_path / "new", **TINY)


@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ("nowhere.txt", UserError, r"there is no file 'nowhere.txt': a str is a path, and a text is given as a list"),
        ("To be, or not\n" * 99, UserError, r"there is no file 'To be, .{0,90}…': a str is a path"),
        ([], UserError, "the data is empty"),
        (["a", "b"], UserError, "the data has 2 items"),
        (["whole", "cut \ud83d"], UserError, "document 1 is not text"),
        (["a", 3], TypeError, "document 1 is of type int, but must be str"),
        ([{"text": "a"}], TypeError, r"document 0 is of type dict.*: give one column, such as data\['text'\]"),
        ({"text": ["a"]}, TypeError, "give one of them, such as"),
        ({"ada", "bea", "cleo"}, TypeError, r"order differs .* sorted\(data\)"),
        (b"text", TypeError, "must be a path or an iterable of str"),
        (3, TypeError, "must be a path or an iterable of str"),
    ],
)
def test_wrong_data_are_named_and_leave_nothing(tmp_path, data, error, message):
    with pytest.raises(error, match=message):
        charlm.train(data, tmp_path / "run", **TINY)
    assert list(tmp_path.iterdir()) == []


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_step": 3}, "there is no option 'max_step': did you mean max_steps\\?"),
        ({"overwite": True}, "did you mean overwrite\\?"),
        ({"xyzzy": 3}, "there is no option 'xyzzy'$"),
        ({"input_file": "x"}, "it is the argument data"),
        ({"max_steps": "10"}, "max_steps is '10', but must be an integer"),
        ({"max_steps": 2.5}, "max_steps is 2.5, but must be an integer"),
        ({"max_steps": True}, "max_steps is True, but must be an integer"),
        ({"batch_norm": 1}, "batch_norm is 1, but must be true or false"),
        ({"dtype": torch.bfloat16}, "dtype is torch.bfloat16, but must be a string"),
        ({"max_steps": 0}, "max_steps is 0"),
        ({"type": "mlp", "n_layer": 2}, r"mlp does not have these options .*: n_layer \(.*gpt\)"),
        ({"type": "mpl"}, "type is mpl, but must be one of"),
        ({"memory": "2GB"}, "^memory bounds the counting of type ngram"),
        ({"threads": 10**6}, "threads is 1000000"),
        ({"threads": "2"}, "threads is '2', but must be an integer"),
        ({"sample_every": 0.5}, "sample_every is 0.5, but must be an integer"),
        ({"separator": None}, "separator is None, but must be a string"),
        ({"overwrite": "no"}, "overwrite is 'no', but must be true or false"),
        ({"progress": None}, "progress is None, but must be true or false"),
        ({"resume": True}, "there is no checkpoint in"),
        ({"resume": True, "overwrite": True}, "resume=True and overwrite=True exclude each other"),
        ({"device": "abacus"}, "device 'abacus' cannot be used"),
        ({"learning_rate": 1e30, "max_steps": 20}, "try a lower learning_rate$"),
    ],
)
def test_wrong_options_are_named_as_arguments(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        charlm.train(NAMES, tmp_path / "run", **{"progress": False, "n_embd": 2, "n_hidden": 8, **options})
    assert not (tmp_path / "run" / "checkpoint.json").exists() or "learning_rate" in options


def test_numbers_of_numpy_and_devices_of_torch_are_options(tmp_path):
    given = {"max_steps": np.int64(3), "learning_rate": np.float32(0.5), "device": torch.device("cpu"), "dropout": 0}
    run = charlm.train(NAMES, tmp_path / "run", **{**TINY, **given})
    assert run.config.max_steps == 3
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text())["config"]["learning_rate"] == 0.5


def test_threads_are_those_of_the_run_only(monkeypatch):
    before, seen = torch.get_num_threads(), []
    monkeypatch.setattr(Trainer, "_advise", lambda *arguments: seen.append(torch.get_num_threads()))
    charlm.train(NAMES, threads=1, **TINY)
    assert seen == [1]
    assert torch.get_num_threads() == before


def test_sentences_name_arguments_and_leave_paths_alone():
    assert in_python("try a lower --learning-rate") == "try a lower learning_rate"
    assert in_python("/a/--max-steps and x--seed: --resume it") == "/a/--max-steps and x--seed: resume=True it"
    assert in_python("give the data again with -i") == "give the data again"
    assert in_python("--parallel fsdp") == "--parallel fsdp"


def test_several_processes_are_refused(tmp_path, monkeypatch):
    for name, value in (("WORLD_SIZE", "2"), ("RANK", "0")):
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="trains in one process"):
        charlm.train(NAMES, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# ---- the run


def test_a_run_has_the_model_its_losses_and_their_history(tmp_path):
    run = charlm.train(NAMES, tmp_path / "run", type="gpt", n_embd=8, n_layer=1, n_head=1, max_steps=4, progress=False)
    assert type(run.model) is charlm.lm.CharacterModel
    assert run.finished
    assert run.step == 4
    assert run.evaluation is not None
    assert run.evaluation.nats == run.model.best_nats
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [(r["step"], r["split"], r["nats"], r["tokens_per_second"]) for r in run.history] == [
        (line["step"], line["split"], line["nats"], line["tokens/s"]) for line in lines
    ]
    assert run.history[-1]["bits"] == run.history[-1]["nats"] / math.log(2)
    assert repr(run) == (
        f"<charlm run: gpt + 2-gram, 4 steps, finished, {run.evaluation.nats:.4f} nats per character on dev; "
        f"in {tmp_path / 'run'}>"
    )
    assert same(run, charlm.load(tmp_path / "run"))
    test = charlm.lm.evaluate_on(run.model.model, run.corpus, "test")[0]
    assert 0 < test.nats < math.log(11) + 1


def test_a_run_without_a_folder_lasts_as_long_as_its_object(tmp_path):
    run = charlm.train(NAMES, **TINY)
    folder = run.directory.parent
    run.save(tmp_path / "kept")
    with pytest.raises(UserError, match="already contains a trained model"):
        run.save(tmp_path / "kept")
    run.save(tmp_path / "kept", overwrite=True)
    kept = charlm.load(tmp_path / "kept")
    assert same(run, kept)
    assert Path(kept.config.input_file).parent == tmp_path / "kept"
    assert folder.exists()
    del run
    gc.collect()
    assert not folder.exists()
    assert "dev" in succeeds("eval", tmp_path / "kept")
    again = charlm.train(directory=tmp_path / "kept", resume=True, max_steps=6, progress=False)
    assert [record["step"] for record in again.history if record["split"] == "dev"] == [1, 2, 3, 4, 5, 6]


def test_a_failed_run_leaves_no_temporary_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with pytest.raises(UserError, match="2 items"):
        charlm.train(["a", "b"], **TINY)
    assert list(tmp_path.iterdir()) == []


def test_a_second_run_replaces_the_first_only_if_asked(tmp_path):
    first = charlm.train(NAMES, tmp_path / "run", **TINY)
    with pytest.raises(UserError, match="add resume=True to continue it, or overwrite=True to replace it"):
        charlm.train(NAMES, tmp_path / "run", **TINY)
    second = charlm.train(NAMES[::-1], tmp_path / "run", overwrite=True, **TINY)
    assert not same(first, second)
    assert len(list((tmp_path / "run").glob("documents-*.txt"))) == 1
    with pytest.raises(UserError, match="not the one that the checkpoint was trained on"):
        charlm.train(NAMES, tmp_path / "run", resume=True, max_steps=9, progress=False)
    with pytest.raises(UserError, match="n_hidden 9 differs from the checkpoint's 8, which resume=True cannot"):
        charlm.train(directory=tmp_path / "run", resume=True, n_hidden=9)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"did not write \(notes\.txt\): choose a new or empty folder$"):
        charlm.train(NAMES, tmp_path / "mine", **TINY)


def test_a_resumed_run_is_an_uninterrupted_one(tmp_path, monkeypatch):
    whole = charlm.train(NAMES, **TINY)
    with monkeypatch.context() as patch:
        stop_at(3, signal.SIGINT, patch)
        stopped = charlm.train(NAMES, tmp_path / "run", **TINY)
    assert (stopped.finished, stopped.step, stopped.evaluation) == (False, 3, None)
    assert "3 steps, not finished" in repr(stopped)
    assert stopped.model.generate("a", num_samples=2)
    resumed = charlm.train(NAMES, tmp_path / "run", resume=True, progress=False)
    assert resumed.finished
    assert same(resumed, whole)
    assert [r["nats"] for r in resumed.history] == [r["nats"] for r in whole.history]
    assert {"max_steps", "input_file"} <= FREE_ON_RESUME


def test_a_finished_run_keeps_its_documents_when_it_is_resumed_with_the_same_ones_written_otherwise(tmp_path):
    charlm.train([f"{name}\n" for name in NAMES], tmp_path / "run", **TINY)
    resumed = charlm.train(NAMES, tmp_path / "run", resume=True, progress=False)
    assert [str(path) for path in (tmp_path / "run").glob("documents-*.txt")] == [resumed.config.input_file]
    assert "dev" in succeeds("eval", tmp_path / "run")


def test_a_saved_run_leaves_nothing_of_the_one_it_replaces(tmp_path):
    charlm.train(NAMES, tmp_path / "kept", **TINY)
    run = charlm.train(NAMES[::-1], no_diagnostics=True, **TINY)
    run.save(tmp_path / "kept", overwrite=True)
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {path.name for path in run.directory.iterdir()}


def test_lines_of_the_metrics_that_are_not_whole_are_left_out_of_the_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step": 1, "split": "dev", "nats": 2.0, "tokens/s": 3.0}'
    path.write_text(
        f'{whole}\n{{"step": 2}}\n[1]\n3\n{whole.replace("2.0", "null")}\n{whole.replace("2.0", "NaN")}\n{whole[:30]}'
    )
    (record,) = read_metrics(tmp_path)
    assert record["bits"] == 2.0 / math.log(2)


def test_an_interrupt_returns_the_run_and_a_second_one_raises(tmp_path, monkeypatch):
    stop_at(2, signal.SIGINT, monkeypatch)
    assert charlm.train(NAMES, **TINY).step == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    backward = Trainer._backward

    def twice(self: Trainer, *arguments: object) -> int:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        return backward(self, *arguments)

    monkeypatch.setattr(Trainer, "_backward", twice)
    with pytest.raises(KeyboardInterrupt):
        charlm.train(NAMES, **TINY)


def test_a_request_to_terminate_saves_and_reaches_the_program(tmp_path, monkeypatch):
    class Terminated(BaseException):
        pass

    def terminate(*arguments: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        stop_at(2, signal.SIGTERM, monkeypatch)
        with pytest.raises(Terminated):
            charlm.train(NAMES, tmp_path / "run", **TINY)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert json.loads((tmp_path / "run" / "checkpoint.json").read_text())["step"] == 2


def test_another_thread_can_train():
    found = []
    thread = threading.Thread(target=lambda: found.append(charlm.train(NAMES, **TINY)))
    thread.start()
    thread.join()
    assert found[0].finished


def test_a_checkpoint_keeps_what_started_and_resumed_the_run(tmp_path):
    (tmp_path / "my names.txt").write_text("\n".join(NAMES))
    folder = tmp_path / "run"
    shown = succeeds("train", "-i", tmp_path / "my names.txt", "-o", folder, *FLAGS, "--batch-norm", "--no-dedup")
    command = (
        f"charlm train --input-file '{tmp_path}/my names.txt' --work-dir {folder} --max-steps 4 --n-embd 2 "
        "--n-hidden 8 --log-interval 2 --batch-norm --no-dedup"
    )
    first = {"command": command, **VERSIONS}
    assert shown.splitlines()[0] == (
        f"{command}  # charlm {VERSIONS['charlm']}, torch {VERSIONS['torch']}, Python {VERSIONS['python']}"
    )
    charlm.train(directory=folder, resume=True, max_steps=5, progress=False)
    call = f"charlm.train(directory='{folder}', max_steps=5, resume=True)"
    expected = [first, {"command": call, **VERSIONS}]
    assert json.loads((folder / "checkpoint.json").read_text())["commands"] == expected
    old = json.loads((folder / "checkpoint.json").read_text())
    del old["commands"]  # as an earlier charlm wrote it
    (folder / "checkpoint.json").write_text(json.dumps(old))
    assert charlm.train(directory=folder, resume=True, max_steps=6, progress=False).finished


def test_count_models_train_too():
    run = charlm.train(NAMES, type="ngram", order=3, memory=10**8, progress=False)
    assert run.finished
    assert run.config.type == "ngram"


def test_history_becomes_a_data_frame(monkeypatch):
    history = History([{"step": 1, "split": "dev", "nats": 2.0}])

    class Pandas:
        DataFrame = staticmethod(lambda records: ("frame", records))

    monkeypatch.setitem(sys.modules, "pandas", Pandas)
    assert history.to_pandas() == ("frame", [{"step": 1, "split": "dev", "nats": 2.0}])
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(UserError, match="pip install pandas"):
        history.to_pandas()


# ---- what is shown


def test_progress_is_printed_or_not(capsys):
    charlm.train(NAMES, **TINY)
    assert capsys.readouterr() == ("", "")
    charlm.train(NAMES, **{**TINY, "progress": True})
    shown = capsys.readouterr().out
    call, data, *_ = shown.splitlines()
    assert call.startswith("charlm.train(data, max_steps=4, n_embd=2, n_hidden=8, log_interval=2)  # charlm ")
    assert data == "the data: 200 items (line format, guessed); train 160, dev 20, test 20; 11 tokens"
    assert "mlp + 2-gram: 257 parameters, 4 steps on cpu" in shown
    assert "step 4/4 · train" in shown


@pytest.mark.parametrize("data", [NAMES, ["To be, or not to be, that is the question.\n" * 20]])
def test_samples_are_printed_every_so_many_steps_and_change_nothing(data, tmp_path, capsys):
    options = {**TINY, "dropout": 0.2, "type": "mlp"}
    silent = charlm.train(data, **options)
    run = charlm.train(data, tmp_path / "run", sample_every=2, **{**options, "progress": True})
    lines = [line.partition(": ") for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    samples = {step: text for step, _, text in lines if text}
    assert [*samples] == ["step 2", "step 4"]
    count, most = (5, None) if run.model.format == "line" else (1, 80)
    texts = run.model.generate(num_samples=count, max_new_tokens=most)
    assert run.step == 4 == run.history[-1]["step"]
    if run.history[-1]["nats"] == run.model.best_nats:  # the best weights are those of the last step
        assert samples["step 4"] == (", ".join(texts) if count == 5 else repr(texts[0]))
    assert same(run, silent)
    assert [r["nats"] for r in run.history] == [r["nats"] for r in silent.history]
    shown = succeeds("train", "-o", tmp_path / "run", "--resume", "--max-steps", 6, "--sample-every", 3)
    assert [line.partition(": ")[0] for line in shown.splitlines() if line.startswith("step 6: ")] == ["step 6"]


def test_a_negative_number_of_steps_between_samples_is_refused():
    with pytest.raises(UserError, match="sample_every is -1, but must be at least 0"):
        charlm.train(NAMES, sample_every=-1, **TINY)


def test_a_notebook_shows_one_bar_that_moves(monkeypatch):
    """A stand-in of IPython and ipywidgets, with what rich uses of them."""
    shown: list[object] = []

    class Output:
        def __enter__(self) -> Self:
            shown.append("in the bar")
            return self

        def __exit__(self, *arguments: object) -> None:
            pass

        def clear_output(self, wait: bool) -> None:
            pass

    class ZMQInteractiveShell:
        pass

    def module(name: str, **contents: object) -> None:
        made = type(sys)(name)
        made.__spec__ = type(sys.__spec__)(name, None)
        vars(made).update(contents)
        monkeypatch.setitem(sys.modules, name, made)

    module("IPython")
    module("IPython.display", display=shown.append)
    module("ipywidgets", Output=Output)
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    hostile = [f"{name}<b>" for name in NAMES]
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        run = charlm.train(hostile, **{**TINY, "progress": True})
    html = [getattr(each, "html", "") for each in shown]
    assert run.finished
    assert sum(isinstance(each, Output) for each in shown) == 1
    assert shown.count("in the bar") >= 4
    assert any("training 4/4" in each for each in html)
    assert any("the data: 200 items" in each for each in html)
    assert stdout.getvalue() == ""


# ---- charlm.lm


def test_every_name_of_the_package_is_there_and_importing_it_is_cheap():
    for name in charlm.lm.__all__:
        assert getattr(charlm.lm, name) is not None
    assert set(charlm.lm.__all__) == {*charlm.lm._MODULE_OF, *charlm.lm._MODULES}
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        charlm.lm.nothing  # noqa: B018
    code = "import sys, charlm, charlm.lm; print(*[n for n in sys.modules if n.startswith(('charlm.lm.', 'rich'))])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert result.stdout == "\n"


def test_a_report_is_written_where_the_end_of_a_temporary_run_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from charlm import report

    def write(directories: list[Path], path: str | os.PathLike[str]) -> Path:
        return Path(shutil.copy(directories[0] / "metrics.csv", path))

    monkeypatch.setattr(report, "write", write)
    monkeypatch.chdir(tmp_path)
    path = charlm.train(NAMES, **TINY).report()
    gc.collect()
    assert path.exists()
