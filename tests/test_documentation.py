"""The documentation is true: its Python runs, its figures are the recorded ones, its links and commands exist."""

import contextlib
import doctest
import importlib
import inspect
import io
import json
import pkgutil
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

import bench.__main__
import charlm
from bench import record, report
from charlm import functional, nn, patching, reference
from charlm.cli import app

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BENCHMARKS = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 130


def test_the_readmes_python_runs_in_its_order() -> None:
    namespace: dict[str, object] = {}
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        exec(compile(block, "README.md", "exec"), namespace)
    assert torch.nn.functional.cross_entropy is not functional.cross_entropy  # the patch of the last block has ended


DOCUMENTS = [path for path in sorted((ROOT / "docs").glob("*.md")) if "```python" in path.read_text(encoding="utf-8")]
DRAWING = " matplotlib"  # behind "python": the block only draws, with a library that only requirements-dev.txt installs


def run_document(path: Path, drawing: bool = False) -> None:
    """Runs the Python of a document in its order, and compares what a block prints with the text up to the next block.

    A `text` block right below holds all that is printed, and nothing else.
    """
    namespace: dict[str, object] = {}
    text = path.read_text(encoding="utf-8")
    blocks = list(re.finditer(rf"```python({DRAWING})?\n(.*?)```", text, flags=re.DOTALL))
    assert blocks
    for block, end in zip(blocks, [block.start() for block in blocks[1:]] + [len(text)], strict=True):
        if block[1] and not drawing:
            continue
        printed = io.StringIO()
        line = text.count("\n", 0, block.start(2))  # so that an error names the document's own line
        with contextlib.redirect_stdout(printed):
            exec(compile("\n" * line + block[2], path, "exec"), namespace)
        below = text[block.end() : end]
        shown = re.match(r"\s*```text\n(.*?)```", below, flags=re.DOTALL)
        if shown:
            assert printed.getvalue() == shown[1]
        else:
            assert printed.getvalue().strip() in below


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.stem)
def test_the_python_of_a_document_runs_and_prints_what_the_document_says_next(path: Path) -> None:
    run_document(path)


@pytest.mark.parametrize(
    "document",
    [
        "```python\nassert 1 == 2\n```",
        "```python\nprint('| folded | 1.00 |')\n```\n\n| folded | 2.00 |",
        "```python\nprint('1.00')\n```\n```python\npass\n```\n1.00",  # under another block
        "```python\nprint('1.00')\n```\n```text\n1.00\n2.00\n```",
        "```python\npass\n```\n```text\n1.00\n```",
    ],
)
def test_a_wrong_claim_of_a_document_fails(document: str, tmp_path: Path) -> None:
    path = tmp_path / "wrong.md"
    path.write_text(document, encoding="utf-8")
    with pytest.raises(AssertionError):
        run_document(path)


@pytest.mark.parametrize(
    "path",
    [path for path in DOCUMENTS if f"```python{DRAWING}\n" in path.read_text(encoding="utf-8")],
    ids=lambda path: path.stem,
)
def test_a_document_draws_the_picture_that_it_shows(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path)
    run_document(path, drawing=True)
    (drawn,) = (tmp_path / "docs").iterdir()
    assert f"]({drawn.name})" in path.read_text(encoding="utf-8")
    header = slice(0, 24)  # a PNG's signature, width and height; pixels differ among matplotlib's versions
    assert drawn.read_bytes()[header] == (path.parent / drawn.name).read_bytes()[header]


CONSOLE = r"```console\n(.*?)```"


