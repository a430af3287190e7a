// The choice between the folded and the gathered first layer on CUDA.
#pragma once

#include "../embedding_linear.h"

namespace charlm::cuda {

// For the forward and the backward alike. Folded where the table costs a fraction of what it saves, and lies in the
// second-level cache of nearly every GPU, since each row of the output reads T rows of it. A prediction from sizes: on
// no GPU has it been measured.
inline Plan choose_plan(const EmbeddingLinearSizes& s) {
  constexpr int64_t kFewestUses = 4;  // contexts for each token of the vocabulary
  constexpr int64_t kTableBytes = 4 << 20;
  const bool is_used = s.n_rows / kFewestUses >= s.vocabulary;
  const bool is_cached = s.vocabulary * s.n_places * s.hidden * s.element_size <= kTableBytes;
  return is_used && is_cached ? Plan::kFolded : Plan::kGathered;
}

}  // namespace charlm::cuda
