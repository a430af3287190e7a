// Shapes and dtypes of cross_entropy's results, for torch.compile, torch.export and fake tensors.
#include "../cross_entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace charlm {
namespace {

Tensor empty_like_loss(const CrossEntropyOptions& options, const Tensor& input) {
  const auto shape = options.is(Reduction::kNone) ? loss_shape(input) : c10::SymDimVector{};
  return at::empty_symint(shape, input.options());
}

c10::SymInt n_rows(const Tensor& input) { return c10::multiply_integers(loss_shape(input)); }

LossAndNormalizer cross_entropy(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                const OptionalTensor& weight, const OptionalTensor& token_weight) {
  if (const auto dtype = promoted_dtype(input, target, weight)) {
    return cross_entropy(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  check_cross_entropy(options, input, target, weight, token_weight);
  return {empty_like_loss(options, input), at::empty_symint({normalizer_size(input, target), n_rows(input)},
                                                            input.options().dtype(compute_dtype(input)))};
}

LossAndNormalizer cross_entropy_inplace(const CrossEntropyOptions& options, Tensor& input, const Tensor& target,
                                        const OptionalTensor& weight, const OptionalTensor& token_weight) {
  return cross_entropy(options, input, target, weight, token_weight);
}

// Rows of classes, as the kernels write them, seen in the shape of `input`.
Tensor empty_like_rows(const Tensor& input) {
  if (input.dim() <= 2) return at::empty_symint(input.sym_sizes(), input.options());
  auto shape = loss_shape(input);
  shape.push_back(n_classes(input));
  return at::empty_symint(shape, input.options()).movedim(-1, 1);
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy_forward_backward(const CrossEntropyOptions& options,
                                                                  const Tensor& input, const Tensor& target,
                                                                  const OptionalTensor& weight,
                                                                  const OptionalTensor& token_weight) {
  auto [loss, normalizer] = cross_entropy(options, input, target, weight, token_weight);
  return {loss, normalizer, empty_like_rows(input)};
}

Tensor cross_entropy_backward(const CrossEntropyOptions&, const Tensor&, const Tensor& input, const Tensor&,
                              const OptionalTensor&, const OptionalTensor&, const Tensor&) {
  return empty_like_rows(input);
}

void cross_entropy_backward_(const CrossEntropyOptions&, Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                             const OptionalTensor&, const Tensor&) {}

void cross_entropy_rescale_(const CrossEntropyOptions&, Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const OptionalTensor&, const OptionalTensor&, const Tensor&) {}

void cross_entropy_scale_grad_(Tensor&, const Tensor&) {}

std::tuple<Tensor, Tensor, Tensor, Tensor> cross_entropy_metrics(const CrossEntropyOptions& options,
                                                                 const Tensor& input, const Tensor& target) {
  check_cross_entropy(options, input, target, {}, {});
  const auto shape = loss_shape(input);
  const auto compute = input.options().dtype(compute_dtype(input));
  const auto accuracy_shape = options.is(Reduction::kNone) ? shape : c10::SymDimVector{};
  return {at::empty_symint(shape, compute), at::empty_symint(shape, compute),
          at::empty_symint(shape, input.options().dtype(at::kLong)),
          at::empty_symint(accuracy_shape, input.options().dtype(at::kFloat))};
}

Tensor cross_entropy_block_(const CrossEntropyOptions&, Tensor& logits, const Tensor&, const OptionalTensor&,
                            const OptionalTensor&, const OptionalTensor&, int64_t) {
  return at::empty_symint({logits.sym_size(0)}, logits.options().dtype(compute_dtype(logits)));
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("cross_entropy", Flat<&cross_entropy>::call);
  m.impl("cross_entropy_forward_backward", Flat<&cross_entropy_forward_backward>::call);
  m.impl("cross_entropy_inplace_forward", Flat<&cross_entropy_inplace>::call);
  m.impl("cross_entropy_inplace_backward", Flat<&cross_entropy_inplace>::call);
  m.impl("cross_entropy_backward", Flat<&cross_entropy_backward>::call);
  m.impl("cross_entropy_backward_", Flat<&cross_entropy_backward_>::call);
  m.impl("cross_entropy_rescale_", Flat<&cross_entropy_rescale_>::call);
  m.impl("cross_entropy_scale_grad_", &cross_entropy_scale_grad_);
  m.impl("cross_entropy_target_backward", Flat<&cross_entropy_backward>::call);
  m.impl("cross_entropy_metrics", Flat<&cross_entropy_metrics>::call);
  m.impl("cross_entropy_block_", Flat<&cross_entropy_block_>::call);
}

}  // namespace charlm
