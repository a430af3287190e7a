// linear_cross_entropy's autograd, functorch and autocast. As in cross_entropy, forward of a mean or a sum computes the
// gradients for a unit grad_loss while it has the logits, and backward returns them. In all other cases (a second
// backward, reduction "none", float16) the logits are computed again, a block of rows at a time.
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>

#include <cmath>
#include <utility>

#include "ops/cross_entropy_autograd.h"
#include "ops/linear_cross_entropy_op.h"

namespace charlm {
namespace {

// In the dtype of the loss, as cross_entropy_formula rounds it.
Tensor logits(const LinearCrossEntropyArguments& a) {
  const Tensor z = at::linear(a.input, a.linear_weight, a.linear_bias);
  return a.unrounded ? z.to(compute_dtype(z)) : z;
}

Tensor formula(const LinearCrossEntropyArguments& a) {
  const Tensor z = logits(a);
  return cross_entropy_formula(a.options, z, a.target, to(a.weight, z.scalar_type()), a.token_weight);
}

struct LinearCrossEntropyBackward final
    : CrossEntropyNode<LinearCrossEntropyBackward, 7, bool, int64_t, int64_t, int64_t> {
  static constexpr const char* kName = "LinearCrossEntropyBackward";
  enum { kInput, kLinearWeight, kTarget, kLinearBias, kWeight, kTokenWeight, kEntropy };

  variable_list precomputed;  // the gradients for unit grad_loss, if forward computed them; used once

  // Outputs: the loss, and for linear_cross_entropy_with_metrics lse and entropy.
  static variable_list of_call(const BackwardCall& call, const CrossEntropyOptions& options, bool unrounded,
                               int64_t block_rows, int64_t gemm, int64_t memory_budget) {
    const bool has_metrics = call.grads.size() > 1;
    LinearCrossEntropyArguments a{call.saved(kInput),
                                  call.saved(kLinearWeight),
                                  call.saved(kTarget),
                                  call.optional(kLinearBias),
                                  call.optional(kWeight),
                                  call.optional(kTokenWeight),
                                  unrounded,
                                  block_rows,
                                  gemm,
                                  options,
                                  memory_budget};
    if (at::GradMode::is_enabled()) {
      raise_recorded_index_error(a.target);
      return call.differentiate({a.input, a.linear_weight, tensor_or_undefined(a.linear_bias)},
                                [&](const variable_list& in) -> variable_list {
                                  a.input = in[0], a.linear_weight = in[1], a.linear_bias = optional_if_defined(in[2]);
                                  if (!has_metrics) return {formula(a)};
                                  const auto [lse, entropy] = lse_and_entropy_formula(a.options, logits(a));
                                  return {formula(a), lse, entropy};
                                });
    }
    at::AutoDispatchBelowADInplaceOrView guard;
    const OutputMask mask = {call.needs(0), call.needs(1), a.linear_bias && call.needs(2)};
    static const LinearGradientsOp op("charlm::_linear_cross_entropy_gradients");
    const auto grad_of = [&](size_t i) { return has_metrics ? optional_if_defined(call.grads[i]) : std::nullopt; };
    Tensor grad_loss = call.grads[0];
    if (!grad_loss.defined()) {  // of lse and entropy alone
      a.target = all_ignored(a.options, like_logits(a));
      a.weight.reset();
      a.token_weight.reset();
      a.options.reduction = static_cast<int64_t>(Reduction::kSum);
      grad_loss = at::zeros({}, a.input.options().dtype(compute_dtype(a.input)));
    }
    const OptionalTensor entropy = grad_of(2) ? call.optional(kEntropy) : std::nullopt;
    return only(mask, op(a, grad_loss, grad_of(1), grad_of(2), entropy, mask));
  }

  void set_options(const LinearCrossEntropyArguments& a) {
    CrossEntropyNode::set_options(a.options, loss_dtype(a) != a.input.scalar_type(), a.block_rows, a.gemm,
                                  a.memory_budget);
  }

  static variable_list only(OutputMask mask, const LossAndGradients& all) {
    return {mask[0] ? std::get<1>(all) : Tensor(), mask[1] ? std::get<2>(all) : Tensor(),
            mask[2] ? std::get<3>(all) : Tensor()};
  }

 private:
  variable_list backward(const BackwardCall& call) override {
    variable_list grads = std::exchange(precomputed, {});
    const Tensor& grad_loss = call.grads[0];
    if (grads.empty() || at::GradMode::is_enabled() || !is_concrete(grad_loss)) return KernelNode::backward(call);
    const double factor = grad_loss.is_cpu() ? grad_loss.item<double>() : 2;  // on CUDA reading it would wait
    if (!std::isfinite(factor)) return KernelNode::backward(call);            // times the 0 of an ignored row it is NaN
    for (size_t i = 0; i < saved.size(); i++) call.saved(i);                  // raises if one was modified in place
    if (factor == 1) return grads;
    at::AutoDispatchBelowADInplaceOrView guard;
    for (Tensor& grad : grads) {
      if (grad.defined()) scale_gradient_(grad, grad_loss);
    }
    return grads;
  }

  void release_precomputed() override { precomputed.clear(); }
};

void check_no_derivative(const LinearCrossEntropyArguments& a) {
  if (!at::GradMode::is_enabled()) return;
  TORCH_CHECK(!any_requires_grad(a.target, a.weight, a.token_weight),
              "linear_cross_entropy gives no gradient to target, weight or token_weight: they must not require grad");
}

// Whether functorch or forward-mode AD sees one of the tensors.
bool needs_formula(const LinearCrossEntropyArguments& a) {
  return any_needs_formula(a.input, a.linear_weight, a.target, a.linear_bias, a.weight, a.token_weight);
}

Tensor autograd(const LinearCrossEntropyArguments& a) {
  if (needs_formula(a)) return formula(a);
  static const LinearForwardOp op("charlm::linear_cross_entropy");
  const OutputMask mask = {requires_grad(a.input), requires_grad(a.linear_weight), requires_grad(a.linear_bias)};
  check_no_derivative(a);
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
      const LossAndGradients all = op_with_gradients(a, std::nullopt, std::nullopt, std::nullopt, std::nullopt, mask);
      loss = std::get<0>(all);
      node->precomputed = LinearCrossEntropyBackward::only(mask, all);
    } else {
      loss = op(a);
    }
  }
  node->save(a.input, a.linear_weight, a.target, a.linear_bias, a.weight, a.token_weight, Tensor());
  node->set_options(a);
  torch::autograd::set_history(loss, node);
  return loss;
}

