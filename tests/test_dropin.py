"""charlm.nn and charlm.functional take the place of torch's modules in a file whose import lines alone change."""

from __future__ import annotations

import importlib
import inspect
import io
import pickle
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import charlm
import charlm.functional as F
from charlm import ngrams, nn

MODEL = (Path(__file__).parent / "torch_model_file.py").read_text(encoding="utf-8")
IMPORTS = ["import torch.nn as nn", "from torch.nn import functional as F"]
SPELLINGS = [
    ["import charlm.nn as nn", "from charlm.nn import functional as F"],
    ["import charlm.nn as nn", "import charlm.functional as F"],
    ["from charlm import nn", "import charlm.nn.functional as F"],
    ["from charlm import nn", "F = nn.functional"],
]


def run(source: str) -> dict[str, Any]:
    """A module is registered, since dataclasses look their own up."""
    module = sys.modules[__name__ + ".model"] = ModuleType(__name__ + ".model")
    exec(compile(source, "model.py", "exec"), vars(module))
    return vars(module)


@pytest.mark.parametrize("spelling", SPELLINGS, ids=" and ".join)
def test_a_model_file_trains_alike_after_its_two_import_lines_are_changed(spelling: list[str]) -> None:
    source = MODEL
    for line, ours in zip(IMPORTS, spelling, strict=True):
        assert source.count(f"{line}\n") == 1
        source = source.replace(f"{line}\n", f"{ours}\n")
    expected, torchs_model = run(MODEL)["train"]()
    changed = run(source)
    losses, model = changed["train"]()
    assert losses == pytest.approx(expected, rel=1e-5)
    assert losses[-1] < losses[0]
    assert changed["F"] is F
    assert type(model.transformer.wte) is nn.Embedding
    assert type(torchs_model.transformer.wte) is torch.nn.Embedding
    model.load_state_dict(torchs_model.state_dict())


@pytest.mark.parametrize(("ours", "torchs"), [(F, torch.nn.functional), (nn, torch.nn)], ids=["functional", "nn"])
def test_every_name_of_torch_is_found_and_those_that_we_lack_are_torchs_own(
    ours: ModuleType, torchs: ModuleType
) -> None:
    replaced = {
        name for name in vars(torchs) if not name.startswith("__") and getattr(ours, name) is not vars(torchs)[name]
    }
    assert replaced <= {name for name in vars(ours) if name in ours.__all__}  # ours, on purpose
    assert {"embedding", "cross_entropy"} <= replaced or {"Embedding", "CrossEntropyLoss", "functional"} <= replaced


@pytest.mark.parametrize(("ours", "torchs"), [(F, torch.nn.functional), (nn, torch.nn)], ids=["functional", "nn"])
def test_a_star_import_brings_torchs_names_too(ours: ModuleType, torchs: ModuleType) -> None:
    namespace: dict[str, Any] = {}
    exec(f"from {ours.__name__} import *", namespace)
    assert {name for name in namespace if not name.startswith("__")} == set(ours.__all__)
    assert all(namespace[name] is getattr(ours, name) for name in ours.__all__)
    functions_and_classes = {
        name
        for name, value in vars(torchs).items()
        if callable(value) and name[0] != "_" and str(value.__module__).startswith(torchs.__name__)
    }
    assert len(functions_and_classes) > 70
    assert functions_and_classes <= set(namespace)


def test_a_name_that_neither_has_is_an_attribute_error_that_names_both_modules() -> None:
    for module, torchs in ((F, "torch.nn.functional"), (nn, "torch.nn")):
        with pytest.raises(AttributeError, match=f"'{module.__name__}' has no attribute 'relou', .* '{torchs}'"):
            _ = module.relou
        assert not hasattr(module, "__wrapped__")  # inspect, doctest and copy look such names up
    with pytest.raises(ImportError, match=r"cannot import name 'Linera' from 'charlm\.nn'"):
        exec("from charlm.nn import Linera")
    with pytest.raises(ModuleNotFoundError, match=r"No module named 'charlm\.nn\.utills'"):
        importlib.import_module("charlm.nn.utills")


