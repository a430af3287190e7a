// kl_div's derivatives with respect to both distributions, made from them and seven numbers per row.
#include "../kl_div.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <cmath>

#include "kernel_node.h"

namespace charlm {
namespace {

// log p; that of a probability of 0 is -inf without a gradient.
Tensor log_of(const Tensor& x, Distribution kind) {
  if (kind == Distribution::kLogits) return x.log_softmax(-1);
  if (kind == Distribution::kLogProbs) return x;
  const Tensor is_zero = x == 0;
  return x.masked_fill(is_zero, 1).log().masked_fill(is_zero, -INFINITY);
}

// In torch's own ops, which differentiate to any order; where gradients are 0 by decision: cpu/kernels/kl_div_rows.h.
Tensor kl_div_formula(const Tensor& given_p, const Tensor& given_q, int64_t p_number, int64_t q_number) {
  check_kl_div(given_p, given_q, p_number, q_number);
  const auto p_kind = static_cast<Distribution>(p_number), q_kind = static_cast<Distribution>(q_number);
  const Tensor x = given_p.to(row_dtype(given_p));
  Tensor log_p = log_of(x, p_kind), p = p_kind == Distribution::kProbs ? x : log_p.exp();
  const Tensor log_q = log_of(given_q.to(row_dtype(given_q)), q_kind);
  const Tensor absent = log_p == -INFINITY, infinite = absent.logical_not().logical_and(log_q == -INFINITY);
  const Tensor constant = p_kind == Distribution::kLogits ? infinite.any(-1, /*keepdim=*/true) : infinite;
  p = at::where(constant, p.detach(), p);
  log_p = at::where(constant, log_p.detach(), log_p);
  // A NaN of q stays one. Where a p_c > 0 has become 0, infinity times it must not be NaN.
  const Tensor nothing = absent.logical_and(log_q.isnan().logical_not()).logical_or(infinite.logical_and(p == 0));
  const Tensor sum = (p * (log_p.masked_fill(nothing, 0) - log_q.masked_fill(nothing, 0))).sum(-1);
  const Tensor divergence = sum + at::zeros_like(sum).masked_fill(infinite.any(-1), INFINITY);
  return at::where(divergence < 0, divergence - divergence.detach(), divergence).to(given_p.scalar_type());
}

struct KlDivNode final : KernelNode<KlDivNode, 3, int64_t, int64_t> {
  static constexpr const char* kName = "KlDivBackward";

  static variable_list gradients(const BackwardCall& call, int64_t p_kind, int64_t q_kind) {
    const Tensor p = call.saved(0), q = call.saved(1);
    if (at::GradMode::is_enabled()) {
      return call.differentiate({p, q},
                                [&](const variable_list& in) { return kl_div_formula(in[0], in[1], p_kind, q_kind); });
    }
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("charlm::kl_div_backward", "").typed<KlDivBackward>();
    auto [p_grad, q_grad] = op.call(call.grads[0], p, q, call.saved(2), p_kind, q_kind, {call.needs(0), call.needs(1)});
    return {p_grad, q_grad};
  }
};

std::tuple<Tensor, Tensor> by_formula(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  return {kl_div_formula(p, q, p_kind, q_kind), at::empty({0}, p.options())};
}

std::tuple<Tensor, Tensor> kl_div(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  if (needs_formula(p) || needs_formula(q)) return by_formula(p, q, p_kind, q_kind);
  const auto below_autograd = [&] {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("charlm::kl_div", "").typed<KlDivForward>();
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(p, q, p_kind, q_kind);
  };
  if (!at::GradMode::is_enabled() || !(requires_grad(p) || requires_grad(q))) return below_autograd();
  const auto node = make_node<KlDivNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(p, q));
  auto [output, state] = below_autograd();
  node->save(p, q, state);
  node->options = {p_kind, q_kind};
  torch::autograd::set_history(output, node);
  return {output, state};
}

// In float32, as torch's own kl_div is.
template <c10::DeviceType kDevice>
std::tuple<Tensor, Tensor> autocast(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto cast = [](const Tensor& t) { return at::autocast::cached_cast(at::kFloat, t, kDevice); };
  static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("charlm::kl_div", "").typed<KlDivForward>();
  return op.call(cast(p), cast(q), p_kind, q_kind);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("kl_div", &kl_div);
  m.impl("kl_div_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("kl_div", &by_formula); }

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { m.impl("kl_div", &autocast<c10::DeviceType::CPU>); }

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { m.impl("kl_div", &autocast<c10::DeviceType::CUDA>); }

}  // namespace charlm
