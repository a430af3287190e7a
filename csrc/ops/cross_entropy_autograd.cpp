// cross_entropy's autograd, functorch and autocast, without inplace. For a mean or a sum the gradient of the loss is
// nearly always 1, so forward computes the logits' gradient in the same pass, and backward returns it. For any other
// grad_loss, and always for float16, backward computes it from the logits and the state of each row: nothing is rounded
// before the scale is known.
#include "ops/cross_entropy_autograd.h"

#include <ATen/Functions.h>
#include <ATen/SavedTensorHooks.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/impl/TorchDispatchModeTLS.h>

#include <array>
#include <cmath>
#include <utility>

#include "core/checks.h"

namespace charlm {

// -------------------------------------------------------------------------------------------------------- formula

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

  Tensor loss, share, counted;  // of each target: its loss, its weight in a mean, false if it is ignored
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
  return reduced(options, loss, share, counted).to(loss_dtype_of(options, input));
}

std::tuple<Tensor, Tensor> lse_and_entropy_formula(const CrossEntropyOptions& options, const Tensor& input) {
  const int64_t dim = class_dim(input);
  const Tensor z = transformed(options, input), log_p = z.log_softmax(dim);
  return {z.logsumexp(dim), -(log_p.exp() * log_p.masked_fill(log_p == -INFINITY, 0)).sum(dim)};
}

// Only a gradient that depends on grad_loss by a factor can be precomputed. Traced calls keep to ops whose results do
// not depend on the value of that factor. Where hooks handle saved tensors (activation checkpointing, offloading),
// nothing of the logits' size is kept beside them. In float16 small entries would be lost before a GradScaler's factor
// is known.
bool may_precompute_gradient(const CrossEntropyOptions& options, const Tensor& input) {
  return !options.is(Reduction::kNone) && input.scalar_type() != at::kHalf && is_concrete(input) &&
         !c10::impl::TorchDispatchModeTLS::any_modes_set() &&
         !at::SavedTensorDefaultHooks::get_hooks(/*ignore_is_tracing=*/true).has_value();
}

void check_no_derivative(const Tensor& target, const Tensor& input, const OptionalTensor& weight,
                         const OptionalTensor& token_weight) {
  if (!at::GradMode::is_enabled()) return;
  TORCH_CHECK(!requires_grad(weight) || has_probabilities(input, target),
              "the derivative for 'weight' is not implemented for class indices: it must not require grad");
  TORCH_CHECK(!requires_grad(token_weight),
              "the derivative for 'token_weight' is not implemented: it must not require grad");
}

Tensor all_ignored(const CrossEntropyOptions& options, const Tensor& input) {
  return at::full_symint(loss_shape(input), options.ignore_index, input.options().dtype(at::kLong));
}

namespace {

// ------------------------------------------------------------------------------------------------ without metrics

using BackwardOp = CrossEntropyOp<std::tuple<Tensor, Tensor>, const Tensor&, const Tensor&, const Tensor&,
                                  const OptionalTensor&, const OptionalTensor&, const Tensor&, const OptionalTensor&,
                                  const OptionalTensor&, const OptionalTensor&, std::array<bool, 2>>;

const BackwardOp& backward_op() {
  static const BackwardOp op("charlm::_cross_entropy_backward");
  return op;
}

struct CrossEntropyBackward final : CrossEntropyNode<CrossEntropyBackward, 6> {
  enum { kInput, kTarget, kWeight, kTokenWeight, kState, kEntropy };
  static constexpr const char* kName = "CrossEntropyBackward";

  Tensor precomputed;  // the logits' gradient for unit grad_loss, if forward computed it; used once