@pytest.mark.parametrize(
    "path",
    [path for path in PAGES if re.search(CONSOLE, path.read_text(encoding="utf-8"), re.DOTALL)],
    ids=lambda p: p.stem,
)
def test_the_commands_of_a_page_print_what_it_shows_below_them(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(CONSOLE, path.read_text(encoding="utf-8"), re.DOTALL)
    for command, shown in re.findall(r"^\$ charlm (.*)\n((?:(?!\$ ).*\n)*)", "".join(blocks), re.MULTILINE):
        result = CliRunner().invoke(app, shlex.split(command))
        assert result.exit_code == 0, result.output
        printed = "\n".join(line.rstrip() for line in result.stdout.splitlines()).strip("\n")
        assert not shown or printed == shown.rstrip("\n"), command


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_links_of_the_documentation_lead_to_files_and_headings(path: Path) -> None:
    links = re.findall(r"\]\(([^)#]*)#?([^)]*)\)", path.read_text(encoding="utf-8"))
    for target, anchor in links:
        if "://" in target:
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), f"{target}#{anchor}"
    if path.parent.name == "docs":
        assert f"](docs/{path.name})" in README


def commands(start: str) -> list[list[str]]:
    """The arguments of the commands in the pages that begin with `start`: in code blocks without a language."""
    blocks = [
        block
        for path in PAGES
        for language, block in re.findall(r"^```(.*)\n([^`]*?)^```$", path.read_text(encoding="utf-8"), re.MULTILINE)
        if not language
    ]
    lines = [line for block in blocks for line in block.splitlines() if line.startswith(start)]
    return [shlex.split(line, comments=True)[len(start.split()) :] for line in lines]


def test_commands_of_charlm_in_the_documentation_have_options_that_exist() -> None:
    found = commands("charlm ")
    assert len(found) >= 10
    group = typer.main.get_command(app)
    for name, *arguments in found:
        options = {option for parameter in group.commands[name].params for option in parameter.opts}
        assert {argument for argument in arguments if argument.startswith("-")} <= options, (name, arguments)


def test_commands_of_the_benchmark_in_the_documentation_can_be_parsed() -> None:
    found = commands("python -m bench ")
    assert len(found) >= 8
    for arguments in found:
        bench.__main__.parser().parse_args(arguments)


OPS = [
    importlib.import_module(f"{package.__name__}.{module.name}")
    for package in (functional, reference)
    for module in pkgutil.iter_modules(package.__path__)
    if module.name in package.__all__
]


