"""Sample inputs for each op, and the tolerance that judges a kernel: used by the tests and by the benchmark.

A sample is the arguments of one call. `evaluate` makes the call and its backward; `assert_matches_reference`
makes it three times, with the op, with the reference in the same dtype and with the reference in float64, and
compares the errors of the first two against the third. The rule: against float64 our root mean square error
is at most 1.05 times the reference's, our largest at most twice its largest, plus one ulp, so a kernel may
round differently from torch but never worse.

The sizes are odd on purpose (1, 27, 129, 4099): they leave a remainder in every vector width.
"""

from .comparison import (
    Tolerance,
    assert_close_to_reference,
    assert_matches_reference,
    evaluate,
    strided_copy,
    tolerances,
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
    "Tolerance",
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
    "tolerances",
]
