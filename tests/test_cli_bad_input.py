"""Bad input to the commands: one sentence and exit code 2, or the right result, and no partial files."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from lm_support import fails, run_on_own_streams, succeeds, untrained_checkpoint

from charlm.lm import checkpoint
from charlm.lm.checkpoint import MANIFEST
from charlm.lm.data import build_corpus, read_corpus

CHARLM = [sys.executable, "-c", "from charlm.cli import main; main()"]
TINY = ["--n-hidden", "8", "--n-embd", "2", "--block-size", "3", "--batch-size", "8", "--max-steps", "2"]
NAMES = "emma\nolivia\nava\nisabella\n" * 10
TIMEOUT = 60.0  # seconds


@pytest.fixture
def run_of(tmp_path):
    """Saves an untrained model of a file's corpus: its folder."""

    def save(text: str = NAMES, format: str = "line", type: str = "mlp") -> Path:
        path = tmp_path / "data.txt"
        path.write_text(text, encoding="utf-8")
        checkpoint.save(
            tmp_path / "run", untrained_checkpoint(read_corpus(path, format=format), type, input_file=str(path))
        )
        return tmp_path / "run"

    return save


# ---- data


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b" \r\n\t\n", "is empty"),
        (b"a", "has 1 item, but train, dev and test need one each"),
        (b"emma olivia\n", "has 1 item"),
        (b"\x7fELF\x02\x01\x01\x00\xff\xfe", "is not UTF-8: byte 0xff at offset 8"),
        ("emma\nava\n".encode("utf-16"), "is not UTF-8: byte 0xff at offset 0"),
        (b"emma\nav\xc3", "is not UTF-8: byte 0xc3 at offset 7"),
    ],
)
def test_unusable_data_is_one_sentence(tmp_path, data, words):
    path = tmp_path / "data.txt"
    path.write_bytes(data)
    assert words in fails("train", "-i", path, "-o", tmp_path / "run", *TINY)
    assert [file.name for file in tmp_path.iterdir()] == ["data.txt"]


def test_line_ends_may_be_mixed():
    mixed = build_corpus(NAMES.replace("emma\n", "emma\r\n").replace("ava\n", "ava\r\n"))
    assert mixed.parts["train"] == build_corpus(NAMES).parts["train"]


def test_bytes_of_mixed_line_ends_are_read_as_newlines(tmp_path):
    path = tmp_path / "data.txt"
    path.write_bytes(b"emma\r\nolivia\rava\n\r\nisabella")
    corpus = read_corpus(path, format="line")
    assert sorted(item for part in corpus.parts.values() for item in part) == ["ava", "emma", "isabella", "olivia"]


@pytest.mark.exhaustive
def test_a_hundred_thousand_code_points_are_a_vocabulary_and_their_bigram_is_refused(tmp_path, run_of):
    points = [chr(code) for code in range(0x4E00, 0x4E00 + 110_000) if not 0xD800 <= code < 0xE000]
    run = run_of("".join(points[:100_000]), "text")
    output = succeeds("compare", run, "--baselines")
    assert "unigram" in output
    assert "bigram" not in output  # 10¹⁰ counts
    assert json.loads(succeeds("score", run, "".join(points[5:9]), "--json"))["bits_per_char"] > 10
    assert len(succeeds("sample", run, "-n", 1, "--max-new-tokens", 2).splitlines()[-1]) == 2
    flags = ["-i", tmp_path / "data.txt", "-o", tmp_path / "bigram", "--format", "text", "--type", "bigram"]
    assert "a table of 100,000 × 100,000 counts does not fit" in fails("train", *flags)
    assert not (tmp_path / "bigram").exists()


@pytest.mark.exhaustive
def test_one_long_line_takes_a_few_bytes_of_memory_for_each_of_its_bytes(tmp_path):
    path = tmp_path / "line.txt"
    size = 5_000_000
    path.write_bytes((b"shall I compare thee to a summer's day " * (size // 39 + 1))[:size])
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from charlm.lm.data import read_corpus; from charlm.lm.evaluate import baselines\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); corpus = read_corpus(Path(sys.argv[1])); corpus.examples('train', 8); baselines(corpus)\n"
        "print(corpus.format, (peak() - before) * 1024)"
    )
    output = subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, check=True).stdout
    format, peak = output.split()
    assert format == "text"
    assert int(peak) < 9 * size  # measured: 6.1; before encoding went piece by piece, 25


