// What every room of embedding agrees on.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace charlm {

using at::Tensor;

inline void check_embedding(const Tensor& weight, const Tensor& indices) {
  TORCH_CHECK(weight.dim() == 2, "'weight' must be 2-D, got shape ", weight.sym_sizes());
  check_index_dtype(indices, "indices");
  TORCH_CHECK(weight.device() == indices.device(), "Expected all tensors to be on the same device, but weight is on ",
              weight.device(), " and indices is on ", indices.device());
}

}  // namespace charlm
