// embedding_linear: act(linear(embedding(input).flatten(-2), linear_weight, linear_bias)): schema, checks, shapes and
// autograd. Backward needs the indices and the activation's output or (gelu) input: nothing of size [N, T, D] is kept.
// The implementations stand in ops/embedding_linear_cpu.cpp and ops/embedding_linear_gpu.cpp.
#include "ops/embedding_linear.h"

#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/gelu.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/relu.h>

#include "core/autograd_node.h"
#include "core/checks.h"
#include "ops/embedding_linear_impl.h"

namespace charlm {
namespace {

using OutputAndBefore = std::tuple<Tensor, Tensor>;
using Gradients = EmbeddingLinearGradients;

// ---------------------------------------------------------------------------------------------- checks and shapes

void check(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
           const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation, int64_t plan) {
  check_index_dtype(input, "input");
  TORCH_CHECK(input.dim() >= 1, "input must have a dimension of places, shape (..., T), got a 0-d tensor");
  TORCH_CHECK(embedding_weight.dim() == 2, "embedding_weight must be 2-D, (V, D), got shape ",
              embedding_weight.sym_sizes());
  TORCH_CHECK(linear_weight.dim() == 2, "linear_weight must be 2-D, (H, T * D), got shape ", linear_weight.sym_sizes());
  const c10::SymInt places = input.sym_size(-1), dim = embedding_weight.sym_size(1);
  TORCH_CHECK(linear_weight.sym_size(1) == places * dim, "linear_weight must have T * D = ", places, " * ", dim, " = ",
              places * dim, " columns for an input of shape ", input.sym_sizes(), " and an embedding_weight of shape ",
              embedding_weight.sym_sizes(), ", got shape ", linear_weight.sym_sizes());
  check_float_dtype(embedding_weight, "embedding_linear");
  TORCH_CHECK(linear_weight.scalar_type() == embedding_weight.scalar_type(),
              "embedding_weight and linear_weight must have the same dtype, got ", embedding_weight.scalar_type(),
              " and ", linear_weight.scalar_type());
  check_same_device(embedding_weight, "embedding_weight", input, "input");
  check_same_device(embedding_weight, "embedding_weight", linear_weight, "linear_weight");
  if (linear_bias) {
    TORCH_CHECK(linear_bias->dim() == 1 && linear_bias->sym_size(0) == linear_weight.sym_size(0),
                "linear_bias must have shape [", linear_weight.sym_size(0), "] for a linear_weight of shape ",
                linear_weight.sym_sizes(), ", got shape ", linear_bias->sym_sizes());
    TORCH_CHECK(linear_bias->scalar_type() == linear_weight.scalar_type(),
                "linear_weight and linear_bias must have the same dtype, got ", linear_weight.scalar_type(), " and ",
                linear_bias->scalar_type());
    check_same_device(embedding_weight, "embedding_weight", *linear_bias, "linear_bias");
  }
  TORCH_CHECK(padding_idx >= -1, "padding_idx must be a row, or -1 for none, got ", padding_idx);
  TORCH_CHECK(activation >= 0 && activation <= 3, "activation must be 0, 1, 2 or 3, got ", activation);
  TORCH_CHECK(plan >= 0 && plan <= 2, "plan must be 0, 1 or 2, got ", plan);
}

void check_gradient(const Tensor& grad_output, const Tensor& kept, const Tensor& input, const Tensor& linear_weight) {
  const at::ScalarType dtype = linear_weight.scalar_type();
  check_same_device(linear_weight, "linear_weight", grad_output, "grad_output");
  check_same_device(linear_weight, "linear_weight", kept, "kept");
  TORCH_CHECK(grad_output.sizes() == kept.sizes() && grad_output.numel() == n_contexts(input) * linear_weight.size(0) &&
                  grad_output.scalar_type() == dtype && kept.scalar_type() == dtype,
              "grad_output and kept must have the shape and dtype of the output, got ", grad_output.sizes(), " and ",
              kept.sizes());
}

c10::SymDimVector output_shape(const Tensor& input, const Tensor& linear_weight) {
  c10::SymDimVector shape(input.sym_sizes().begin(), input.sym_sizes().end());
  shape.back() = linear_weight.sym_size(0);
  return shape;
}

OutputAndBefore meta_forward(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                             const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation, int64_t plan) {
  check(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
  const auto shape = output_shape(input, linear_weight);
  const auto options = embedding_weight.options();
  return {at::empty_symint(shape, options), keeps_input(static_cast<Activation>(activation))
                                                ? at::empty_symint(shape, options)
                                                : at::empty({0}, options)};
}

Gradients meta_backward(const Tensor&, const Tensor&, const Tensor& embedding_weight, const Tensor& linear_weight,
                        const Tensor&, int64_t, int64_t, int64_t, std::array<bool, 3> output_mask) {
  const auto options = embedding_weight.options();
  Tensor grads[3];
  if (output_mask[0]) grads[0] = at::empty_symint(embedding_weight.sym_sizes(), options);
  if (output_mask[1]) grads[1] = at::empty_symint(linear_weight.sym_sizes(), options);
  if (output_mask[2]) grads[2] = at::empty_symint({linear_weight.sym_size(0)}, options);
  return {grads[0], grads[1], grads[2]};
}

// ------------------------------------------------------------------------------------------------- implementation

OutputAndBefore forward(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                        const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation, int64_t plan) {
  check(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
  const Device device(input);
  const auto act = static_cast<Activation>(activation);
  return device.is_gpu() ? embedding_linear_on_gpu(device, input, embedding_weight, linear_weight, linear_bias, act,
                                                   static_cast<Plan>(plan))
                         : embedding_linear_on_cpu(input, embedding_weight, linear_weight, linear_bias, act,
                                                   static_cast<Plan>(plan));
}

Gradients backward(const Tensor& grad_output, const Tensor& input, const Tensor& embedding_weight,
                   const Tensor& linear_weight, const Tensor& kept, int64_t padding_idx, int64_t activation,
                   int64_t plan, std::array<bool, 3> output_mask) {
  check(input, embedding_weight, linear_weight, {}, padding_idx, activation, plan);
  check_gradient(grad_output, kept, input, linear_weight);
  const Device device(input);
  const auto act = static_cast<Activation>(activation);
  return device.is_gpu()
             ? embedding_linear_backward_on_gpu(device, grad_output, input, embedding_weight, linear_weight, kept,
                                                padding_idx, act, static_cast<Plan>(plan), output_mask)
             : embedding_linear_backward_on_cpu(grad_output, input, embedding_weight, linear_weight, kept, padding_idx,
                                                act, static_cast<Plan>(plan), output_mask);
}

// ------------------------------------------------------------------------------------------------------- autograd

// torch's own ops, which differentiate to any order.
Tensor formula(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
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
        return formula(input, in[0], in[1], optional_if_defined(in[2]), padding_idx, activation);
      });
    }
    static const Op<decltype(charlm::backward)> op("charlm::_embedding_linear_backward");
    auto [grad_embedding, grad_linear, grad_bias] =
        op(call.grads[0], input, embedding, linear, call.saved(kKept), padding_idx, activation, plan,
           {call.needs(0), call.needs(1), call.needs(2)});
    return {grad_embedding, grad_linear, grad_bias};
  }
};

