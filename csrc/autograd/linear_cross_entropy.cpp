// linear_cross_entropy's derivatives. As for cross_entropy, the forward of a mean or a sum makes the gradients for a
// gradient of the loss of 1 while it has the logits, and the backward hands them over. Whatever else is asked for (a
// second backward, reduction "none", float16) makes the logits again, a block of rows at a time.
#include "../linear_cross_entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/linear.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <mutex>
#include <utility>

#include "cross_entropy_ahead.h"
#include "cross_entropy_formula.h"
#include "node.h"

namespace charlm {
namespace {

Tensor by_formula(const LinearCrossEntropyArguments& a) {
  const Tensor logits = at::linear(a.input, a.linear_weight, a.linear_bias);
  return cross_entropy_formula(a.options, a.unrounded ? logits.to(compute_dtype(logits)) : logits, a.target, a.weight,
                               a.token_weight);
}

void scale_grad_(Tensor& grad, const Tensor& factor) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("charlm::cross_entropy_scale_grad_", "")
                             .typed<void(Tensor&, const Tensor&)>();
  op.call(grad, factor);
}

struct LinearCrossEntropyBackward final : Node {
  LinearCrossEntropyArguments arguments;  // without its tensors
  SavedVariable input, linear_weight, target, linear_bias, weight, token_weight;
  variable_list ready;  // the gradients for a gradient of the loss of 1, if the forward has made them: given away once

  explicit LinearCrossEntropyBackward(const LinearCrossEntropyArguments& a)
      : arguments(a),
        input(a.input, false),
        linear_weight(a.linear_weight, false),
        target(a.target, false),
        linear_bias(tensor_or_undefined(a.linear_bias), false),
        weight(tensor_or_undefined(a.weight), false),
        token_weight(tensor_or_undefined(a.token_weight), false) {
    arguments.input = arguments.linear_weight = arguments.target = Tensor();
    arguments.linear_bias = arguments.weight = arguments.token_weight = std::nullopt;
  }

  std::string name() const override { return "LinearCrossEntropyBackward"; }

  LinearCrossEntropyArguments unpacked() {
    LinearCrossEntropyArguments a = arguments;
    a.input = input.unpack();
    a.linear_weight = linear_weight.unpack();
    a.target = target.unpack();
    a.linear_bias = optional_if_defined(linear_bias.unpack());
    a.weight = optional_if_defined(weight.unpack());
    a.token_weight = optional_if_defined(token_weight.unpack());
    return a;
  }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& grad_loss = grads[0];
    if (!grad_loss.defined()) return variable_list(3);  // input, linear_weight, linear_bias
    variable_list made = std::exchange(ready, {});
    const LinearCrossEntropyArguments a = unpacked();
    if (at::GradMode::is_enabled()) return differentiable(grad_loss, a);

    at::AutoDispatchBelowADInplaceOrView guard;
    if (!made.empty() && is_plain(grad_loss)) {
      for (Tensor& grad : made) {
        if (grad.defined()) scale_grad_(grad, grad_loss);
      }
      return made;
    }
    const OutputMask mask = {task_should_compute_output(0), task_should_compute_output(1),
                             a.linear_bias && task_should_compute_output(2)};
    static const LinearGradientsOp op("charlm::linear_cross_entropy_gradients");
    return only(mask, op(a, grad_loss, mask));
  }

  static variable_list only(OutputMask mask, const LossAndGradients& all) {
    return {mask[0] ? std::get<1>(all) : Tensor(), mask[1] ? std::get<2>(all) : Tensor(),
            mask[2] ? std::get<3>(all) : Tensor()};
  }

  // The backward is itself differentiated: torch's formula, by autograd.
  variable_list differentiable(const Tensor& grad_loss, const LinearCrossEntropyArguments& a) {
    raise_recorded_index_error(a.target);
    const Tensor loss = by_formula(a);
    return differentiable_gradients(*this, loss, grad_loss,
                                    {a.input, a.linear_weight, tensor_or_undefined(a.linear_bias)});
  }

  void release_variables() override {
    for (SavedVariable* saved : {&input, &linear_weight, &target, &linear_bias, &weight, &token_weight}) {
      saved->reset_data();
    }
    ready.clear();
  }
};

Tensor linear_cross_entropy(const LinearCrossEntropyArguments& a) {
  if (needs_formula(a.input) || needs_formula(a.linear_weight) || needs_formula(a.target) ||
      needs_formula(a.linear_bias) || needs_formula(a.weight) || needs_formula(a.token_weight)) {
    return by_formula(a);
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
  const auto node = make_node<LinearCrossEntropyBackward>(a);
  node->set_next_edges(
      torch::autograd::collect_next_edges(a.input, a.linear_weight, tensor_or_undefined(a.linear_bias)));
  Tensor loss;
  {
    at::AutoDispatchBelowADInplaceOrView guard;
    if (may_go_ahead(a.options, a.input)) {
      static const LinearGradientsOp op_with_gradients("charlm::linear_cross_entropy_gradients");
      const LossAndGradients all = op_with_gradients(a, std::nullopt, mask);
      loss = std::get<0>(all);
      node->ready = LinearCrossEntropyBackward::only(mask, all);
    } else {
      loss = op(a);
    }
  }
  torch::autograd::set_history(loss, node);
  return loss;
}

// The product in the dtype of autocast, as torch's linear, and the loss in float32, as torch's cross_entropy_loss.
template <c10::DeviceType kDevice>
Tensor autocast(const LinearCrossEntropyArguments& given) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType dtype = at::autocast::get_autocast_dtype(kDevice);
  const auto cast = [](at::ScalarType to, const OptionalTensor& t) {
    return t ? OptionalTensor(at::autocast::cached_cast(to, *t, kDevice)) : std::nullopt;
  };
  LinearCrossEntropyArguments a = given;
  a.input = *cast(dtype, given.input);
  a.linear_weight = *cast(dtype, given.linear_weight);
  a.linear_bias = cast(dtype, given.linear_bias);
  a.weight = cast(at::kFloat, given.weight);
  a.unrounded = true;
  static const LinearForwardOp op("charlm::linear_cross_entropy");
  return op(a);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("linear_cross_entropy", FlatLinear<&linear_cross_entropy>::call);
  for (const char* name : {"linear_cross_entropy_gradients", "linear_cross_entropy_metrics"}) {
    m.impl(name, torch::autograd::autogradNotImplementedFallback());
  }
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("linear_cross_entropy", FlatLinear<&by_formula>::call); }

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) {
  m.impl("linear_cross_entropy", FlatLinear<&autocast<c10::DeviceType::CPU>>::call);
}

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) {
  m.impl("linear_cross_entropy", FlatLinear<&autocast<c10::DeviceType::CUDA>>::call);
}

}  // namespace charlm
