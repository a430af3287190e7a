// What the autograd of cross_entropy, with and without inplace, shares with that of linear_cross_entropy.
#pragma once

#include "core/autograd_node.h"
#include "ops/cross_entropy_op.h"

namespace charlm {

// The loss as a composition of torch's own differentiable ops, for functorch, forward-mode AD and double backward.
Tensor cross_entropy_formula(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                             const OptionalTensor& weight, const OptionalTensor& token_weight);

// The log-sum-exp and the entropy of each row, in torch's own differentiable ops.
std::tuple<Tensor, Tensor> lse_and_entropy_formula(const CrossEntropyOptions& options, const Tensor& input);

// Whether forward may precompute the gradient.
bool may_precompute_gradient(const CrossEntropyOptions& options, const Tensor& input);

// Targets that are all ignored. With them a backward computes the gradients of lse and entropy alone, and reads no
// weight or probability, which may be infinite or NaN.
Tensor all_ignored(const CrossEntropyOptions& options, const Tensor& input);

// RuntimeError for a weight of class indices or a token_weight that requires grad.
void check_no_derivative(const Tensor& target, const Tensor& input, const OptionalTensor& weight,
                         const OptionalTensor& token_weight);

// A node whose last options are CrossEntropyOptions, which Derived::of_call receives as one argument. loss_dtype is not
// kept: it is the dtype of the incoming gradient.
template <class Derived, size_t kSaved, class... Before>
class CrossEntropyNode
    : public KernelNode<Derived, kSaved, Before..., int64_t, int64_t, double, double, double, double, bool> {
 public:
  void set_options(const CrossEntropyOptions& o, Before... before) {
    this->options = {before...,          o.reduction, o.ignore_index, o.label_smoothing,
                     o.lse_square_scale, o.softcap,   o.logit_scale,  o.zero_if_all_ignored};
  }

  static variable_list gradients(const BackwardCall& call, Before... before, int64_t reduction, int64_t ignore_index,
                                 double label_smoothing, double lse_square_scale, double softcap, double logit_scale,
                                 bool zero_if_all_ignored) {
    return Derived::of_call(
        call, {reduction, ignore_index, label_smoothing, lse_square_scale, softcap, logit_scale, zero_if_all_ignored},
        before...);
  }
};

}  // namespace charlm
