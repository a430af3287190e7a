"""Gives a module of charlm every name of torch's module that it lacks: attributes, `dir`, `import *` and submodules."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec, spec_from_loader
from types import ModuleType
from typing import Any


def beside_torch(
    name: str, ours: list[str], torchs: ModuleType
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """`__getattr__`, `__dir__` and `__all__` of charlm's module `name`, which replaces one of torch's.

    Args:
        name: of charlm's module.
        ours: the public names that charlm's module defines.
        torchs: torch's module, which has all other names.

    Note:
        torch's attribute is looked up at each use, so an attribute that is replaced in torch's module is found here
        too.
    """
    module = sys.modules[name]

    def __getattr__(attribute: str) -> Any:
        try:
            return getattr(torchs, attribute)
        except AttributeError:
            message = f"module {name!r} has no attribute {attribute!r}, and neither has {torchs.__name__!r}"
            raise AttributeError(message, name=attribute, obj=module) from None

    def __dir__() -> list[str]:
        return public_dir(vars(module))

    public = (attribute for attribute, value in vars(torchs).items() if attribute[0] != "_" and _is_torchs(value))
    return __getattr__, __dir__, sorted({*ours, *public})


def _is_torchs(value: object) -> bool:
    """False for what torch's module only imports for its own use."""
    if isinstance(value, ModuleType):
        return value.__name__.startswith("torch.nn.")
    module = getattr(value, "__module__", None)  # None for a built-in function
    return not isinstance(value, bool) and (module is None or module.startswith("torch"))


def public_dir(namespace: dict[str, Any]) -> list[str]:
    """The names that `dir` shows of a module: its `__all__` and Python's own attributes."""
    return sorted({*namespace["__all__"], *(name for name in namespace if name.startswith("__"))})


class TorchSubmodules(MetaPathFinder, Loader):
    """Imports `ours.x` as `torchs.x`: the same module object, whose classes exist once.

    Args:
        ours: charlm's package.
        torchs: torch's package of the same structure.
        own: the submodules that charlm's package defines.

    Note:
        It must come first in `sys.meta_path`. Once `ours.x` is a package of torch, Python's own finder would look for
        `ours.x.y` in torch's folder and run that file a second time.
    """

    def __init__(self, ours: str, torchs: str, own: Iterable[str]) -> None:
        self._ours = f"{ours}."
        self._torchs = f"{torchs}."
        self._own = {f"{ours}.{name}" for name in own}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(self._ours) or fullname in self._own:
            return None
        return spec_from_loader(fullname, self) if find_spec(self._torchs_name(fullname)) else None

    def exec_module(self, module: ModuleType) -> None:
        """Puts torch's module into `sys.modules`; Python returns what it finds there after this call."""
        sys.modules[module.__name__] = importlib.import_module(self._torchs_name(module.__name__))

    def _torchs_name(self, fullname: str) -> str:
        return self._torchs + fullname.removeprefix(self._ours)
