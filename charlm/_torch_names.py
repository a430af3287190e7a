"""What a module of ours does not provide is torch's own: attributes, `dir`, `import *` and submodules."""

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
    """`__getattr__`, `__dir__` and `__all__` of our module `name`, which stands in the place of one of torch's.

    torch's attribute is looked up at each use, so that whatever replaces it in torch's module is found here too.

    Args:
        ours: the public names that our module has itself.
        torchs: torch's module, which has all others.
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
    module = getattr(value, "__module__", None)  # a built-in function has None
    return not isinstance(value, bool) and (module is None or module.startswith("torch"))


def public_dir(namespace: dict[str, Any]) -> list[str]:
    """What `dir` shows of a module: its `__all__` and Python's own attributes."""
    return sorted({*namespace["__all__"], *(name for name in namespace if name.startswith("__"))})


class TorchSubmodules(MetaPathFinder, Loader):
    """Imports `ours.x` as `torchs.x`: the same module object, whose classes exist once.

    It has to come first in `sys.meta_path`. Once `ours.x` is a package of torch, Python's own finder would look for
    `ours.x.y` in torch's folder and run that file a second time.

    Args:
        ours: our package.
        torchs: torch's package of the same structure.
        own: the submodules that our package has itself.
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
        """Python returns what stands in `sys.modules` after this."""
        sys.modules[module.__name__] = importlib.import_module(self._torchs_name(module.__name__))

    def _torchs_name(self, fullname: str) -> str:
        return self._torchs + fullname.removeprefix(self._ours)