  // Outputs: the loss, and for cross_entropy_with_metrics lse and entropy.
  static variable_list of_call(const BackwardCall& call, CrossEntropyOptions options) {
    const Tensor x = call.saved(kInput), y = call.saved(kTarget);
    const bool has_metrics = call.grads.size() > 1;
    const OptionalTensor w = call.optional(kWeight), t = call.optional(kTokenWeight);
    if (at::GradMode::is_enabled()) {
      raise_recorded_index_error(y);
      if (call.grads[0].defined()) options.loss_dtype = call.grads[0].scalar_type();
      return call.differentiate({x, y, tensor_or_undefined(w)}, [&](const variable_list& in) -> variable_list {
        const Tensor loss = cross_entropy_formula(options, in[0], in[1], optional_if_defined(in[2]), t);
        if (!has_metrics) return {loss};
        const auto [lse, entropy] = lse_and_entropy_formula(options, in[0]);
        return {loss, lse, entropy};
      });
    }
    variable_list result(3);  // input, target, weight
    const auto grad_of = [&](size_t i) { return has_metrics ? optional_if_defined(call.grads[i]) : std::nullopt; };
    const OptionalTensor entropy = grad_of(2) ? call.optional(kEntropy) : std::nullopt;
    const Tensor state = call.saved(kState);
    if (!call.grads[0].defined()) {  // of lse and entropy alone
      if (!call.needs(0)) return result;
      options.reduction = static_cast<int64_t>(Reduction::kSum);
      const Tensor grad_loss = at::zeros({}, x.options().dtype(compute_dtype(x)));
      result[0] = std::get<0>(backward_op()(options, grad_loss, x, all_ignored(options, x), {}, {},
                                            state.narrow(0, 0, 2), grad_of(1), grad_of(2), entropy, {true, false}));
      return result;
    }
    const Tensor& grad_loss = call.grads[0];
    if (call.needs(0) || call.needs(1)) {
      std::tie(result[0], result[1]) = backward_op()(options, grad_loss, x, y, w, t, state, grad_of(1), grad_of(2),
                                                     entropy, {call.needs(0), call.needs(1)});
    }
    if (call.needs(2)) result[2] = weight_gradient(options, grad_loss, x, y, t, state).to(w->scalar_type());
    return result;
  }

  // With neither weight nor smoothing, the targets' gradient is -log p times the gradient of each row's loss; the
  // weight's is the sum over rows of that times the (smoothed) targets. In float: it is rounded once, at the end.
  static Tensor weight_gradient(const CrossEntropyOptions& options, const Tensor& grad_loss, const Tensor& x,
                                const Tensor& y, const OptionalTensor& t, const Tensor& state) {
    CrossEntropyOptions plain = options;
    plain.label_smoothing = 0;
    const double smoothing = std::max(0.0, options.label_smoothing);
    const at::ScalarType compute = compute_dtype(x);
    const Tensor p = y.to(compute);
    const Tensor minus_log_p =
        std::get<1>(backward_op()(plain, grad_loss, x.to(compute), p, {}, t, state, {}, {}, {}, {false, true}));
    const c10::SymInt classes = n_classes(x);
    const Tensor grad =
        minus_log_p * (p * (1 - smoothing) + smoothing / static_cast<double>(classes.guard_int(__FILE__, __LINE__)));
    return x.dim() == 1 ? grad : grad.movedim(1, -1).reshape_symint({-1, classes}).sum(0);
  }

 private:
  variable_list backward(const BackwardCall& call) override {
    Tensor grad = std::exchange(precomputed, Tensor());
    const Tensor& grad_loss = call.grads[0];
    if (!grad.defined() || at::GradMode::is_enabled() || !is_concrete(grad_loss)) return KernelNode::backward(call);
    const auto rescale = [&](auto... options) {
      at::AutoDispatchBelowADInplaceOrView guard;
      cross_entropy_rescale_({options...}, grad, grad_loss, call.saved(kInput), call.saved(kTarget),
                             call.optional(kWeight), call.optional(kTokenWeight), call.saved(kState));
    };
    std::apply(rescale, options);
    return {grad, Tensor(), Tensor()};
  }

  void release_precomputed() override { precomputed.reset(); }
};

const ForwardOp& forward_op() {
  static const ForwardOp op("charlm::cross_entropy");
  return op;
}

LossAndState by_formula(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                        const OptionalTensor& weight, const OptionalTensor& token_weight) {
  return {cross_entropy_formula(options, input, target, weight, token_weight), at::empty({0}, input.options())};
}

LossAndState autograd(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                      const OptionalTensor& weight, const OptionalTensor& token_weight) {
  if (const auto dtype = promoted_dtype(input, target, weight)) {
    return forward_op()(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  check_no_derivative(target, input, weight, token_weight);
  if (any_needs_formula(input, target, weight, token_weight)) {
    return by_formula(options, input, target, weight, token_weight);
  }
  const auto below_autograd = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return forward_op()(options, input, target, weight, token_weight);
  };
  if (!at::GradMode::is_enabled() || !any_requires_grad(input, target, weight)) {
    return below_autograd();
  }
  const auto node = make_node<CrossEntropyBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, target, tensor_or_undefined(weight)));
  Tensor loss, state;
  if (requires_grad(input) && !requires_grad(target) && !requires_grad(weight) &&
      may_precompute_gradient(options, input)) {
    at::AutoDispatchBelowADInplaceOrView guard;
    std::tie(loss, state, node->precomputed) =
        cross_entropy_forward_backward(options, input, target, weight, token_weight);
  } else {
    std::tie(loss, state) = below_autograd();
  }
  node->set_options(options);
  node->save(input, target, weight, token_weight, state, Tensor());
  torch::autograd::set_history(loss, node);
  return {loss, state};
}

