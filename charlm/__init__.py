"""charlm: fused embedding and softmax-cross-entropy kernels for PyTorch, and a character-level language model."""

from . import _old_names, functional, information, ngrams, nn, reference
from ._errors import UserError
from ._info import build_info
from ._load import load
from ._synchronize import synchronize
from ._torch_names import public_dir
from ._version import __version__
from .patching import patch_model, patch_torch

__all__ = [
    "UserError",
    "__version__",
    "build_info",
    "functional",
    "information",
    "load",
    "ngrams",
    "nn",
    "patch_model",
    "patch_torch",
    "reference",
    "synchronize",
]

_old_names.define()


def __dir__() -> list[str]:
    return public_dir(globals())
