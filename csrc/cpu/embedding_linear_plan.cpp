#include "embedding_linear_plan.h"

namespace charlm {

Plan choose_forward_plan(const EmbeddingLinearSizes& s) {
  return s.n_rows > s.vocabulary ? Plan::kFolded : Plan::kGathered;
}

Plan choose_backward_plan(const EmbeddingLinearSizes& s) {
  return s.n_rows > s.vocabulary ? Plan::kFolded : Plan::kGathered;
}

}  // namespace charlm
