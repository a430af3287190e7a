// The choice between the folded and the gathered first layer on the CPU, by what each would cost.
#pragma once

#include "../embedding_linear.h"

namespace charlm {

struct EmbeddingLinearSizes {
  int64_t n_rows;         // N
  int64_t n_places;       // T
  int64_t vocabulary;     // V
  int64_t embedding_dim;  // D
  int64_t hidden;         // H
  int64_t element_size;   // of the arithmetic: 4 or 8
};

Plan choose_forward_plan(const EmbeddingLinearSizes& sizes);
Plan choose_backward_plan(const EmbeddingLinearSizes& sizes);

}  // namespace charlm
