// Tensors whose classes are their last dimension, seen as the rows that the kernels work on.
#pragma once

#include <ATen/core/Tensor.h>

namespace charlm {

// (...)
inline c10::SymIntArrayRef leading_sizes(const at::Tensor& t) { return t.sym_sizes().slice(0, t.dim() - 1); }

// (..., V) as [N, V] with a stride of 1 along the classes; a view wherever the strides allow it.
inline at::Tensor as_class_rows(const at::Tensor& t) {
  const int64_t n_classes = t.size(-1), n = c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
  const at::Tensor rows = t.dim() == 2 ? t : t.reshape({n, n_classes});
  return rows.stride(1) == 1 || n_classes == 1 ? rows : rows.contiguous();
}

// Arithmetic and sums are in float for the half types.
inline at::ScalarType row_dtype(const at::Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

}  // namespace charlm