LossAndMetrics with_metrics_by_formula(const LinearCrossEntropyArguments& a) {
  static const CrossEntropyOp<LossStateAndMetrics, const Tensor&, const Tensor&, const OptionalTensor&,
                              const OptionalTensor&>
      op("charlm::cross_entropy_with_metrics");
  const Tensor z = logits(a);
  const auto [loss, state, lse, entropy, predicted_tokens, token_accuracy] =
      op(a.options, z, a.target, to(a.weight, z.scalar_type()), a.token_weight);
  return {loss, lse, entropy, predicted_tokens, token_accuracy};
}

LossAndMetrics with_metrics_autograd(const LinearCrossEntropyArguments& a) {
  if (needs_formula(a)) return with_metrics_by_formula(a);
  static const LinearCrossEntropyOp<LossAndMetrics> op("charlm::linear_cross_entropy_with_metrics");
  check_no_derivative(a);
  const auto below_autograd = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return op(a);
  };
  if (!at::GradMode::is_enabled() || !any_requires_grad(a.input, a.linear_weight, a.linear_bias)) {
    return below_autograd();
  }
  const auto node = make_node<LinearCrossEntropyBackward>();
  node->set_next_edges(
      torch::autograd::collect_next_edges(a.input, a.linear_weight, tensor_or_undefined(a.linear_bias)));
  auto results = below_autograd();
  auto& [loss, lse, entropy, predicted_tokens, token_accuracy] = results;
  // Detached, or the output would hold the node that holds it.
  node->save(a.input, a.linear_weight, a.target, a.linear_bias, a.weight, a.token_weight, entropy.detach());
  node->set_options(a);
  torch::autograd::set_history(variable_list{loss, lse, entropy}, node);
  return results;
}

// The product in autocast's dtype, as torch's linear, and the loss in float32, as torch's cross_entropy_loss.
template <c10::DeviceType kDevice, class Result, const char* kName>
Result autocast(const LinearCrossEntropyArguments& given) {
  static const LinearCrossEntropyOp<Result> op(kName);
  const Autocast autocast(kDevice);
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  LinearCrossEntropyArguments a = given;
  a.input = autocast.cast(given.input, dtype);
  a.linear_weight = autocast.cast(given.linear_weight, dtype);
  a.linear_bias = autocast.cast(given.linear_bias, dtype);
  a.weight = autocast.cast(given.weight);
  a.unrounded = true;
  return op(a);
}

constexpr char kForward[] = "charlm::linear_cross_entropy";
constexpr char kMetrics[] = "charlm::linear_cross_entropy_metrics";
constexpr char kWithMetrics[] = "charlm::linear_cross_entropy_with_metrics";

template <c10::DeviceType kDevice>
void register_autocast(torch::Library& m) {
  m.impl("linear_cross_entropy", FlatLinear<&autocast<kDevice, Tensor, kForward>>::call);
  m.impl("linear_cross_entropy_metrics", FlatLinear<&autocast<kDevice, CrossEntropyMetricsTuple, kMetrics>>::call);
  m.impl("linear_cross_entropy_with_metrics", FlatLinear<&autocast<kDevice, LossAndMetrics, kWithMetrics>>::call);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("linear_cross_entropy", FlatLinear<&autograd>::call);
  m.impl("linear_cross_entropy_with_metrics", FlatLinear<&with_metrics_autograd>::call);
  for (const char* name : {"_linear_cross_entropy_gradients", "linear_cross_entropy_metrics"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) {
  m.impl("linear_cross_entropy", FlatLinear<&formula>::call);
  m.impl("linear_cross_entropy_with_metrics", FlatLinear<&with_metrics_by_formula>::call);
}

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { register_autocast<c10::DeviceType::CPU>(m); }
TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { register_autocast<c10::DeviceType::CUDA>(m); }

}  // namespace charlm