@pytest.mark.parametrize("module", [charlm, F, nn], ids=lambda module: module.__name__)
def test_dir_shows_public_names_only(module: ModuleType) -> None:
    names = [name for name in dir(module) if not name.startswith("__")]
    assert set(names) == set(module.__all__) - {"__version__"}
    assert not {name for name in names if name.startswith("_")}
    for name in names:
        value = getattr(module, name)
        if inspect.ismodule(value):
            assert value.__name__.startswith(("charlm.", "torch.nn."))
        assert getattr(value, "__module__", "") not in ("typing", "collections.abc")
        assert name not in ("kernels", "patching", "annotations", "TYPE_CHECKING", "beside_torch", "public_dir")


def test_a_function_that_is_replaced_in_torch_is_found_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "relu", torch.tanh)
    assert F.relu is torch.tanh


SUBMODULES = """
import sys
import charlm
import charlm.nn.functional, charlm.nn.init, charlm.nn.modules.loss
import charlm.nn.utils.prune as prune
from charlm.nn.utils.rnn import pad_sequence
from charlm.nn.parameter import Parameter
import torch
assert charlm.nn.functional is charlm.functional is sys.modules["charlm.nn.functional"]
assert charlm.nn.init is torch.nn.init
assert charlm.nn.modules.loss is torch.nn.modules.loss
assert prune is torch.nn.utils.prune is sys.modules["torch.nn.utils.prune"]
assert pad_sequence is torch.nn.utils.rnn.pad_sequence
assert Parameter is torch.nn.Parameter
for name, module in list(sys.modules.items()):
    assert not name.startswith("torch.nn.") or module.__name__ == module.__spec__.name == name, name
    assert not name.startswith("charlm.nn.") or not module.__name__.startswith("charlm.nn."), name
"""


def test_submodules_are_imported_under_our_name_and_exist_once() -> None:
    subprocess.run([sys.executable, "-c", SUBMODULES], check=True)


def test_torch_compile_traces_names_that_are_torchs_in_one_graph() -> None:
    def step(x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(F.relu(nn.functional.linear(x, x[:5])), target, label_smoothing=0.1)

    x, target = torch.randn(7, 5), torch.randint(5, (7,))
    compiled = torch.compile(step, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, target), step(x, target))


CLASSES = [value for name in nn.__all__ if inspect.isclass(value := getattr(nn, name))]


def test_every_pickled_class_loads_as_itself() -> None:
    classes = [*CLASSES, F.CrossEntropyOutput, F.EmbeddingLinearOutput, ngrams.NgramLevel, ngrams.Spectrum]
    assert [class_ for class_ in classes if pickle.loads(pickle.dumps(class_)) is not class_] == []


def test_pickles_name_the_public_place_of_our_classes_and_torchs_place_of_torchs() -> None:
    ours = [class_ for class_ in CLASSES if class_.__module__.startswith("charlm")]
    assert len(ours) >= 4
    assert {class_.__module__ for class_ in ours} == {"charlm.nn"}
    assert b"torch.nn.modules.linear" in pickle.dumps(nn.Linear(2, 3))
    assert pickle.loads(b"ccharlm.nn\nEmbedding\n.") is nn.Embedding  # as every version has written it
    assert pickle.loads(b"ccharlm.functional\ncross_entropy\n.") is F.cross_entropy
    for function in (F.cross_entropy, F.relu, F.entropy):
        assert pickle.loads(pickle.dumps(function)) is function


@pytest.mark.parametrize(
    "make", [lambda: nn.Embedding(5, 3), lambda: nn.EmbeddingLinear(5, 3, 2, 4), lambda: nn.GRU(3, 4)]
)
def test_a_module_that_torch_saves_is_loaded_whole(make: Any) -> None:
    file, module = io.BytesIO(), make()
    torch.save(module, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert type(loaded) is type(module)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), module.parameters(), strict=True))