// -------------------------------------------------------------------------------------------------- with metrics

using WithMetricsOp =
    CrossEntropyOp<LossStateAndMetrics, const Tensor&, const Tensor&, const OptionalTensor&, const OptionalTensor&>;

const WithMetricsOp& with_metrics_op() {
  static const WithMetricsOp op("charlm::cross_entropy_with_metrics");
  return op;
}

LossStateAndMetrics with_metrics_by_formula(const CrossEntropyOptions& options, const Tensor& input,
                                            const Tensor& target, const OptionalTensor& weight,
                                            const OptionalTensor& token_weight) {
  const auto [loss, state] = by_formula(options, input, target, weight, token_weight);
  const auto [lse, entropy] = lse_and_entropy_formula(options, input);
  const int64_t dim = class_dim(input);
  const Tensor predicted = transformed(options, input).argmax(dim);
  const bool probabilities = has_probabilities(input, target);
  const Tensor expected = probabilities ? target.argmax(dim) : target.to(at::kLong).reshape_symint(loss_shape(input));
  const Tensor counted = probabilities ? expected.eq(expected) : expected.ne(options.ignore_index);
  const Tensor is_correct = predicted.eq(expected).logical_and(counted).to(at::kFloat);
  return {loss, state, lse, entropy, predicted, token_accuracy(options, is_correct, counted)};
}

LossStateAndMetrics with_metrics_autograd(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                          const OptionalTensor& weight, const OptionalTensor& token_weight) {
  if (const auto dtype = promoted_dtype(input, target, weight)) {
    return with_metrics_op()(options, input.to(*dtype), target.to(*dtype), to(weight, *dtype), token_weight);
  }
  check_no_derivative(target, input, weight, token_weight);
  if (any_needs_formula(input, target, weight, token_weight)) {
    return with_metrics_by_formula(options, input, target, weight, token_weight);
  }
  const auto below_autograd = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return with_metrics_op()(options, input, target, weight, token_weight);
  };
  if (!at::GradMode::is_enabled() || !any_requires_grad(input, target, weight)) {
    return below_autograd();
  }
  const auto node = make_node<CrossEntropyBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, target, tensor_or_undefined(weight)));
  auto results = below_autograd();
  auto& [loss, state, lse, entropy, predicted_tokens, token_accuracy] = results;
  node->set_options(options);
  // Detached, or the output would hold the node that holds it.
  node->save(input, target, weight, token_weight, state, entropy.detach());
  torch::autograd::set_history(variable_list{loss, lse, entropy}, node);
  return results;
}

// ---------------------------------------------------------------------------------------------------- autocast

// In float32, as torch's own cross_entropy_loss.
template <c10::DeviceType kDevice>
LossAndState autocast(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                      const OptionalTensor& weight, const OptionalTensor& token_weight) {
  const Autocast autocast(kDevice);
  return forward_op()(options, autocast.cast(input), autocast.cast(target), autocast.cast(weight), token_weight);
}

template <c10::DeviceType kDevice>
LossStateAndMetrics with_metrics_autocast(const CrossEntropyOptions& options, const Tensor& input, const Tensor& target,
                                          const OptionalTensor& weight, const OptionalTensor& token_weight) {
  const Autocast autocast(kDevice);
  return with_metrics_op()(options, autocast.cast(input), autocast.cast(target), autocast.cast(weight), token_weight);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("cross_entropy", Flat<&autograd>::call);
  m.impl("cross_entropy_with_metrics", Flat<&with_metrics_autograd>::call);
  for (const char* name : {"_cross_entropy_backward", "cross_entropy_metrics"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) {
  m.impl("cross_entropy", Flat<&by_formula>::call);
  m.impl("cross_entropy_with_metrics", Flat<&with_metrics_by_formula>::call);
}

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) {
  m.impl("cross_entropy", Flat<&autocast<c10::DeviceType::CPU>>::call);
  m.impl("cross_entropy_with_metrics", Flat<&with_metrics_autocast<c10::DeviceType::CPU>>::call);
}

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) {
  m.impl("cross_entropy", Flat<&autocast<c10::DeviceType::CUDA>>::call);
  m.impl("cross_entropy_with_metrics", Flat<&with_metrics_autocast<c10::DeviceType::CUDA>>::call);
}

}  // namespace charlm
