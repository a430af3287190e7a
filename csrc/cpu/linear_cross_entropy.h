// linear_cross_entropy over few classes on the CPU.
#pragma once

#include <optional>

#include "../linear_cross_entropy.h"

namespace charlm {

// The op's result, or nothing where it does not pay: many classes or logits, half types, reduction "none", ignored rows
// (which the blocks of ../linear_cross_entropy.cpp leave out). Shapes and dtypes have been checked.
std::optional<LossAndGradients> linear_cross_entropy_over_few_classes(const LinearCrossEntropyArguments& arguments,
                                                                      bool with_gradients,
                                                                      const OptionalTensor& grad_loss, OutputMask mask);

}  // namespace charlm
