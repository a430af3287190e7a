// kl_divergence, the op charlm::kl_div: the divergence KL(P || Q), in nats, of rows of distributions, from top to
// bottom. The caller has broadcast p and q, and given them one dtype.
#include "ops/kl_divergence.h"

#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <array>
#include <cmath>
#include <tuple>

#include "core/autograd_node.h"
#include "core/checks.h"
#include "core/device.h"

namespace charlm {
namespace {

// (divergence, state): the state [7, N] is what backward needs of each row.
using DivergenceAndState = std::tuple<Tensor, Tensor>;
constexpr int64_t kStateRows = 7;
using Gradients = std::tuple<Tensor, Tensor>;

// ---------------------------------------------------------------------------------------------- checks and shapes

void check(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  TORCH_CHECK(p.dim() >= 1 && q.dim() >= 1, "p and q must have a dimension of classes, shape (..., V), got shapes ",
              p.sym_sizes(), " and ", q.sym_sizes());
  TORCH_CHECK(p.sym_sizes() == q.sym_sizes(), "p and q must have one shape here, got ", p.sym_sizes(), " and ",
              q.sym_sizes());
  check_float_dtype(p, "kl_divergence");
  TORCH_CHECK(p.scalar_type() == q.scalar_type(), "p and q must have the same dtype, got ", p.scalar_type(), " and ",
              q.scalar_type());
  check_same_device(p, "p", q, "q");
  TORCH_CHECK(p_kind >= 0 && p_kind <= 2 && q_kind >= 0 && q_kind <= 2, "p_kind and q_kind must be 0, 1 or 2, got ",
              p_kind, " and ", q_kind);
}

DivergenceAndState meta_forward(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  check(p, q, p_kind, q_kind);
  const auto shape = leading_sizes(p);
  return {at::empty_symint(shape, p.options()),
          at::empty_symint({kStateRows, c10::multiply_integers(shape)}, p.options().dtype(compute_dtype(p)))};
}

Gradients meta_backward(const Tensor&, const Tensor& p, const Tensor& q, const Tensor&, int64_t, int64_t,
                        std::array<bool, 2> output_mask) {
  Tensor p_grad, q_grad;
  if (output_mask[0]) p_grad = at::empty_symint(p.sym_sizes(), p.options());
  if (output_mask[1]) q_grad = at::empty_symint(q.sym_sizes(), q.options());
  return {p_grad, q_grad};
}

// ------------------------------------------------------------------------------------------------- implementation

template <class T>
KlDivergenceParams<T> params_of(const Tensor& p_rows, const Tensor& q_rows, const Tensor& state, int64_t p_kind,
                                int64_t q_kind) {
  using C = Compute<T>;
  KlDivergenceParams<T> params;
  params.n_rows = p_rows.size(0);
  params.n_classes = p_rows.size(1);
  params.p_kind = static_cast<Distribution>(p_kind);
  params.q_kind = static_cast<Distribution>(q_kind);
  params.p = const_data<T>(p_rows);
  params.p_stride = p_rows.stride(0);
  params.q = const_data<T>(q_rows);
  params.q_stride = q_rows.stride(0);
  params.p_max = state_row<C>(state, 0);
  params.p_sum = state_row<C>(state, 1);
  params.q_max = state_row<C>(state, 2);
  params.q_sum = state_row<C>(state, 3);
  params.mass = state_row<C>(state, 4);
  params.centre = state_row<C>(state, 5);
  params.offset = state_row<C>(state, 6);
  return params;
}

DivergenceAndState forward(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  check(p, q, p_kind, q_kind);
  const Device device(p);
  const Tensor p_rows = last_dim_as_rows(p), q_rows = last_dim_as_rows(q);  // [N, V]
  const Tensor divergence = at::empty_symint(leading_sizes(p), p.options());
  const Tensor state = at::empty({kStateRows, p_rows.size(0)}, p.options().dtype(compute_dtype(p)));
  if (p_rows.size(1) == 0) return {divergence.zero_(), state.zero_()};
  with_float_type(p.scalar_type(), "kl_divergence", [&]<class T>() {
    KlDivergenceParams<T> params = params_of<T>(p_rows, q_rows, state, p_kind, q_kind);
    params.output = mutable_data<T>(divergence);
    device.run(device.kernels<T>().kl_divergence.forward, params, params.n_rows, 2 * params.n_classes);
  });
  return {divergence, state};
}

Gradients backward(const Tensor& grad_output, const Tensor& p, const Tensor& q, const Tensor& state, int64_t p_kind,
                   int64_t q_kind, std::array<bool, 2> output_mask) {
  check(p, q, p_kind, q_kind);
  const Device device(p);
  const Tensor p_rows = last_dim_as_rows(p), q_rows = last_dim_as_rows(q);
  const int64_t n = p_rows.size(0);
  TORCH_CHECK(grad_output.numel() == n && grad_output.device() == p.device(),
              "grad_output must have the shape and device of the divergences of distributions of shape ", p.sizes(),
              ", got ", grad_output.sizes(), " on ", grad_output.device());
  check_state(state, kStateRows, n, p, "kl_divergence");
  Tensor p_grad, q_grad;
  if (output_mask[0]) p_grad = device.empty(p.sizes(), p.options());
  if (output_mask[1]) q_grad = device.empty(q.sizes(), q.options());
  with_float_type(p.scalar_type(), "kl_divergence_backward", [&]<class T>() {
    KlDivergenceParams<T> params = params_of<T>(p_rows, q_rows, state, p_kind, q_kind);
    const Tensor gradient = device.gradient<T>(grad_output, params.grad_output, params.unconverted_grad_output);
    if (p_grad.defined()) params.p_grad = mutable_data<T>(p_grad);
    if (q_grad.defined()) params.q_grad = mutable_data<T>(q_grad);
    device.run(device.kernels<T>().kl_divergence.backward, params, params.n_rows, 2 * params.n_classes);
  });
  return {p_grad, q_grad};
}

// ------------------------------------------------------------------------------------------------------- autograd

// log p; that of a probability of 0 is -inf without a gradient.
Tensor log_of(const Tensor& x, Distribution kind) {
  if (kind == Distribution::kLogits) return x.log_softmax(-1);
  if (kind == Distribution::kLogProbs) return x;
  const Tensor is_zero = x == 0;
  return x.masked_fill(is_zero, 1).log().masked_fill(is_zero, -INFINITY);
}

// torch's own ops, which differentiate to any order. Where gradients are 0 by decision: ops/kl_divergence.h.
Tensor formula(const Tensor& given_p, const Tensor& given_q, int64_t p_number, int64_t q_number) {
  check(given_p, given_q, p_number, q_number);
  const auto p_kind = static_cast<Distribution>(p_number), q_kind = static_cast<Distribution>(q_number);
  const Tensor x = given_p.to(compute_dtype(given_p));
  Tensor log_p = log_of(x, p_kind), p = p_kind == Distribution::kProbs ? x : log_p.exp();
  const Tensor log_q = log_of(given_q.to(compute_dtype(given_q)), q_kind);
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

DivergenceAndState formula_and_state(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  return {formula(p, q, p_kind, q_kind), at::empty({0}, p.options())};
}

struct KlDivergenceNode final : KernelNode<KlDivergenceNode, 3, int64_t, int64_t> {
  static constexpr const char* kName = "KlDivergenceBackward";

  static variable_list gradients(const BackwardCall& call, int64_t p_kind, int64_t q_kind) {
    const Tensor p = call.saved(0), q = call.saved(1);
    if (at::GradMode::is_enabled()) {
      return call.differentiate({p, q}, [&](const variable_list& in) { return formula(in[0], in[1], p_kind, q_kind); });
    }
    static const Op<decltype(charlm::backward)> op("charlm::_kl_div_backward");
    auto [p_grad, q_grad] = op(call.grads[0], p, q, call.saved(2), p_kind, q_kind, {call.needs(0), call.needs(1)});
    return {p_grad, q_grad};
  }
};

DivergenceAndState autograd(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  if (needs_formula(p) || needs_formula(q)) return formula_and_state(p, q, p_kind, q_kind);
  const auto below_autograd = [&] {
    static const Op<decltype(forward)> op("charlm::kl_div");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op(p, q, p_kind, q_kind);
  };
  if (!at::GradMode::is_enabled() || !(requires_grad(p) || requires_grad(q))) return below_autograd();
  const auto node = make_node<KlDivergenceNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(p, q));
  auto [divergence, state] = below_autograd();
  node->save(p, q, state);
  node->options = {p_kind, q_kind};
  torch::autograd::set_history(divergence, node);
  return {divergence, state};
}

// In float32, as torch's own kl_div.
template <c10::DeviceType kDevice>
DivergenceAndState autocast(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  const Autocast autocast(kDevice);
  static const Op<decltype(forward)> op("charlm::kl_div");
  return op(autocast.cast(p), autocast.cast(q), p_kind, q_kind);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(charlm, m) {
  // Kinds: 0 logits, 1 log-probabilities, 2 probabilities.
  m.def("kl_div(Tensor p, Tensor q, int p_kind, int q_kind) -> (Tensor divergence, Tensor state)");
  m.def(
      "_kl_div_backward(Tensor grad_output, Tensor p, Tensor q, Tensor state, int p_kind, int q_kind, "
      "bool[2] output_mask) -> (Tensor, Tensor)");
  implement(m, "kl_div", &forward);
  implement(m, "_kl_div_backward", &backward);
}

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("kl_div", &meta_forward);
  m.impl("_kl_div_backward", &meta_backward);
}

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("kl_div", &autograd);
  m.impl("_kl_div_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("kl_div", &formula_and_state); }
TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { m.impl("kl_div", &autocast<c10::DeviceType::CPU>); }
TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { m.impl("kl_div", &autocast<c10::DeviceType::CUDA>); }

}  // namespace charlm
