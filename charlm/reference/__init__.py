"""Every op in plain torch, with the signature of `charlm.functional`: the oracle of the tests, and the fallback.

The kernels are judged against these functions in float64. Tensors that the kernels do not know, and
CHARLM_BACKEND=reference, run them as they are. torch differentiates them to any order, in both modes. Arguments,
formulas and errors are those of `charlm.functional`; several results are a plain tuple.

For calls without an option that torch lacks, an op calls torch's own function, so torch's semantics hold by
construction. torch's functions are bound when this module is imported: `charlm.patch_torch()` does not make the
reference call the kernels. This package imports nothing of charlm outside itself, so that no error of the kernels' code
can pass the comparison with it.
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
