"""Sample inputs for each op, and the tolerance that a kernel must meet: used by the tests and the benchmark.

A `SampleInput` holds the arguments of one call. `assert_matches_reference` evaluates it with the op, with the reference
in the same dtype, and with the reference in float64. Measured against float64, the op's root mean square error may be
at most 1.05 times the reference's, and its largest error at most twice the reference's, each plus one ulp: a kernel may
round differently from torch, but not worse.

The sizes are odd (1, 27, 129, 4099), so that every vector width leaves a remainder.
"""

from .comparison import (
    assert_close_to_reference,
    assert_matches_reference,
    evaluate,
    strided_copy,
)
from .cross_entropy import sample_inputs_cross_entropy
from .embedding import sample_inputs_embedding
from .embedding_linear import sample_inputs_embedding_linear
from .information import (
    sample_inputs_entropy,
    sample_inputs_kl_div,
    sample_inputs_kl_divergence,
    sample_inputs_surprisal,
)
from .linear_cross_entropy import sample_inputs_linear_cross_entropy
from .samples import FLOAT_DTYPES, PROBABILITIES, SampleInput

__all__ = [
    "FLOAT_DTYPES",
    "PROBABILITIES",
    "SampleInput",
    "assert_close_to_reference",
    "assert_matches_reference",
    "evaluate",
    "sample_inputs_cross_entropy",
    "sample_inputs_embedding",
    "sample_inputs_embedding_linear",
    "sample_inputs_entropy",
    "sample_inputs_kl_div",
    "sample_inputs_kl_divergence",
    "sample_inputs_linear_cross_entropy",
    "sample_inputs_surprisal",
    "strided_copy",
]
