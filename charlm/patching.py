"""Swap torch's embedding, cross-entropies and KL loss for ours, for a program or for one model, and back.

`patch_torch` exchanges attributes of `torch.nn.functional`; `patch_model` changes the class of a model's
own modules. Both leave every parameter, and so every optimizer and checkpoint, as it is.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import TracebackType
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
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # not in torch 2.11
    _FUNCTIONS["linear_cross_entropy"] = functional.linear_cross_entropy
    _MODULES[torch.nn.LinearCrossEntropyLoss] = nn.LinearCrossEntropyLoss


class _PatchedFunctions:
    """The swapped attributes of `torch.nn.functional`, shared by every `TorchPatch` that is active.

    The first patch saves what it finds and the last one puts it back, so patches may end in any order.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._n_active = 0
        self._found: dict[str, Callable[..., Any]] = {}

    def acquire(self) -> None:
        with self._lock:
            if self._n_active == 0:
                self._found = {name: getattr(torch.nn.functional, name) for name in _FUNCTIONS}
                for name, function in _FUNCTIONS.items():
                    setattr(torch.nn.functional, name, function)
            self._n_active += 1

    def release(self) -> None:
        with self._lock:
            self._n_active -= 1
            if self._n_active == 0:
                for name, function in self._found.items():
                    setattr(torch.nn.functional, name, function)


_patched_functions = _PatchedFunctions()


class TorchPatch:
    """What `patch_torch` returns: a patch in force, to be ended by `undo()` or by leaving a `with` block.

    Entering it again after its end puts it in force again; blocks of one patch may nest.
    """

    def __init__(self) -> None:
        self._active = False
        self._depth = 0
        self._apply()

    def _apply(self) -> None:
        if not self._active:
            _patched_functions.acquire()
            self._active = True

    def undo(self) -> None:
        """Ends this patch; does nothing if it has ended. Patches that others hold stay in force."""
        if self._active:
            self._active = False
            _patched_functions.release()

    def __enter__(self) -> TorchPatch:
        self._apply()
        self._depth += 1
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._depth -= 1
        if self._depth == 0:
            self.undo()


def patch_torch() -> TorchPatch:
    """Makes torch's `F.embedding`, `F.cross_entropy`, `F.kl_div` and `F.linear_cross_entropy` ours, process-wide.

    The last one where this torch has it. `torch.nn`'s modules look these functions up at each call, so models built
    before and after, their subclasses and third-party code follow. Out of reach are a name bound earlier by
    `from torch.nn.functional import cross_entropy`, graphs that torch.jit or torch.export has already
    recorded, and `torch.embedding`. Patches nest; when the last one ends, what the first one found is back.

    Returns:
        A `TorchPatch`: `with patch_torch(): ...`, or `patch = patch_torch()` and later `patch.undo()`.

    Example:
        >>> with patch_torch():
        ...     loss = torch.nn.CrossEntropyLoss()(torch.zeros(1, 4), torch.tensor([2]))  # by charlm's kernel
        >>> loss
        tensor(1.3863)
    """
    return TorchPatch()


def patch_model(model: ModuleT) -> ModuleT:
    """Turns torch's modules in `model` that have a module of ours into these, in place.

    They are `Embedding`, `CrossEntropyLoss`, `KLDivLoss` and `LinearCrossEntropyLoss`.

    Only the class of a module changes: it remains the same object, with the same Parameters (tied ones stay
    tied), buffers, hooks, parametrizations, names and training flag. It may have gone through `parametrize`,
    `fully_shard` or `replicate` before. Subclasses of users stay as they are, since they may have a `forward` of
    their own; a `forward` set on the module itself also stays. Doing it twice changes nothing.

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
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"patch_model takes a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        ours = _exchanged(type(module))
        if ours is not None:
            module.__class__ = ours
    return model


def _exchanged(found: type) -> type | None:
    """Our class for one of torch's, also inside a class that torch made around it; None for every other class."""
    if found in _MODULES or not _is_made_by_torch(found):
        return _MODULES.get(found)
    bases = tuple(_exchanged(base) or base for base in found.__bases__)
    if bases == found.__bases__:
        return None
    return type(found.__name__, bases, {k: v for k, v in vars(found).items() if k not in ("__dict__", "__weakref__")})


def _is_made_by_torch(found: type) -> bool:
    """Whether parametrize, fully_shard or replicate derived this class at run time: they refuse a copy or a pickle."""
    refusals = (vars(found).get("__getstate__"), vars(found).get("__deepcopy__"))
    return any(getattr(refusal, "__module__", "").startswith("torch.") for refusal in refusals)
