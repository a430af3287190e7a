"""What users import: functions with torch's names, argument order, defaults and results, and what torch lacks.

A call goes straight to the dispatcher through the compiled module; under torch.compile and torch.export it goes
through `torch.ops.charlm`, which those can record. A tensor on a device for which there is no kernel takes
`charlm.reference`, and so does everything under CHARLM_BACKEND=reference.
"""

from charlm.reference import CrossEntropyOutput, EmbeddingLinearOutput

from .cross_entropy import cross_entropy
from .embedding import embedding
from .embedding_linear import embedding_linear
from .entropy import entropy
from .kl_div import kl_div
from .kl_divergence import kl_divergence
from .linear_cross_entropy import linear_cross_entropy
from .surprisal import surprisal

__all__ = [
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
