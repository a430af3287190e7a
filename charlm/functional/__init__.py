"""What users import, with torch's names, argument order, defaults and results.

A call goes straight to the dispatcher through the compiled module; under torch.compile and torch.export it goes
through `torch.ops.charlm`, which those can record. A tensor on a device for which there is no kernel takes
`charlm.reference`, and so does everything under CHARLM_BACKEND=reference.
"""

from charlm.reference import CrossEntropyOutput

from .cross_entropy import cross_entropy
from .embedding import embedding
from .linear_cross_entropy import linear_cross_entropy

__all__ = ["CrossEntropyOutput", "cross_entropy", "embedding", "linear_cross_entropy"]
