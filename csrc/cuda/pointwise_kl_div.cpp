// torch's kl_div on CUDA: takes tensors apart and launches the kernels.
#include "kernels/pointwise_kl_div.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <array>
#include <tuple>

#include "../pointwise_kl_div_checks.h"
#include "device.h"

namespace charlm::cuda {
namespace {

Tensor forward(const Tensor& given_input, const Tensor& given_target, bool log_target, bool reduce,
               c10::SymInt divisor) {
  check_pointwise_kl_div(given_input, given_target);
  const DeviceCall device(given_input.device());
  const Tensor input = given_input.contiguous(), target = given_target.contiguous();
  const Tensor output = reduce ? at::empty({}, input.options()) : at::empty(input.sizes(), input.options());
  if (!reduce && input.numel() == 0) return output;
  const Tensor sums = at::empty({kMostPointwiseBlocks}, input.options().dtype(row_dtype(input)));
  with_float_type(input.scalar_type(), "kl_div", [&]<class T>() {
    PointwiseKlDiv<T> p;
    p.n = input.numel();
    p.log_target = log_target;
    p.input = const_data<T>(input);
    p.target = const_data<T>(target);
    p.output = reduce ? nullptr : mutable_data<T>(output);
    device.check(pointwise_kl_div_forward(p, mutable_data<Compute<T>>(sums), reduce ? mutable_data<T>(output) : nullptr,
                                          static_cast<double>(divisor.expect_int()), device.stream()));
  });
  return output;
}

std::tuple<Tensor, Tensor> backward(const Tensor& given_grad, const Tensor& given_input, const Tensor& given_target,
                                    bool log_target, bool reduce, c10::SymInt divisor,
                                    std::array<bool, 2> output_mask) {
  check_pointwise_kl_div_backward(given_grad, given_input, given_target, reduce);
  const DeviceCall device(given_input.device());
  const Tensor input = given_input.contiguous(), target = given_target.contiguous();
  const Tensor grad = given_grad.to(row_dtype(input)).contiguous();
  Tensor grad_input, grad_target;
  if (output_mask[0]) grad_input = at::empty(input.sizes(), input.options());
  if (output_mask[1]) grad_target = at::empty(input.sizes(), input.options());
  with_float_type(input.scalar_type(), "kl_div_backward", [&]<class T>() {
    device.check(pointwise_kl_div_backward(pointwise_kl_div_gradient<T>(grad, input, target, log_target, reduce,
                                                                        divisor.expect_int(), grad_input, grad_target),
                                           device.stream()));
  });
  return {grad_input, grad_target};
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CHARLM_CUDA_KEY, m) {
  m.impl("pointwise_kl_div", &forward);
  m.impl("pointwise_kl_div_backward", &backward);
}

}  // namespace charlm::cuda