# ---- options of sampling


def test_a_prompt_of_unknown_characters_and_options_at_their_ends(run_of):
    run = run_of()
    assert "'X' at position 1 of the prompt" in fails("sample", run, "--prompt", "eX")
    assert "'\\n' at position 4 of the prompt" in fails("sample", run, "--prompt", "emma\n")
    certain = [succeeds("sample", run, "-n", 1, "--temperature", 0, "--seed", seed) for seed in (1, 2)]
    assert certain[0] == certain[1]
    plain, above = (succeeds("sample", run, *flags) for flags in ((), ("--top-k", 10**12)))
    assert plain == above
    for flags in (("--top-k", 0), ("--top-p", 0), ("--temperature", -1), ("--temperature", "nan"), ("-n", 0)):
        assert "but must be" in fails("sample", run, *flags)


def test_more_samples_than_the_memory_holds_are_refused(run_of):
    message = fails("sample", run_of(), "-n", 10**10, "--max-new-tokens", 1000)
    assert "10,000,000,000 samples of up to 1,000 characters may take 16" in message
    assert "draw fewer at a time" in message


# ---- checkpoints


def change_manifest(run: Path, change) -> None:
    manifest = json.loads((run / MANIFEST).read_text())
    change(manifest)
    (run / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize("command", [("sample",), ("eval",), ("compare",), ("score", "emma")], ids=lambda c: c[0])
def test_every_command_refuses_a_checkpoint_cut_short(run_of, command):
    run = run_of()
    path = next(run.glob("model-*"))
    path.write_bytes(path.read_bytes()[:-1])
    assert "is truncated or altered" in fails(command[0], run, *command[1:])
    (run / MANIFEST).write_text((run / MANIFEST).read_text()[:100])
    assert "is damaged or not a charlm checkpoint" in fails(command[0], run, *command[1:])


@pytest.mark.parametrize(
    "name",
    [
        "../../secret.safetensors",
        "/etc/passwd",
        "..",
        "",
        ".",
        "model-0123456789abcdef.safetensors/../../x",
        "model-0123456789abcdef.safetensors\n",
        "training-0123456789abcdef.safetensors",
        7,
        None,
        ["model"],
    ],
)
def test_a_manifest_may_name_only_files_of_its_own(run_of, name):
    run = run_of()
    change_manifest(run, lambda manifest: manifest["files"]["model"].update(name=name))
    message = fails("sample", run)
    assert f"{MANIFEST} is damaged" in message
    assert "is not the name of a" in message or "name is" in message


def test_a_pickle_in_the_place_of_safetensors_is_refused_and_not_run(run_of, tmp_path):
    class Hostile:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    run = run_of()
    data = pickle.dumps(Hostile())
    path = next(run.glob("model-*"))
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    change_manifest(run, lambda m: m["files"]["model"].update(bytes=len(data), sha256=digest))
    assert f"{path} is not a safetensors file" in fails("sample", run)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: m.update(version=99), "was written by a newer charlm (checkpoint version 99"),
        (lambda m: m.update(version="1"), "its version is '1'"),
        (lambda m: m.update(version=True), "its version is True"),
        (lambda m: m.update(version=0), "its version is 0"),
        (lambda m: m.update(step="five"), "step is 'five'"),
        (lambda m: m.update(files=[]), "is damaged"),
        (lambda m: m.update(config=[1]), "is damaged"),
        (lambda m: m["config"].update(block_size="8"), "is damaged"),
        (lambda m: m["config"].update(colour="red"), "colour"),
        (lambda m: m["vocabulary"].update(chars=5), "chars is 5"),
        (lambda m: m["vocabulary"].update(chars="zab"), "not sorted and unique"),
        (lambda m: m["vocabulary"].update(chars="ab"), "its vocabulary has 3 tokens"),
        (lambda m: m["model"].update(n_hidden=9), "do not fit its model"),
        (lambda m: m["model"].update(type="gpt9"), "do not fit its model"),
        (lambda m: m.pop("digest"), "it has no 'digest'"),
    ],
)
def test_a_manifest_of_wrong_values_is_one_sentence(run_of, change, words):
    run = run_of()
    change_manifest(run, change)
    assert words in fails("sample", run)


