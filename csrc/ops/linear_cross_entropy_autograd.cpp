// linear_cross_entropy's autograd, functorch and autocast. As in cross_entropy, forward of a mean or a sum computes the
// gradients for a unit grad_loss while it has the logits, and backward returns them. In all other cases (a second
// backward, reduction "none", float16) the logits are computed again, a block of rows at a time.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>

#include <utility>

#include "core/autograd_node.h"
#include "ops/linear_cross_entropy_op.h"

namespace charlm {
namespace {

Tensor formula(const LinearCrossEntropyArguments& a) {
  const Tensor logits = at::linear(a.input, a.linear_weight, a.linear_bias);
  return cross_entropy_formula(a.options, a.unrounded ? logits.to(compute_dtype(logits)) : logits, a.target, a.weight,
                               a.token_weight);
}

struct LinearCrossEntropyBackward final : KernelNode<LinearCrossEntropyBackward, 6, bool, int64_t, int64_t, int64_t,
                                                     int64_t, double, double, double, double, bool> {
  static constexpr const char* kName = "LinearCrossEntropyBackward";
  enum { kInput, kLinearWeight, kTarget, kLinearBias, kWeight, kTokenWeight };

  variable_list precomputed;  // the gradients for unit grad_loss, if forward computed them; used once

  template <class... O>
  static variable_list gradients(const BackwardCall& call, bool unrounded, int64_t block_rows, int64_t gemm,
                                 O... options) {
    LinearCrossEntropyArguments a{call.saved(kInput),
                                  call.saved(kLinearWeight),
                                  call.saved(kTarget),
                                  call.optional(kLinearBias),
                                  call.optional(kWeight),
                                  call.optional(kTokenWeight),
                                  unrounded,
                                  block_rows,
                                  gemm,
                                  {options...}};
    if (at::GradMode::is_enabled()) {
      raise_recorded_index_error(a.target);
      return call.differentiate({a.input, a.linear_weight, tensor_or_undefined(a.linear_bias)},
                                [&](const variable_list& in) {
                                  a.input = in[0], a.linear_weight = in[1], a.linear_bias = optional_if_defined(in[2]);
                                  return formula(a);
                                });
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    const OutputMask mask = {call.needs(0), call.needs(1), a.linear_bias && call.needs(2)};
    static const LinearGradientsOp op("charlm::_linear_cross_entropy_gradients");
    return only(mask, op(a, call.grads[0], mask));
  }

  static variable_list only(OutputMask mask, const LossAndGradients& all) {
    return {mask[0] ? std::get<1>(all) : Tensor(), mask[1] ? std::get<2>(all) : Tensor(),
            mask[2] ? std::get<3>(all) : Tensor()};
  }

 private:
  variable_list backward(const BackwardCall& call) override {
    variable_list grads = std::exchange(precomputed, {});
    if (grads.empty() || at::GradMode::is_enabled() || !is_plain(call.grads[0])) return KernelNode::backward(call);
    for (size_t i = 0; i < saved.size(); i++) call.saved(i);  // raises if one was modified in place
    at::AutoDispatchBelowADInplaceOrView guard;
    for (Tensor& grad : grads) {
      if (grad.defined()) scale_gradient_(grad, call.grads[0]);
    }
    return grads;
  }

  void release_precomputed() override { precomputed.clear(); }
};

Tensor autograd(const LinearCrossEntropyArguments& a) {
  if (needs_formula(a.input) || needs_formula(a.linear_weight) || needs_formula(a.target) ||
      needs_formula(a.linear_bias) || needs_formula(a.weight) || needs_formula(a.token_weight)) {
    return formula(a);
  }
  static const LinearForwardOp op("charlm::linear_cross_entropy");
  const OutputMask mask = {requires_grad(a.input), requires_grad(a.linear_weight), requires_grad(a.linear_bias)};
  if (at::GradMode::is_enabled()) {
    TORCH_CHECK(!requires_grad(a.target) && !requires_grad(a.weight) && !requires_grad(a.token_weight),
                "linear_cross_entropy gives no gradient to target, weight or token_weight: they must not require grad");
  }
  if (!at::GradMode::is_enabled() || !(mask[0] || mask[1] || mask[2])) {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op(a);
  }
  const auto node = make_node<LinearCrossEntropyBackward>();
  node->set_next_edges(
      torch::autograd::collect_next_edges(a.input, a.linear_weight, tensor_or_undefined(a.linear_bias)));
  Tensor loss;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (may_precompute_gradient(a.options, a.input)) {
      static const LinearGradientsOp op_with_gradients("charlm::_linear_cross_entropy_gradients");
      const LossAndGradients all = op_with_gradients(a, std::nullopt, mask);
      loss = std::get<0>(all);
      node->precomputed = LinearCrossEntropyBackward::only(mask, all);
    } else {
      loss = op(a);
    }
  }
  node->save(a.input, a.linear_weight, a.target, a.linear_bias, a.weight, a.token_weight);
  const CrossEntropyOptions& o = a.options;
  node->options = {a.unrounded,       a.block_rows,       a.gemm,    o.reduction,   o.ignore_index,
                   o.label_smoothing, o.lse_square_scale, o.softcap, o.logit_scale, o.zero_if_all_ignored};
  torch::autograd::set_history(loss, node);
  return loss;
}

// The product in autocast's dtype, as torch's linear, and the loss in float32, as torch's cross_entropy_loss.
template <c10::DeviceType kDevice>
Tensor autocast(const LinearCrossEntropyArguments& given) {
  const Autocast autocast(kDevice);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  LinearCrossEntropyArguments a = given;
  a.input = autocast.cast(given.input, dtype);
  a.linear_weight = autocast.cast(given.linear_weight, dtype);
  a.linear_bias = autocast.cast(given.linear_bias, dtype);
  a.weight = autocast.cast(given.weight);
  a.unrounded = true;
  static const LinearForwardOp op("charlm::linear_cross_entropy");
  return op(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("linear_cross_entropy", FlatLinear<&autograd>::call);
  for (const char* name : {"_linear_cross_entropy_gradients", "linear_cross_entropy_metrics"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("linear_cross_entropy", FlatLinear<&formula>::call); }

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) {
  m.impl("linear_cross_entropy", FlatLinear<&autocast<c10::DeviceType::CPU>>::call);
}

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) {
  m.impl("linear_cross_entropy", FlatLinear<&autocast<c10::DeviceType::CUDA>>::call);
}

}  // namespace charlm
