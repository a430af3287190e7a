"""The output types under the names in `charlm.reference` that older programs import and older pickles store."""

from __future__ import annotations

import sys

from . import functional, ngrams


def define() -> None:
    """Sets the old names in the modules of `charlm.reference`, which imports nothing of charlm outside itself."""
    for module, type_ in (
        ("charlm.reference", functional.CrossEntropyOutput),
        ("charlm.reference", functional.EmbeddingLinearOutput),
        ("charlm.reference.cross_entropy", functional.CrossEntropyOutput),
        ("charlm.reference.embedding_linear", functional.EmbeddingLinearOutput),
        ("charlm.reference.ngrams", ngrams.NgramLevel),
        ("charlm.reference.ngrams", ngrams.Spectrum),
    ):
        setattr(sys.modules[module], type_.__name__, type_)
