"""Every op in plain torch, with the signature of `charlm.functional`: the tests' oracle, and the fallback.

What each op means is written here once, as a formula and as a few lines of torch that anyone can check. The
kernels are judged against these functions in float64; a tensor on a device for which charlm has no kernel,
and `CHARLM_BACKEND=reference`, run them as they are. torch differentiates them to any order, in both modes.

Without an extra both call the function of torch itself, so torch's semantics hold by construction. torch's
originals are bound when this module is imported, so `charlm.patch_torch()` cannot make the reference call the
kernels.
"""

from .cross_entropy import cross_entropy
from .embedding import embedding
from .embedding_linear import embedding_linear
from .entropy import entropy
from .indices import INDEX_DTYPES
from .kl_div import kl_div
from .kl_divergence import kl_divergence
from .linear_cross_entropy import linear_cross_entropy
from .surprisal import surprisal

__all__ = [
    "INDEX_DTYPES",
    "cross_entropy",
    "embedding",
    "embedding_linear",
    "entropy",
    "kl_div",
    "kl_divergence",
    "linear_cross_entropy",
    "surprisal",
]
