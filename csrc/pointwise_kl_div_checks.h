// What the devices' implementations of pointwise_kl_div share.
#pragma once

#include <ATen/core/Tensor.h>

#include "adapter.h"
#include "checks.h"
#include "pointwise_kl_div.h"
#include "rows.h"

namespace charlm {

using at::Tensor;

inline void check_pointwise_kl_div(const Tensor& input, const Tensor& target) {
  TORCH_CHECK(input.sym_sizes() == target.sym_sizes(), "input and target must have one shape here, got ",
              input.sym_sizes(), " and ", target.sym_sizes());
  TORCH_CHECK_NOT_IMPLEMENTED(at::isFloatingType(input.scalar_type()) && input.element_size() >= 2,
                              "\"kl_div\" not implemented for '", input.scalar_type(), "'");
  TORCH_CHECK(input.scalar_type() == target.scalar_type(), "input and target must have the same dtype, got ",
              input.scalar_type(), " and ", target.scalar_type());
  check_same_device(input, "input", target, "target");
}

inline void check_pointwise_kl_div_backward(const Tensor& grad, const Tensor& input, const Tensor& target,
                                            bool reduce) {
  check_pointwise_kl_div(input, target);
  TORCH_CHECK(reduce ? grad.numel() == 1 : grad.sizes() == input.sizes(),
              "grad_output must have the shape of the output, got ", grad.sizes());
  check_same_device(input, "input", grad, "grad_output");
}

// A backward call's tensors, contiguous, as pointers; the gradients may be undefined.
template <class T>
PointwiseKlDiv<T> pointwise_kl_div_gradient(const Tensor& grad, const Tensor& input, const Tensor& target,
                                            bool log_target, bool reduce, int64_t divisor, const Tensor& grad_input,
                                            const Tensor& grad_target) {
  PointwiseKlDiv<T> p;
  p.n = input.numel();
  p.log_target = log_target;
  p.input = const_data<T>(input);
  p.target = const_data<T>(target);
  p.grad_output = const_data<Compute<T>>(grad);
  p.grad_stride = reduce ? 0 : 1;
  p.factor = reduce ? static_cast<Compute<T>>(1.0 / static_cast<double>(divisor)) : Compute<T>(1);
  p.grad_input = grad_input.defined() ? mutable_data<T>(grad_input) : nullptr;
  p.grad_target = grad_target.defined() ? mutable_data<T>(grad_target) : nullptr;
  return p;
}

}  // namespace charlm
