"""The character language model: data, models, training, evaluation, sampling, checkpoints.

Built from `charlm.nn`; nothing imports it but `charlm.cli` and, when it is called, `charlm.load`. Losses are in
nats a character unless a name says otherwise.
"""
