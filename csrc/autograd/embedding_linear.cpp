// embedding_linear's derivative: of the embedding, the linear weight and its bias, made from the indices and what the
// activation's derivative needs, its output or (gelu) its input; nothing of the size [N, T, D] is kept.
#include "../embedding_linear.h"

#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "node.h"

namespace charlm {
namespace {

// In torch's own ops, which differentiate to any order.
Tensor embedding_linear_formula(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                                const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation) {
  const Tensor rows = at::embedding(embedding_weight, input.to(at::kLong), padding_idx).flatten(-2);
  const Tensor sums = at::linear(rows, linear_weight, linear_bias);
  switch (static_cast<Activation>(activation)) {
    case Activation::kTanh:
      return sums.tanh();
    case Activation::kRelu:
      return sums.relu();
    case Activation::kGelu:
      return at::gelu(sums);
    default:
      return sums;
  }
}

struct EmbeddingLinearNode final : Node {
  SavedVariable input, embedding_weight, linear_weight, linear_bias, kept;
  int64_t padding_idx = -1, activation = 0, plan = 0;

  std::string name() const override { return "EmbeddingLinearBackward"; }

  variable_list apply(variable_list&& grads) override {
    std::lock_guard<std::mutex> lock(mutex_);
    const Tensor& grad_output = grads[0];
    if (!grad_output.defined()) return variable_list(3);
    const std::array<bool, 3> needs = {task_should_compute_output(0), task_should_compute_output(1),
                                       task_should_compute_output(2)};
    const Tensor x = input.unpack(), embedding = embedding_weight.unpack(), linear = linear_weight.unpack();
    if (at::GradMode::is_enabled()) return differentiable(grad_output, x, embedding, linear);
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("charlm::embedding_linear_backward", "")
                               .typed<EmbeddingLinearBackward>();
    auto [grad_embedding, grad_linear, grad_bias] =
        op.call(grad_output, x, embedding, linear, kept.unpack(), padding_idx, activation, plan, needs);
    return {grad_embedding, grad_linear, grad_bias};
  }

  // The backward is itself differentiated.
  variable_list differentiable(const Tensor& grad_output, const Tensor& x, const Tensor& embedding,
                               const Tensor& linear) {
    raise_recorded_index_error(x);
    const OptionalTensor bias = optional_if_defined(linear_bias.unpack());
    const Tensor output = embedding_linear_formula(x, embedding, linear, bias, padding_idx, activation);
    return differentiable_gradients(*this, output, grad_output, {embedding, linear, tensor_or_undefined(bias)});
  }

  void release_variables() override {
    for (SavedVariable* saved : {&input, &embedding_weight, &linear_weight, &linear_bias, &kept}) saved->reset_data();
  }
};

std::tuple<Tensor, Tensor> by_formula(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                                      const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation,
                                      int64_t plan) {
  check_embedding_linear(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
  return {embedding_linear_formula(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation),
          at::empty({0}, embedding_weight.options())};
}

std::tuple<Tensor, Tensor> embedding_linear(const Tensor& input, const Tensor& embedding_weight,
                                            const Tensor& linear_weight, const OptionalTensor& linear_bias,
                                            int64_t padding_idx, int64_t activation, int64_t plan) {
  if (needs_formula(input) || needs_formula(embedding_weight) || needs_formula(linear_weight) ||
      needs_formula(linear_bias)) {
    return by_formula(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
  }
  const auto below_autograd = [&] {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("charlm::embedding_linear", "").typed<EmbeddingLinearForward>();
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
  };
  if (!at::GradMode::is_enabled() ||
      !(requires_grad(embedding_weight) || requires_grad(linear_weight) || requires_grad(linear_bias))) {
    return below_autograd();
  }
  const auto node = make_node<EmbeddingLinearNode>();
  node->set_next_edges(
      torch::autograd::collect_next_edges(embedding_weight, linear_weight, tensor_or_undefined(linear_bias)));
  auto [output, before] = below_autograd();
  node->input = SavedVariable(input, false);
  node->embedding_weight = SavedVariable(embedding_weight, false);
  node->linear_weight = SavedVariable(linear_weight, false);
  if (linear_bias) node->linear_bias = SavedVariable(*linear_bias, false);
  node->padding_idx = padding_idx;
  node->activation = activation;
  node->plan = plan;
  torch::autograd::set_history(output, node);
  // Detached, or the output would hold the node that holds it; its version counter remains the output's.
  node->kept = SavedVariable(keeps_input(activation) ? before : output.detach(), false);
  return {output, before};
}

// In the dtype in which autocast runs torch's own linear layers.
template <c10::DeviceType kDevice>
std::tuple<Tensor, Tensor> autocast(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                                    const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation,
                                    int64_t plan) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const at::ScalarType dtype = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  const auto cast = [&](const Tensor& t) { return at::autocast::cached_cast(dtype, t, kDevice); };
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("charlm::embedding_linear", "").typed<EmbeddingLinearForward>();
  return op.call(input, cast(embedding_weight), cast(linear_weight),
                 linear_bias ? OptionalTensor(cast(*linear_bias)) : std::nullopt, padding_idx, activation, plan);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("embedding_linear", &embedding_linear);
  m.impl("embedding_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("embedding_linear", &by_formula); }

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { m.impl("embedding_linear", &autocast<c10::DeviceType::CPU>); }

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { m.impl("embedding_linear", &autocast<c10::DeviceType::CUDA>); }

}  // namespace charlm
