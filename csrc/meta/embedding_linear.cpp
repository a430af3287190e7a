// Shapes and dtypes of embedding_linear's results, for torch.compile, torch.export and fake tensors.
#include "../embedding_linear.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace charlm {
namespace {

std::tuple<Tensor, Tensor> embedding_linear(const Tensor& input, const Tensor& embedding_weight,
                                            const Tensor& linear_weight, const OptionalTensor& linear_bias,
                                            int64_t padding_idx, int64_t activation, int64_t plan) {
  check_embedding_linear(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
  const auto shape = embedding_linear_shape(input, linear_weight);
  const auto options = embedding_weight.options();
  return {at::empty_symint(shape, options),
          keeps_input(activation) ? at::empty_symint(shape, options) : at::empty({0}, options)};
}

std::tuple<Tensor, Tensor, Tensor> embedding_linear_backward(const Tensor&, const Tensor&,
                                                             const Tensor& embedding_weight,
                                                             const Tensor& linear_weight, const Tensor&, int64_t,
                                                             int64_t, int64_t, std::array<bool, 3> output_mask) {
  const auto options = embedding_weight.options();
  Tensor grads[3];
  if (output_mask[0]) grads[0] = at::empty_symint(embedding_weight.sym_sizes(), options);
  if (output_mask[1]) grads[1] = at::empty_symint(linear_weight.sym_sizes(), options);
  if (output_mask[2]) grads[2] = at::empty_symint({linear_weight.sym_size(0)}, options);
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("embedding_linear", &embedding_linear);
  m.impl("embedding_linear_backward", &embedding_linear_backward);
}

}  // namespace charlm
