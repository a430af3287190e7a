"""The oracle and the kernels share no code: an error in shared code would pass every comparison of the two.

One dependency joins them, the fallback: for tensors that the kernels do not know, an op of `charlm.functional` calls
the function of the same name in `charlm.reference`.
"""

from __future__ import annotations

import ast
import importlib.util
import pickle
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import charlm
from charlm import functional, ngrams, reference

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "bench").rglob("*.py")])
PACKAGE = Path(charlm.__file__).parent
REFERENCE = sorted((PACKAGE / "reference").glob("*.py"))
PRODUCTION = sorted(path for path in PACKAGE.rglob("*.py") if path not in REFERENCE)


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def imported(path: Path, root: Path = PACKAGE.parent) -> Iterator[str]:
    """Every name that a file of a package below `root` imports, absolute; of `from a import b` it is `a.b`."""
    package = ".".join(path.relative_to(root).parent.parts)
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
            yield from (f"{module}.{alias.name}" for alias in node.names)


def is_in(name: str, package: str) -> bool:
    return f"{name}.".startswith(f"{package}.")


@pytest.mark.parametrize("path", REFERENCE, ids=lambda path: path.stem)
def test_the_reference_imports_nothing_of_charlm_but_itself(path: Path) -> None:
    ours = [name for name in imported(path) if is_in(name, "charlm")]
    assert [name for name in ours if not is_in(name, "charlm.reference")] == []
    assert "importlib" not in {name.partition(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_what_a_script_imports_of_charlm_exists(path: Path) -> None:
    """Also inside functions that only a run of minutes calls."""
    for name in imported(path, ROOT):
        if is_in(name, "charlm"):
            pkgutil.resolve_name(name)


def test_production_code_imports_the_reference_for_the_fallback_only() -> None:
    found = {
        (path.relative_to(PACKAGE).as_posix(), name)
        for path in PRODUCTION
        for name in imported(path)
        if is_in(name, "charlm.reference")
    }
    fallbacks = ("cross_entropy", "embedding", "embedding_linear", "entropy", "kl_divergence")
    assert found == {
        ("__init__.py", "charlm.reference"),  # public
        ("ngrams.py", "charlm.reference.ngrams"),
        ("lm/compression.py", "charlm.reference.byte_model.ByteModel"),
        *((f"functional/{op}.py", "charlm.reference") for op in fallbacks),
    }


@pytest.mark.parametrize("path", sorted((PACKAGE / "functional").glob("*.py")), ids=lambda path: path.stem)
def test_an_op_calls_the_function_of_its_own_name_and_nothing_else_of_the_reference(path: Path) -> None:
    used = {
        node.attr
        for node in ast.walk(tree(path))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "reference"
    }
    assert used <= {path.stem}


def test_the_imports_of_every_form_are_seen(tmp_path: Path) -> None:
    file = tmp_path / "charlm" / "reference" / "sample.py"
    file.parent.mkdir(parents=True)
    file.write_text(
        "import charlm.nn\n"
        "from .. import _checks\n"
        "from ..functional.outputs import CrossEntropyOutput\n"
        "def f():\n    from .entropy import entropy\n"
    )
    expected = ["charlm.nn", "charlm._checks", "charlm.functional.outputs.CrossEntropyOutput"]
    assert sorted(imported(file, tmp_path)) == sorted([*expected, "charlm.reference.entropy.entropy"])


def test_the_reference_returns_plain_tuples_and_the_functions_named_ones() -> None:
    logits, target = torch.zeros(2, 4), torch.tensor([1, 3])
    table, weight = torch.eye(2), torch.ones(3, 2)
    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("cross_entropy", (logits, target), {"return_lse": True}),
        ("linear_cross_entropy", (table, table, target % 2), {"return_lse": True}),
        ("embedding_linear", (target[:, None] % 2, table, weight), {"return_plan": True}),
    ]
    for name, arguments, options in calls:
        plain, named = (getattr(module, name)(*arguments, **options) for module in (reference, functional))
        assert type(plain) is tuple
        assert type(named) in (functional.CrossEntropyOutput, functional.EmbeddingLinearOutput)
        assert len(plain) == len(named)
        torch.testing.assert_close(named[0], plain[0])


# Made by pickle.dumps(output, protocol=2) while the types were defined in charlm.reference.
OLD_PICKLES = {
    b"\x80\x02ccharlm.reference.cross_entropy\nCrossEntropyOutput\nq\x00(G?\xf8\x00\x00\x00\x00\x00\x00NNNNt"
    b"q\x01\x81q\x02.": functional.CrossEntropyOutput(1.5),
    b"\x80\x02ccharlm.reference.embedding_linear\nEmbeddingLinearOutput\nq\x00G@\x04\x00\x00\x00\x00\x00\x00"
    b"X\x06\x00\x00\x00foldedq\x01X\x08\x00\x00\x00gatheredq\x02\x87q\x03\x81q\x04.": functional.EmbeddingLinearOutput(
        2.5, "folded", "gathered"
    ),
    b"\x80\x02ccharlm.reference.ngrams\nNgramLevel\nq\x00K\x01K\x02K\x03\x87q\x01\x81q\x02.": ngrams.NgramLevel(
        1, 2, 3
    ),
    b"\x80\x02ccharlm.reference.ngrams\nSpectrum\nq\x00K\x04K\x05\x86q\x01\x81q\x02.": ngrams.Spectrum(4, 5),
}


@pytest.mark.parametrize("old", OLD_PICKLES, ids=lambda old: type(OLD_PICKLES[old]).__name__)
def test_an_output_that_was_pickled_before_the_types_moved_is_loaded(old: bytes) -> None:
    loaded, expected = pickle.loads(old), OLD_PICKLES[old]
    assert type(loaded) is type(expected)
    assert loaded == expected
    assert pickle.loads(pickle.dumps(expected)) == expected


def test_a_new_pickle_names_the_public_module_of_an_output() -> None:
    types = (functional.CrossEntropyOutput, functional.EmbeddingLinearOutput, ngrams.NgramLevel, ngrams.Spectrum)
    assert [type_.__module__ for type_ in types] == ["charlm.functional", "charlm.functional", *["charlm.ngrams"] * 2]


def test_the_old_import_paths_of_the_outputs_lead_to_the_same_types() -> None:
    from charlm.reference import CrossEntropyOutput, EmbeddingLinearOutput
    from charlm.reference.ngrams import NgramLevel, Spectrum

    assert (CrossEntropyOutput, EmbeddingLinearOutput, NgramLevel, Spectrum) == (
        functional.CrossEntropyOutput,
        functional.EmbeddingLinearOutput,
        ngrams.NgramLevel,
        ngrams.Spectrum,
    )