@pytest.mark.parametrize("module", [*OPS, nn, patching], ids=lambda module: module.__name__)
def test_examples_in_docstrings_print_what_they_say(module: ModuleType) -> None:
    result = doctest.testmod(module, extraglobs={"torch": torch}, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0


def test_one_table_names_every_environment_variable_that_the_code_reads() -> None:
    sources = [ROOT / "setup.py", *(ROOT / "charlm").rglob("*.py")]
    read = {name for path in sources for name in re.findall(r"CHARLM_[A-Z_]+", path.read_text(encoding="utf-8"))}
    read -= {name for name in read if name.startswith("CHARLM_HAVE") or name == "CHARLM_ISA"}
    assert read
    for name in read:
        assert [path.name for path in PAGES if f"| `{name}` |" in path.read_text(encoding="utf-8")] == ["install.md"]


def test_every_public_op_stands_in_the_readme() -> None:
    ops = [
        name
        for name in functional.__all__
        if inspect.isfunction(op := getattr(functional, name)) and "charlm" in op.__module__
    ]
    assert len(ops) >= 7
    for name in ops:
        assert f"`functional.{name}`" in README
    assert set(charlm.__all__) >= {"functional", "nn", "reference", "patch_torch", "patch_model", "build_info"}


@pytest.mark.parametrize("study", ["models", "makemore"])
def test_the_table_of_models_is_the_recorded_one(study: str) -> None:
    command = [sys.executable, "-m", f"bench.studies.{study}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() in BENCHMARKS


def test_the_table_of_corpora_is_the_recorded_one() -> None:
    command = [sys.executable, "scripts/corpora.py", "table"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert printed.stdout.strip() in (ROOT / "docs" / "language_model.md").read_text(encoding="utf-8")


def test_the_losses_of_a_corpus_are_those_of_its_run(tmp_path: Path) -> None:
    names = (ROOT / "charlm" / "data" / "names.txt").read_text(encoding="utf-8").split()[:1500]
    run = charlm.train(names, tmp_path / "run", max_steps=5, eval_interval=5, mix_ngram=3, progress=False)
    found = runpy.run_path(str(ROOT / "scripts" / "corpora.py"))["losses"](tmp_path / "run")
    assert run.evaluation is not None
    assert found["dev"] == pytest.approx(run.evaluation.bits_per_char, rel=1e-6)
    assert found["orders"][found["best_order"]] == min(found["orders"].values())
    assert found["orders"][3] == pytest.approx(found["3-gram, Kneser–Ney"], rel=1e-6)


def recorded_case(file: str, name: str) -> dict[str, Any]:
    content = record.read(record.RESULTS / f"{file}.json")
    return {case["name"]: case for case in content.get("bench", content)["cases"]}[name]


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("cpu_ops", "cross_entropy/default/4096x27/float32"),
        ("cpu_ops", "cross_entropy/default/2048x32000/float32"),
        ("cpu_layers", "linear_cross_entropy/default/1024x512x32000/float32"),
        ("cpu_layers", "train_step/default/4096x8x24x200x27/float32"),
        ("h200", "cross_entropy/default/65536x27/bfloat16"),
        ("h200", "cross_entropy/default/8192x32000/bfloat16"),
    ],
)
def test_the_readmes_rows_of_speed_are_recorded(file: str, name: str) -> None:
    case = recorded_case(file, name)
    waited = 2 * case.get("late", {}).get("ours", 0) > case["times"]["ours"]["samples"]  # the GPU for Python: a bound
    time = "≤ " * waited + report.duration(case["times"]["ours"]["median"])
    ratios = ["≥ " * waited + report.ratio(case["figures"][peer]) for peer in ("eager", "compile")]
    label = report._work(case).replace("its gradient", "embedding gradient")
    row = [label, "H200" if file == "h200" else "CPU", time, *ratios]
    assert f"| {' | '.join(row)} |" in README


PEERS = json.loads((record.RESULTS / "h200_peers.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", PEERS["linear_cross_entropy"], ids=lambda case: f"{case['shape'][-1]}")
def test_times_of_linear_cross_entropy_beside_other_libraries_are_recorded(case: dict[str, Any]) -> None:
    n, d, v = case["shape"]
    time = {library: report.duration(ms / 1e3) for library, ms in case["ms"].items()}
    cells = [f"{time[library]}, {report.size(mb * 1e6)}" for library, mb in case["mb"].items()]
    assert f"| {n} × {d} → {v} | {' | '.join(cells)} |" in BENCHMARKS
    if v > 10_000:
        row = [time["torch"], time["Liger"], time["CCE"], "not measured", time["charlm"]]
        assert f"| H200: linear, {n} × {d} → {v} | {' | '.join(row)} |" in README


def test_the_readmes_time_of_cross_entropy_on_a_gpu_is_recorded() -> None:
    case = recorded_case("h200", "cross_entropy/default/8192x32000/bfloat16")
    assert case["late"]["liger"] == case["times"]["liger"]["samples"]  # Python launched it too slowly: a bound
    torchs, ligers, ours = (report.duration(case["times"][name]["median"]) for name in ("eager", "liger", "ours"))
    assert f"| H200: cross_entropy, 8192 × 32000 | {torchs} | ≤ {ligers} | – | not measured | {ours} |" in README


def test_what_was_measured_on_a_gpu_is_what_the_record_says() -> None:
    assert report.MEASURED.read_text(encoding="utf-8") == report.document(), "run python -m bench.report gpu"


def test_the_readmes_time_of_cross_entropy_on_the_cpu_is_recorded() -> None:
    times = recorded_case("cpu_ops", "cross_entropy/default/65536x256/float32")["times"]
    torchs, ours = (report.duration(times[name]["median"]) for name in ("eager", "ours"))
    row = f"| CPU: cross_entropy, 65536 × 256, float32 | {torchs} | no kernel | – | no kernel | {ours} |"
    assert row in README
