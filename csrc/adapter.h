// What the adapters of every device share: element types and pointers as kernels see them.
#pragma once

#include <ATen/core/Tensor.h>

#include "types.h"

namespace charlm {

// Calls f.template operator()<T>() with the kernels' type for a floating dtype.
template <class F>
auto with_float_type(at::ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f.template operator()<float>();
#ifndef CHARLM_CUDA_FLOAT_ONLY  // tests/cuda_emulator/mutants.py
    case at::kDouble:
      return f.template operator()<double>();
    case at::kBFloat16:
      return f.template operator()<BFloat16>();
    case at::kHalf:
      return f.template operator()<Float16>();
#endif
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"", op, "\" not implemented for '", dtype, "'");
  }
}

template <class T>
const T* const_data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

}  // namespace charlm
