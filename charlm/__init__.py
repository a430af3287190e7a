"""charlm: fused embedding and softmax-cross-entropy kernels for PyTorch, and a character-level language model."""

import sys

from . import functional, information, ngrams, nn, reference
from ._errors import UserError
from ._info import build_info
from ._load import load
from ._synchronize import synchronize
from ._torch_names import public_dir
from ._train import train
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
    "train",
]

# Older programs import the output types from the modules of `charlm.reference`, and older pickles store these paths.
for _module, *_types in (
    ("charlm.reference", functional.CrossEntropyOutput, functional.EmbeddingLinearOutput),
    ("charlm.reference.cross_entropy", functional.CrossEntropyOutput),
    ("charlm.reference.embedding_linear", functional.EmbeddingLinearOutput),
    ("charlm.reference.ngrams", ngrams.NgramLevel, ngrams.Spectrum),
):
    vars(sys.modules[_module]).update({_type.__name__: _type for _type in _types})


def __dir__() -> list[str]:
    return public_dir(globals())
