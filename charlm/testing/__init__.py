"""Sample inputs for each op, and the tolerance that a kernel must meet: used by the tests and the benchmark.

`sample_inputs_OP(dtype, device)` yields a `SampleInput` for each call: its tensors are on `device`, and the floating
ones have `dtype`. `assert_matches_reference` evaluates it with the op, with the reference in the same dtype, and with
the reference in float64. Measured against float64, the op's root mean square error may be at most 1.05 times the
reference's, and its largest error at most twice the reference's, each plus one ulp: a kernel may round differently from
torch, but not worse.

The sizes are odd (1, 27, 129, 4099), so that every vector width leaves a remainder.
"""

from .comparison import assert_close_to_reference as assert_close_to_reference
from .comparison import assert_matches_reference as assert_matches_reference
from .comparison import evaluate as evaluate
from .comparison import strided_copy as strided_copy
from .cross_entropy import sample_inputs_cross_entropy as sample_inputs_cross_entropy
from .embedding import sample_inputs_embedding as sample_inputs_embedding
from .embedding_linear import sample_inputs_embedding_linear as sample_inputs_embedding_linear
from .information import sample_inputs_entropy as sample_inputs_entropy
from .information import sample_inputs_kl_div as sample_inputs_kl_div
from .information import sample_inputs_kl_divergence as sample_inputs_kl_divergence
from .information import sample_inputs_surprisal as sample_inputs_surprisal
from .linear_cross_entropy import sample_inputs_linear_cross_entropy as sample_inputs_linear_cross_entropy
from .samples import FLOAT_DTYPES as FLOAT_DTYPES
from .samples import PROBABILITIES as PROBABILITIES
from .samples import SampleInput as SampleInput
