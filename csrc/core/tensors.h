// Tensors as kernels see them: element types, pointers, and rows of classes.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

#include "core/kernel.h"

namespace charlm {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Calls f.template operator()<T>() with the element type of a floating dtype.
template <class F>
auto with_float_type(at::ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f.template operator()<float>();
    case at::kDouble:
      return f.template operator()<double>();
    case at::kBFloat16:
      return f.template operator()<BFloat16>();
    case at::kHalf:
      return f.template operator()<Float16>();
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"", op, "\" not implemented for '", dtype, "'");
  }
}

// NotImplementedError for a dtype that no kernel has, such as integers or float8.
inline void check_float_dtype(const Tensor& t, const char* op) {
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(t.scalar_type()) && t.element_size() >= 2, "\"", op,
                              "\" not implemented for '", t.scalar_type(), "'");
}

// The dtype of arithmetic and sums: float for the half types.
inline at::ScalarType compute_dtype(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

template <class T>
const T* const_data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The i-th row of numbers that forward kept for backward, [k, N].
template <class C>
C* state_row(const Tensor& state, int64_t i) {
  return static_cast<C*>(const_cast<void*>(state.const_data_ptr())) + i * state.size(1);
}

// The sizes of (..., V) without V.
inline c10::SymIntArrayRef leading_sizes(const Tensor& t) { return t.sym_sizes().slice(0, t.dim() - 1); }

// (..., V) as [N, V] with a stride of 1 along the classes: a view where the strides allow it.
inline Tensor last_dim_as_rows(const Tensor& t) {
  const int64_t n_classes = t.size(-1), n = c10::multiply_integers(t.sizes().slice(0, t.dim() - 1));
  const Tensor rows = t.dim() == 2 ? t : t.reshape({n, n_classes});
  return rows.stride(1) == 1 || n_classes == 1 ? rows : rows.contiguous();
}

inline OptionalTensor to(const OptionalTensor& t, at::ScalarType dtype) {
  return t ? OptionalTensor(t->to(dtype)) : std::nullopt;
}

}  // namespace charlm
