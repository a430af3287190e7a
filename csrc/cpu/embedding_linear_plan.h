// The choice between the folded and the gathered first layer on the CPU, by what each would cost.
#pragma once

#include "../embedding_linear.h"

namespace charlm {

Plan choose_forward_plan(const EmbeddingLinearSizes& sizes);
Plan choose_backward_plan(const EmbeddingLinearSizes& sizes);

}  // namespace charlm
