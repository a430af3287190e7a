// What every room of entropy agrees on: its shapes, its errors, and its types in the dispatcher.
#pragma once

#include <tuple>

#include "rows.h"

namespace charlm {

using at::Tensor;

// (entropy, state): the state is [3, N], what the gradient needs of each row (cpu/kernels/entropy.h).
using EntropyForward = std::tuple<Tensor, Tensor>(const Tensor&);
using EntropyBackward = Tensor(const Tensor&, const Tensor&, const Tensor&);
constexpr int64_t kEntropyState = 3;

inline void check_entropy(const Tensor& logits) {
  TORCH_CHECK(logits.dim() >= 1, "logits must have a dimension of classes, shape (..., V), got a 0-d tensor");
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(logits.scalar_type()) && logits.element_size() >= 2,
                              "\"entropy\" not implemented for '", logits.scalar_type(), "'");
}

inline void check_entropy_gradient(const Tensor& grad_output, const Tensor& logits, const Tensor& state) {
  check_entropy(logits);
  const int64_t n = c10::multiply_integers(logits.sizes().slice(0, logits.dim() - 1));
  TORCH_CHECK(grad_output.numel() == n && grad_output.device() == logits.device(),
              "grad_output must have the shape and device of the entropies of logits of shape ", logits.sizes(),
              ", got ", grad_output.sizes(), " on ", grad_output.device());
  TORCH_CHECK(state.dim() == 2 && state.size(0) == kEntropyState && state.size(1) == n && state.is_contiguous() &&
                  state.scalar_type() == row_dtype(logits) && state.device() == logits.device(),
              "state must be the one that entropy returned, got shape ", state.sizes());
}

}  // namespace charlm
