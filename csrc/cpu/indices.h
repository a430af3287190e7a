// Indices of any integer dtype, as the sums over them take them.
#pragma once

#include <atomic>

#include "../checks.h"
#include "adapter.h"

namespace charlm {

// `indices` as int64 and contiguous; IndexError for the first outside [0, num_embeddings).
inline at::Tensor checked_indices(const at::Tensor& indices, int64_t num_embeddings) {
  const at::Tensor wide = indices.to(at::kLong).contiguous();
  const int64_t* const index = const_data<int64_t>(wide);
  const auto first_bad = [&](int64_t begin, int64_t end) {
    return cpu_kernels().first_out_of_range(index, begin, end, num_embeddings);
  };
  std::atomic<bool> bad = false;
  at::parallel_for(0, wide.numel(), 16384, [&](int64_t begin, int64_t end) {
    if (first_bad(begin, end) >= 0) bad = true;
  });
  if (bad) raise_out_of_range(indices, first_bad(0, wide.numel()), num_embeddings, "index", "embeddings");
  return wide;
}

}  // namespace charlm
