"""The character language model: data, models, training, evaluation, sampling, checkpoints.

Only `charlm.cli` and `charlm.load` import this package, so that `import charlm` does not load it. Losses are in nats
per character unless a name says otherwise.
"""

from charlm._extras import require_lm

require_lm()
