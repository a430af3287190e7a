"""Functions with torch's names, argument order, defaults and results, and functions that torch lacks.

Every other name is that of `torch.nn.functional`, so that `import charlm.functional as F` can take its place.

All functions compute and sum in float32 (float64 for float64 tensors) and round each result once. Results do not depend
on the number of threads; the exceptions are products that torch computes (`embedding_linear`, `linear_cross_entropy`).
A Tensor subclass with `__torch_function__` overrides these functions as it overrides torch's.

A call goes to the dispatcher through the compiled module; under torch.compile and torch.export it goes through
`torch.ops.charlm`, which they can record. Tensors that the kernels do not know (another device, a sparse layout, a
subclass that implements only torch's own ops) take `charlm.reference`, as all tensors do with CHARLM_BACKEND=reference.
A DTensor takes the kernels on its local shard, where `charlm.distributed.sharding` has a rule for its placements.
"""

from typing import TYPE_CHECKING

import torch.nn.functional as _torchs

from charlm._torch_names import beside_torch

from .cross_entropy import cross_entropy as cross_entropy
from .embedding import embedding as embedding
from .embedding_linear import embedding_linear as embedding_linear
from .entropy import entropy as entropy
from .kl_div import kl_div as kl_div
from .kl_divergence import kl_divergence as kl_divergence
from .linear_cross_entropy import linear_cross_entropy as linear_cross_entropy
from .outputs import CrossEntropyOutput as CrossEntropyOutput
from .outputs import EmbeddingLinearOutput as EmbeddingLinearOutput
from .surprisal import surprisal as surprisal

_OURS = [
    "CrossEntropyOutput",
    "EmbeddingLinearOutput",
    "cross_entropy",
    "embedding",
    "embedding_linear",
    "entropy",
    "kl_div",
    "kl_divergence",
    "linear_cross_entropy",
    "surprisal",
]

if TYPE_CHECKING:  # without `__getattr__`, which would make every name exist, and `__all__`, which is not static
    try:  # of two imports of a name mypy takes the first, pyright the last outside an `except`: charlm's for both
        pass
    except ImportError:
        from torch.nn.functional import *  # noqa: F403
else:
    __getattr__, __dir__, __all__ = beside_torch(__name__, _OURS, _torchs)
