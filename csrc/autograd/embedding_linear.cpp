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

#include "kernel_node.h"

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

struct EmbeddingLinearNode final : KernelNode<EmbeddingLinearNode, 5, int64_t, int64_t, int64_t> {
  static constexpr const char* kName = "EmbeddingLinearBackward";
  enum { kInput, kEmbeddingWeight, kLinearWeight, kLinearBias, kKept };

  static variable_list gradients(const BackwardCall& call, int64_t padding_idx, int64_t activation, int64_t plan) {
    const Tensor input = call.saved(kInput), embedding = call.saved(kEmbeddingWeight);
    const Tensor linear = call.saved(kLinearWeight);
    if (at::GradMode::is_enabled()) {
      raise_recorded_index_error(input);
      return call.differentiate({embedding, linear, call.saved(kLinearBias)}, [&](const variable_list& in) {
        return embedding_linear_formula(input, in[0], in[1], optional_if_defined(in[2]), padding_idx, activation);
      });
    }
    static const auto op = c10::Dispatcher::singleton()
                               .findSchemaOrThrow("charlm::embedding_linear_backward", "")
                               .typed<EmbeddingLinearBackward>();
    auto [grad_embedding, grad_linear, grad_bias] =
        op.call(call.grads[0], input, embedding, linear, call.saved(kKept), padding_idx, activation, plan,
                {call.needs(0), call.needs(1), call.needs(2)});
    return {grad_embedding, grad_linear, grad_bias};
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
  // Detached, or the output would hold the node that holds it; its version counter remains the output's.
  node->save(input, embedding_weight, linear_weight, linear_bias, keeps_input(activation) ? before : output.detach());
  node->options = {padding_idx, activation, plan};
  torch::autograd::set_history(output, node);
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