OutputAndBefore formula_and_before(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                                   const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation,
                                   int64_t plan) {
  check(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
  return {formula(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation),
          at::empty({0}, embedding_weight.options())};
}

OutputAndBefore autograd(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                         const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation, int64_t plan) {
  if (any_needs_formula(input, embedding_weight, linear_weight, linear_bias)) {
    return formula_and_before(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
  }
  const auto below_autograd = [&] {
    static const Op<decltype(forward)> op("charlm::embedding_linear");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op(input, embedding_weight, linear_weight, linear_bias, padding_idx, activation, plan);
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
  node->save(input, embedding_weight, linear_weight, linear_bias,
             keeps_input(static_cast<Activation>(activation)) ? before : output.detach());
  node->options = {padding_idx, activation, plan};
  torch::autograd::set_history(output, node);
  return {output, before};
}

// In the dtype in which autocast runs torch's own linear layers.
template <c10::DeviceType kDevice>
OutputAndBefore autocast(const Tensor& input, const Tensor& embedding_weight, const Tensor& linear_weight,
                         const OptionalTensor& linear_bias, int64_t padding_idx, int64_t activation, int64_t plan) {
  const Autocast autocast(kDevice);
  const at::ScalarType dtype = at::autocast::get_lower_precision_fp_from_device_type(kDevice);
  static const Op<decltype(forward)> op("charlm::embedding_linear");
  return op(input, autocast.cast(embedding_weight, dtype), autocast.cast(linear_weight, dtype),
            autocast.cast(linear_bias, dtype), padding_idx, activation, plan);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(charlm, m) {
  // `before`: the activation's input where its derivative needs it, else an empty tensor.
  m.def(
      "embedding_linear(Tensor input, Tensor embedding_weight, Tensor linear_weight, Tensor? linear_bias, "
      "int padding_idx, int activation, int plan) -> (Tensor output, Tensor before)");
  m.def(
      "_embedding_linear_backward(Tensor grad_output, Tensor input, Tensor embedding_weight, Tensor linear_weight, "
      "Tensor kept, int padding_idx, int activation, int plan, bool[3] output_mask) -> (Tensor, Tensor, Tensor)");
  implement(m, "embedding_linear", &forward);
  implement(m, "_embedding_linear_backward", &backward);
}

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("embedding_linear", &meta_forward);
  m.impl("_embedding_linear_backward", &meta_backward);
}

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("embedding_linear", &autograd);
  m.impl("_embedding_linear_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("embedding_linear", &formula_and_before); }
TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { m.impl("embedding_linear", &autocast<c10::DeviceType::CPU>); }
TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { m.impl("embedding_linear", &autocast<c10::DeviceType::CUDA>); }

}  // namespace charlm
