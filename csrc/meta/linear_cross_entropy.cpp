// Shapes and dtypes of linear_cross_entropy's results, for torch.compile, torch.export and fake tensors.
#include "../linear_cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace charlm {
namespace {

Tensor linear_cross_entropy(const LinearCrossEntropyArguments& a) {
  check_linear_cross_entropy(a);
  const auto shape = a.options.is(Reduction::kNone) ? loss_shape(like_logits(a)) : c10::SymDimVector{};
  return at::empty_symint(shape, a.input.options().dtype(loss_dtype(a)));
}

LossAndGradients linear_cross_entropy_gradients(const LinearCrossEntropyArguments& a, const OptionalTensor&,
                                                OutputMask mask) {
  const auto empty_like = [&](bool wanted, const OptionalTensor& t) {
    return wanted && t ? at::empty_symint(t->sym_sizes(), t->options()) : at::empty({0}, a.input.options());
  };
  return {linear_cross_entropy(a), empty_like(mask[0], a.input), empty_like(mask[1], a.linear_weight),
          empty_like(mask[2], a.linear_bias)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_metrics(const LinearCrossEntropyArguments& a) {
  check_linear_cross_entropy(a);
  const auto shape = loss_shape(like_logits(a));
  const auto compute = a.input.options().dtype(compute_dtype(a.input));
  const auto accuracy_shape = a.options.is(Reduction::kNone) ? shape : c10::SymDimVector{};
  return {at::empty_symint(shape, compute), at::empty_symint(shape, compute),
          at::empty_symint(shape, a.input.options().dtype(at::kLong)),
          at::empty_symint(accuracy_shape, a.input.options().dtype(at::kFloat))};
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("linear_cross_entropy", FlatLinear<&linear_cross_entropy>::call);
  m.impl("linear_cross_entropy_gradients", FlatLinear<&linear_cross_entropy_gradients>::call);
  m.impl("linear_cross_entropy_metrics", FlatLinear<&linear_cross_entropy_metrics>::call);
}

}  // namespace charlm
