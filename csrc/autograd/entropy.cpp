// entropy's derivative, made from the logits and three numbers per row.
#include "../entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cmath>

#include "kernel_node.h"

namespace charlm {
namespace {

// In torch's own ops, which differentiate to any order. A class of z = -inf adds nothing, its gradient neither.
Tensor entropy_formula(const Tensor& logits) {
  check_entropy(logits);
  const Tensor log_p = logits.to(row_dtype(logits)).log_softmax(-1);
  const Tensor entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INFINITY, 0)).sum(-1);
  return entropy.to(logits.scalar_type());
}

struct EntropyNode final : KernelNode<EntropyNode, 2> {
  static constexpr const char* kName = "EntropyBackward";

  static variable_list gradients(const BackwardCall& call) {
    const Tensor logits = call.saved(0);
    if (at::GradMode::is_enabled()) {
      return call.differentiate({logits}, [](const variable_list& in) { return entropy_formula(in[0]); });
    }
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("charlm::entropy_backward", "").typed<EntropyBackward>();
    return {op.call(call.grads[0], logits, call.saved(1))};
  }
};

std::tuple<Tensor, Tensor> by_formula(const Tensor& logits) {
  return {entropy_formula(logits), at::empty({0}, logits.options())};
}

std::tuple<Tensor, Tensor> entropy(const Tensor& logits) {
  if (needs_formula(logits)) return by_formula(logits);
  const auto below_autograd = [&] {
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("charlm::entropy", "").typed<EntropyForward>();
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(logits);
  };
  if (!at::GradMode::is_enabled() || !requires_grad(logits)) return below_autograd();
  const auto node = make_node<EntropyNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(logits));
  auto [output, state] = below_autograd();
  node->save(logits, state);
  torch::autograd::set_history(output, node);
  return {output, state};
}

// In float32, as torch's own log_softmax is.
template <c10::DeviceType kDevice>
std::tuple<Tensor, Tensor> autocast(const Tensor& logits) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("charlm::entropy", "").typed<EntropyForward>();
  return op.call(at::autocast::cached_cast(at::kFloat, logits, kDevice));
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("entropy", &entropy);
  m.impl("entropy_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("entropy", &by_formula); }

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { m.impl("entropy", &autocast<c10::DeviceType::CPU>); }

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { m.impl("entropy", &autocast<c10::DeviceType::CUDA>); }

}  // namespace charlm