@pytest.mark.parametrize("text", ["[" * 100_000, "null", "1", '"version"', '["version"]'])
def test_json_that_is_no_manifest_is_one_sentence(run_of, text):
    run = run_of()
    (run / MANIFEST).write_text(text)
    assert "is damaged or not a charlm checkpoint" in fails("sample", run)


# ---- output


def charlm(*arguments: str | Path, **options) -> subprocess.CompletedProcess[str]:
    command = [*CHARLM, *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=TIMEOUT, check=False, **options)


def assert_one_sentence(result: subprocess.CompletedProcess[str], words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("charlm: ")
    assert words in result.stderr
    assert result.stderr.count("\n") == 1


def test_a_full_disk_leaves_the_old_checkpoint_and_nothing_else(run_of):
    run = run_of()
    before = {path.name: path.read_bytes() for path in run.iterdir()}
    data = run.parent / "data.txt"

    def limit_files_to_8_kb() -> None:  # write() then fails as on a full disk, in root's processes too
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    flags = ["-i", data, "-o", run, "--n-hidden", "500", "--max-steps", "2", "--overwrite"]
    result = charlm("train", *flags, stdout=subprocess.DEVNULL, preexec_fn=limit_files_to_8_kb)
    assert_one_sentence(result, f"cannot write {run}/model-")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    checkpoint.load(run).build_model()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_standard_output_is_one_sentence(run_of, monkeypatch, capsys):
    run = run_of()
    with open("/dev/full", "w") as full:
        assert_one_sentence(charlm("score", run, "emma", stdout=full), "cannot write the output: No space left")
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        assert run_on_own_streams("score", run, "emma", "--json") == 2
    assert capsys.readouterr().err == "charlm: cannot write the output: No space left on device\n"


def test_a_place_that_takes_no_files_is_one_sentence(run_of, tmp_path):
    run = run_of()
    in_the_way = tmp_path / "file"
    in_the_way.write_text("kept")
    for place in (in_the_way, in_the_way / "run"):
        assert "cannot write" in fails("train", "-i", tmp_path / "data.txt", "-o", place, *TINY)
        assert f"cannot write {place / 'x.svg'}" in fails("score", run, "emma", "--svg", place / "x.svg")
    assert in_the_way.read_text() == "kept"


@pytest.mark.skipif(not Path("/sys/kernel").is_dir(), reason="needs Linux's /sys, where not even root can create files")
def test_a_read_only_folder_is_one_sentence(run_of):
    run = run_of()
    assert "cannot write /sys/kernel" in fails("train", "-i", run.parent / "data.txt", "-o", "/sys/kernel/run", *TINY)
    assert "cannot write /sys/kernel/x.svg" in fails("score", run, "emma", "--svg", "/sys/kernel/x.svg")


# ---- closed pipes and interrupts


def test_a_reader_that_goes_leaves_no_traceback(run_of):
    command = [*CHARLM, "score", str(run_of())]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdin.write(b"emma\n" * 5000)
        process.stdin.close()
        assert process.stdout.readline().split() == [*map(str.encode, "emma"), b"end"]
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(TIMEOUT) == 1


@pytest.fixture
def heeded_ctrl_c():
    """A job that a shell starts in the background ignores SIGINT, and so would all its children."""
    found = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, found)


@pytest.mark.usefixtures("heeded_ctrl_c")
def test_ctrl_c_leaves_no_traceback(run_of, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    command = [*CHARLM, "score", run_of(), "-i", pipe]
    with (
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process,
        pipe.open("wb"),  # waits until the command, its imports done, opens the other end
    ):
        process.send_signal(signal.SIGINT)
        assert process.wait(TIMEOUT) == 128 + signal.SIGINT
        assert process.stderr.read() == b""
