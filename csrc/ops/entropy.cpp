// entropy: the entropy, in nats, of the softmax of each row of logits, from top to bottom.
#include "ops/entropy.h"

#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>

#include <cmath>
#include <tuple>

#include "core/autograd_node.h"
#include "core/checks.h"
#include "core/device.h"

namespace charlm {
namespace {

// (entropy, state): the state [3, N] is what backward needs of each row.
using EntropyAndState = std::tuple<Tensor, Tensor>;
constexpr int64_t kStateRows = 3;

// ---------------------------------------------------------------------------------------------- checks and shapes

void check(const Tensor& logits) {
  TORCH_CHECK(logits.dim() >= 1, "logits must have a dimension of classes, shape (..., V), got a 0-d tensor");
  check_float_dtype(logits, "entropy");
}

EntropyAndState meta_forward(const Tensor& logits) {
  check(logits);
  const auto shape = leading_sizes(logits);
  return {at::empty_symint(shape, logits.options()),
          at::empty_symint({kStateRows, c10::multiply_integers(shape)}, logits.options().dtype(compute_dtype(logits)))};
}

Tensor meta_backward(const Tensor&, const Tensor& logits, const Tensor&) {
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

// ------------------------------------------------------------------------------------------------- implementation

template <class T>
EntropyParams<T> params_of(const Tensor& rows, const Tensor& state) {
  using C = Compute<T>;
  EntropyParams<T> p;
  p.n_rows = rows.size(0);
  p.n_classes = rows.size(1);
  p.logits = const_data<T>(rows);
  p.logits_stride = rows.stride(0);
  p.row_max = state_row<C>(state, 0);
  p.row_sum = state_row<C>(state, 1);
  p.row_distance = state_row<C>(state, 2);
  return p;
}

EntropyAndState forward(const Tensor& logits) {
  check(logits);
  const Device device(logits);
  const Tensor rows = last_dim_as_rows(logits);  // [N, V]
  const Tensor entropy = at::empty_symint(leading_sizes(logits), logits.options());
  const Tensor state = at::empty({kStateRows, rows.size(0)}, logits.options().dtype(compute_dtype(logits)));
  if (rows.size(1) == 0) return {entropy.zero_(), state.zero_()};
  with_float_type(logits.scalar_type(), "entropy", [&]<class T>() {
    EntropyParams<T> p = params_of<T>(rows, state);
    p.entropy = mutable_data<T>(entropy);
    device.run(device.kernels<T>().entropy.forward, p, p.n_rows, p.n_classes);
  });
  return {entropy, state};
}

Tensor backward(const Tensor& grad_output, const Tensor& logits, const Tensor& state) {
  check(logits);
  const Device device(logits);
  const Tensor rows = last_dim_as_rows(logits);
  const int64_t n = rows.size(0);
  TORCH_CHECK(grad_output.numel() == n && grad_output.device() == logits.device(),
              "grad_output must have the shape and device of the entropies of logits of shape ", logits.sizes(),
              ", got ", grad_output.sizes(), " on ", grad_output.device());
  check_state(state, kStateRows, n, logits, "entropy");
  const Tensor grad = device.empty(logits.sizes(), logits.options());
  with_float_type(logits.scalar_type(), "entropy_backward", [&]<class T>() {
    EntropyParams<T> p = params_of<T>(rows, state);
    const Tensor gradient = device.gradient<T>(grad_output, p.grad_output, p.unconverted_grad_output);
    p.grad = mutable_data<T>(grad);
    device.run(device.kernels<T>().entropy.backward, p, p.n_rows, p.n_classes);
  });
  return grad;
}

// ------------------------------------------------------------------------------------------------------- autograd

// torch's own ops, which differentiate to any order. A class with z = -inf adds nothing, and neither does its gradient.
Tensor formula(const Tensor& logits) {
  check(logits);
  const Tensor log_p = logits.to(compute_dtype(logits)).log_softmax(-1);
  const Tensor entropy = -(log_p.exp() * log_p.masked_fill(log_p == -INFINITY, 0)).sum(-1);
  return entropy.to(logits.scalar_type());
}

EntropyAndState formula_and_state(const Tensor& logits) { return {formula(logits), at::empty({0}, logits.options())}; }

struct EntropyNode final : KernelNode<EntropyNode, 2> {
  static constexpr const char* kName = "EntropyBackward";

  static variable_list gradients(const BackwardCall& call) {
    const Tensor logits = call.saved(0);
    if (at::GradMode::is_enabled()) {
      return call.differentiate({logits}, [](const variable_list& in) { return formula(in[0]); });
    }
    static const Op<decltype(charlm::backward)> op("charlm::_entropy_backward");
    return {op(call.grads[0], logits, call.saved(1))};
  }
};

EntropyAndState autograd(const Tensor& logits) {
  if (needs_formula(logits)) return formula_and_state(logits);
  const auto below_autograd = [&] {
    static const Op<decltype(forward)> op("charlm::entropy");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op(logits);
  };
  if (!at::GradMode::is_enabled() || !requires_grad(logits)) return below_autograd();
  const auto node = make_node<EntropyNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(logits));
  auto [entropy, state] = below_autograd();
  node->save(logits, state);
  torch::autograd::set_history(entropy, node);
  return {entropy, state};
}

// In float32, as torch's own log_softmax.
template <c10::DeviceType kDevice>
EntropyAndState autocast(const Tensor& logits) {
  const Autocast autocast(kDevice);
  static const Op<decltype(forward)> op("charlm::entropy");
  return op(autocast.cast(logits));
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(charlm, m) {
  m.def("entropy(Tensor logits) -> (Tensor entropy, Tensor state)");
  m.def("_entropy_backward(Tensor grad_output, Tensor logits, Tensor state) -> Tensor");
  implement(m, "entropy", &forward);
  implement(m, "_entropy_backward", &backward);
}

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("entropy", &meta_forward);
  m.impl("_entropy_backward", &meta_backward);
}

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("entropy", &autograd);
  m.impl("_entropy_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("entropy", &formula_and_state); }
TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { m.impl("entropy", &autocast<c10::DeviceType::CPU>); }
TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { m.impl("entropy", &autocast<c10::DeviceType::CUDA>); }

}  // namespace charlm
