"""Replaces torch's embedding, cross-entropies and KL loss by charlm's, in a whole program or in one model, and back.

`patch_torch` replaces attributes of `torch.nn.functional`; `patch_model` changes the class of a model's own modules.
Neither changes a parameter, so optimizers and checkpoints stay valid.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

import torch

from . import functional, nn

ModuleT = TypeVar("ModuleT", bound=torch.nn.Module)

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "embedding": functional.embedding,
    "cross_entropy": functional.cross_entropy,
    "kl_div": functional.kl_div,
}
_MODULES: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.Embedding: nn.Embedding,
    torch.nn.CrossEntropyLoss: nn.CrossEntropyLoss,
    torch.nn.KLDivLoss: nn.KLDivLoss,
}
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # since torch 2.13
    _FUNCTIONS["linear_cross_entropy"] = functional.linear_cross_entropy
    _MODULES[torch.nn.LinearCrossEntropyLoss] = nn.LinearCrossEntropyLoss


class _PatchedFunctions:
    """The replaced attributes of `torch.nn.functional`, shared by every active `TorchPatch`.

    The first patch saves the attributes that it finds and the last one restores them, so patches may end in any order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._active: set[TorchPatch] = set()
        self._found: dict[str, Callable[..., Any]] = {}

    def add(self, patch: TorchPatch) -> None:
        with self._lock:
            if not self._active:
                self._found = {name: getattr(torch.nn.functional, name) for name in _FUNCTIONS}
                vars(torch.nn.functional).update(_FUNCTIONS)
            self._active.add(patch)

    def remove(self, patch: TorchPatch) -> None:
        with self._lock:
            if patch in self._active:
                self._active.remove(patch)
                if not self._active:
                    vars(torch.nn.functional).update(self._found)


_patched_functions = _PatchedFunctions()


class TorchPatch:
    """The result of `patch_torch`: an active patch, which ends by `undo()` or at the end of a `with` block.

    Note:
        Entering an ended patch activates it again. `with` blocks of one patch may nest; it ends with the outermost.
    """

    def __init__(self) -> None:
        self._depth = 0
        _patched_functions.add(self)

    def undo(self) -> None:
        """Ends this patch; does nothing if it has ended. Other active patches stay active."""
        _patched_functions.remove(self)

    def __enter__(self) -> TorchPatch:
        _patched_functions.add(self)
        self._depth += 1
        return self

    def __exit__(self, *exception: object) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.undo()


def patch_torch() -> TorchPatch:
    """Makes torch's `F.embedding`, `F.cross_entropy`, `F.kl_div` and `F.linear_cross_entropy` charlm's, process-wide.

    Returns:
        A `TorchPatch`, for `with patch_torch(): ...`, or for `patch = patch_torch()` and later `patch.undo()`.

    Example:
        >>> with patch_torch():
        ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(1, 4), torch.tensor([2]))  # by charlm's kernel
        >>> loss
        tensor(1.3863)

    Note:
        `torch.nn`'s modules look these functions up at each call, so models built before and after, their subclasses
        and third-party code use charlm's. Not replaced are a name bound earlier by `from torch.nn.functional import
        cross_entropy`, graphs that torch.jit or torch.export has recorded, and `torch.embedding`.
        `F.linear_cross_entropy` is replaced where torch has it (since 2.13).

        Patches nest. When the last one ends, the functions that the first one found are restored.
    """
    return TorchPatch()


def patch_model(model: ModuleT) -> ModuleT:
    """Turns torch's modules in `model` into charlm's, in place.

    Args:
        model: any module, also a bare `torch.nn.Embedding`.

    Returns:
        `model` itself.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Embedding(27, 10), torch.nn.Linear(10, 27))
        >>> type(patch_model(model)[0])
        <class 'charlm.nn.Embedding'>

    Note:
        `Embedding`, `CrossEntropyLoss`, `KLDivLoss` and `LinearCrossEntropyLoss` are changed. Only the class of a
        module changes: the object, its Parameters (tied ones stay tied), buffers, hooks, parametrizations, names and
        training flag stay. `parametrize`, `fully_shard` and `replicate` may have been applied before. User-defined
        subclasses stay as they are, since their `forward` may differ; a `forward` set on the module itself stays too. A
        second call changes nothing.
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"patch_model takes a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        ours = _exchanged(type(module))
        if ours is not None:
            module.__class__ = ours
    return model


def _exchanged(found: type) -> type | None:
    """charlm's class for one of torch's, also inside a class that torch derived from it; None for every other class."""
    if found in _MODULES or not _is_made_by_torch(found):
        return _MODULES.get(found)
    bases = tuple(_exchanged(base) or base for base in found.__bases__)
    if bases == found.__bases__:
        return None
    return type(found.__name__, bases, {k: v for k, v in vars(found).items() if k not in ("__dict__", "__weakref__")})


def _is_made_by_torch(found: type) -> bool:
    """Whether `parametrize`, `fully_shard` or `replicate` derived this class at run time.

    Such a class defines `__getstate__` or `__deepcopy__` to raise an error.
    """
    refusals = (vars(found).get("__getstate__"), vars(found).get("__deepcopy__"))
    return any(getattr(refusal, "__module__", "").startswith("torch.") for refusal in refusals)
