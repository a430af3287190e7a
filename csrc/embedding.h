// What every room of embedding agrees on.
#pragma once

#include <ATen/core/Tensor.h>

#include "checks.h"

namespace charlm {

using at::Tensor;

inline void check_embedding(const Tensor& weight, const Tensor& indices) {
  TORCH_CHECK(weight.dim() == 2, "'weight' must be 2-D, got shape ", weight.sym_sizes());
  check_index_dtype(indices, "indices");
  check_same_device(weight, "weight", indices, "indices");
}

inline void check_embedding_backward(const Tensor& grad_output, const Tensor& indices) {
  check_index_dtype(indices, "indices");
  TORCH_CHECK(grad_output.dim() == indices.dim() + 1 && grad_output.sizes().slice(0, indices.dim()) == indices.sizes(),
              "grad_output must have the shape of indices and one dimension more, got ", grad_output.sizes(), " and ",
              indices.sizes());
  check_same_device(grad_output, "grad_output", indices, "indices");
}

}  // namespace charlm
