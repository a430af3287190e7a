// What every room of kl_div agrees on: its shapes, its errors, and its types in the dispatcher.
#pragma once

#include <array>
#include <tuple>

#include "checks.h"
#include "distribution.h"
#include "rows.h"

namespace charlm {

using at::Tensor;

// (divergence, state): the state is [7, N], what the gradients need of each row (cpu/kernels/kl_div.h). p and q have
// one shape and dtype: whoever calls has broadcast them.
using KlDivForward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, int64_t, int64_t);
using KlDivBackward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                 int64_t, std::array<bool, 2>);
constexpr int64_t kKlDivState = 7;

inline void check_kl_div(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  TORCH_CHECK(p.dim() >= 1 && q.dim() >= 1, "p and q must have a dimension of classes, shape (..., V), got shapes ",
              p.sym_sizes(), " and ", q.sym_sizes());
  TORCH_CHECK(p.sym_sizes() == q.sym_sizes(), "p and q must have one shape here, got ", p.sym_sizes(), " and ",
              q.sym_sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(p.scalar_type()) && p.element_size() >= 2,
                              "\"kl_divergence\" not implemented for '", p.scalar_type(), "'");
  TORCH_CHECK(p.scalar_type() == q.scalar_type(), "p and q must have the same dtype, got ", p.scalar_type(), " and ",
              q.scalar_type());
  check_same_device(p, "p", q, "q");
  TORCH_CHECK(p_kind >= 0 && p_kind <= 2 && q_kind >= 0 && q_kind <= 2, "p_kind and q_kind must be 0, 1 or 2, got ",
              p_kind, " and ", q_kind);
}

inline void check_kl_div_gradient(const Tensor& grad_output, const Tensor& p, const Tensor& state) {
  const int64_t n = c10::multiply_integers(p.sizes().slice(0, p.dim() - 1));
  TORCH_CHECK(grad_output.numel() == n && grad_output.device() == p.device(),
              "grad_output must have the shape and device of the divergences of distributions of shape ", p.sizes(),
              ", got ", grad_output.sizes(), " on ", grad_output.device());
  TORCH_CHECK(state.dim() == 2 && state.size(0) == kKlDivState && state.size(1) == n && state.is_contiguous() &&
                  state.scalar_type() == row_dtype(p) && state.device() == p.device(),
              "state must be the one that kl_div returned, got shape ", state.sizes());
}

}  // namespace charlm
