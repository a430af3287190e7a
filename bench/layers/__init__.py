"""The ops with weights, and those of information: what the benchmark needs of each, from its inputs to its check.

make_inputs(case, generator)   the tensors, shared by all contenders
names(case)                    the contenders, in the order of their samples; "ours" first
build(name, case, inputs)      a contender as a call without arguments
check(inputs, result)          AssertionError where a result of ours is wrong
elements(case)                 of the tensors that are alive at once
minimal_bytes(case)            each input read once, each output written once
output_bytes(case)             of what a call returns
"""

from types import ModuleType

from bench.layers import embedding_linear, information, linear_cross_entropy, train_step

LAYERS: dict[str, ModuleType] = {
    "embedding_linear": embedding_linear,
    "linear_cross_entropy": linear_cross_entropy,
    "train_step": train_step,
    "entropy": information,
    "kl_divergence": information,
    "surprisal": information,
}
