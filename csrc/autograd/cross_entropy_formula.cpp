#include "cross_entropy_formula.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>

namespace charlm {
namespace {

Tensor transformed(const CrossEntropyOptions& options, const Tensor& input) {
  Tensor z = input.to(compute_dtype(input));
  if (options.logit_scale != 1) z = z * options.logit_scale;
  const double softcap =
      z.scalar_type() == at::kDouble ? softcap_as<double>(options.softcap) : softcap_as<float>(options.softcap);
  return softcap > 0 ? (z / softcap).tanh() * softcap : z;
}

// [C] with a dimension for each of `input`, so that it broadcasts along the classes.
Tensor along_classes(const Tensor& weight, const Tensor& input) {
  c10::SymDimVector shape(input.dim(), 1);
  shape[class_dim(input)] = weight.sym_size(0);
  return weight.view_symint(shape);
}

Tensor reduced(const CrossEntropyOptions& options, const Tensor& loss, const Tensor& share, const Tensor& counted) {
  if (options.is(Reduction::kNone)) return loss;
  if (options.is(Reduction::kSum)) return loss.sum();
  Tensor divisor = share.sum();
  if (options.zero_if_all_ignored) divisor = at::where(counted.any(), divisor, at::ones_like(divisor));
  return loss.sum() / divisor;
}

}  // namespace

Tensor cross_entropy_formula(const CrossEntropyOptions& options, const Tensor& input, const Tensor& given_target,
                             const OptionalTensor& given_weight, const OptionalTensor& given_token_weight) {
  check_cross_entropy(options, input, given_target, given_weight, given_token_weight);
  const int64_t dim = class_dim(input);
  const double smoothing = std::max(0.0, options.label_smoothing);
  const Tensor z = transformed(options, input);
  const Tensor log_p = z.log_softmax(dim);
  const Tensor weight = given_weight ? given_weight->to(z.scalar_type()) : Tensor();
  const Tensor class_weight = weight.defined() ? along_classes(weight, input) : Tensor();

  Tensor loss, share, counted;  // of each target: its loss, its weight in a mean, whether it is not ignored
  Tensor square = options.lse_square_scale != 0 ? z.logsumexp(dim).square() * options.lse_square_scale : Tensor();
  if (has_probabilities(input, given_target)) {
    const Tensor weighted = weight.defined() ? log_p * class_weight : log_p;
    loss = -(given_target.to(z.scalar_type()) * weighted).sum(dim) * (1 - smoothing);
    if (smoothing > 0) loss = loss - weighted.mean(dim) * smoothing;
    share = at::ones_like(loss);
    counted = at::ones_like(loss, at::kBool);
    if (square.defined()) loss = loss + square;
  } else {
    const auto shape = loss_shape(input);
    Tensor target = given_target.to(at::kLong).reshape_symint(shape);
    counted = target.ne(options.ignore_index);
    target = at::where(counted, target, at::zeros_like(target));
    const Tensor nothing = at::zeros_like(target, z.options());
    const Tensor log_p_target = log_p.gather(dim, target.unsqueeze(dim)).squeeze(dim);
    const Tensor weights = weight.defined() ? weight.index({target}) : at::ones_like(target, z.options());
    share = at::where(counted, weights, nothing);
    loss = -log_p_target * weights * (1 - smoothing);
    if (smoothing > 0) {
      loss = loss - (weight.defined() ? log_p * class_weight : log_p).mean(dim) * smoothing;
    }
    if (square.defined()) loss = loss + square * weights;
    loss = at::where(counted, loss, nothing);
  }
  if (given_token_weight) {
    const Tensor token_weight = given_token_weight->to(z.scalar_type()).reshape_symint(loss_shape(input));
    loss = loss * token_weight;
    share = share * token_weight;
  }
  return reduced(options, loss, share, counted).to(input.scalar_type());
}

}  // namespace charlm
