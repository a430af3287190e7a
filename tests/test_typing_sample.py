"""What the type checkers see is all that is public."""

import ast
from pathlib import Path

import charlm
from charlm import functional, information, ngrams, nn, reference

SAMPLE = Path(__file__).with_name("typing_sample.py")
MODULES = {"information": information, "ngrams": ngrams, "reference": reference}


def is_ours(value: object) -> bool:
    home = getattr(value, "__module__", None) or getattr(value, "__name__", "")  # a module has its own name only
    return home.startswith("charlm.")


def test_the_sample_for_the_type_checkers_uses_every_public_name() -> None:
    used = {ast.unparse(node) for node in ast.walk(ast.parse(SAMPLE.read_text(encoding="utf-8")))}
    public = [f"F.{name}" for name in functional.__all__ if is_ours(getattr(functional, name))]
    public += [f"nn.{name}" for name in nn.__all__ if is_ours(getattr(nn, name))]
    public += [f"{name}.{own}" for name, module in MODULES.items() for own in module.__all__]
    public += [f"charlm.{name}" for name in charlm.__all__ if name not in {"functional", "nn", *MODULES}]
    assert {"F.cross_entropy", "F.CrossEntropyOutput", "nn.Embedding", "nn.functional"} <= set(public)
    assert [name for name in public if name not in used] == []
