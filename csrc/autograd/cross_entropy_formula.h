// cross_entropy as a composition of torch's own differentiable ops.
#pragma once

#include "../cross_entropy.h"

namespace charlm {

// The loss, for functorch, forward-mode AD and double backward; see cross_entropy_rows.h for the formula.
Tensor cross_entropy_formula(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                             const OptionalTensor& weight, const OptionalTensor& token_weight);

}  // namespace charlm
