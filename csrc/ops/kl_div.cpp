// kl_div, the op charlm::pointwise_kl_div: torch.nn.functional.kl_div in one pass over input and target, which the
// caller has broadcast and promoted. With `reduce` the result is the sum divided by `divisor`.
#include "ops/kl_div.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>

#include <array>
#include <atomic>
#include <tuple>

#include "core/autograd_node.h"
#include "core/checks.h"
#include "core/device.h"

namespace charlm {
namespace {

using Forward = Tensor(const Tensor&, const Tensor&, bool, bool, c10::SymInt);
using Gradients = std::tuple<Tensor, Tensor>;
using Backward = Gradients(const Tensor&, const Tensor&, const Tensor&, bool, bool, c10::SymInt, std::array<bool, 2>);

// ---------------------------------------------------------------------------------------------- checks and shapes

void check(const Tensor& input, const Tensor& target) {
  TORCH_CHECK(input.sym_sizes() == target.sym_sizes(), "input and target must have one shape here, got ",
              input.sym_sizes(), " and ", target.sym_sizes());
  check_float_dtype(input, "kl_div");
  TORCH_CHECK(input.scalar_type() == target.scalar_type(), "input and target must have the same dtype, got ",
              input.scalar_type(), " and ", target.scalar_type());
  check_same_device(input, "input", target, "target");
}

Tensor meta_forward(const Tensor& input, const Tensor& target, bool, bool reduce, c10::SymInt) {
  check(input, target);
  return at::empty_symint(reduce ? c10::SymIntArrayRef() : input.sym_sizes(), input.options());
}

Gradients meta_backward(const Tensor&, const Tensor& input, const Tensor&, bool, bool, c10::SymInt,
                        std::array<bool, 2> output_mask) {
  const auto gradient = [&](bool needed) {
    return needed ? at::empty_symint(input.sym_sizes(), input.options()) : Tensor();
  };
  return {gradient(output_mask[0]), gradient(output_mask[1])};
}

// ------------------------------------------------------------------------------------------------- implementation

template <class T>
KlDivParams<T> params_of(const Tensor& input, const Tensor& target, bool log_target) {
  KlDivParams<T> p;
  p.n = input.numel();
  p.log_target = log_target;
  p.input = const_data<T>(input);
  p.target = const_data<T>(target);
  return p;
}

// An input above the rounding errors of log_softmax's zero is the logarithm of no probability.
bool is_positive(double largest, at::ScalarType dtype) {
  const double epsilon = dtype == at::kDouble  ? 0x1p-52
                         : dtype == at::kFloat ? 0x1p-23
                         : dtype == at::kHalf  ? 0x1p-10
                                               : 0x1p-7;
  return largest > 16 * epsilon;
}

Tensor forward(const Tensor& given_input, const Tensor& given_target, bool log_target, bool reduce,
               c10::SymInt divisor) {
  check(given_input, given_target);
  const Device device(given_input);
  const Tensor input = given_input.contiguous(), target = given_target.contiguous();
  const Tensor output = reduce ? at::empty({}, input.options()) : device.empty(input.sizes(), input.options());
  if (!reduce && input.numel() == 0) return output;
  std::atomic<bool> has_positive = false;
  with_float_type(input.scalar_type(), "kl_div", [&]<class T>() {
    KlDivParams<T> p = params_of<T>(input, target, log_target);
    if (!reduce) p.output = mutable_data<T>(output);
    const Kernel<KlDivParams<T>> kernel = device.kernels<T>().kl_div.forward;
    if (device.is_gpu()) {
      if (reduce) p.total = mutable_data<T>(output);
      p.divisor = static_cast<double>(divisor.expect_int());
      device.run_on_gpu(kernel, p, kKlDivWorkspace * sizeof(Compute<T>));
      return;
    }
    const double sum = Device::sum_on_cpu(kernel, p, p.n, 1, 0, [&](const Launch& launch) {
      if (is_positive(launch.largest, input.scalar_type())) has_positive = true;
    });
    if (reduce) output.fill_(sum / static_cast<double>(divisor.expect_int()));
  });
  if (has_positive) {
    TORCH_WARN_ONCE(
        "kl_div: input holds a value > 0, which is the logarithm of no probability. input must hold "
        "log-probabilities, such as log_softmax gives; charlm.functional.kl_divergence takes logits and "
        "probabilities.");
  }
  return output;
}

Gradients backward(const Tensor& given_grad, const Tensor& given_input, const Tensor& given_target, bool log_target,
                   bool reduce, c10::SymInt divisor, std::array<bool, 2> output_mask) {
  check(given_input, given_target);
  TORCH_CHECK(reduce ? given_grad.numel() == 1 : given_grad.sizes() == given_input.sizes(),
              "grad_output must have the shape of the output, got ", given_grad.sizes());
  check_same_device(given_input, "input", given_grad, "grad_output");
  const Device device(given_input);
  const Tensor input = given_input.contiguous(), target = given_target.contiguous();
  Tensor grad_input, grad_target;
  if (output_mask[0]) grad_input = device.empty(input.sizes(), input.options());
  if (output_mask[1]) grad_target = device.empty(input.sizes(), input.options());
  with_float_type(input.scalar_type(), "kl_div_backward", [&]<class T>() {
    using C = Compute<T>;
    KlDivParams<T> p = params_of<T>(input, target, log_target);
    const Tensor gradient = device.gradient<T>(given_grad, p.grad_output, p.unconverted_grad_output);
    p.grad_stride = reduce ? 0 : 1;
    p.factor = reduce ? static_cast<C>(1.0 / static_cast<double>(divisor.expect_int())) : C(1);
    if (grad_input.defined()) p.grad_input = mutable_data<T>(grad_input);
    if (grad_target.defined()) p.grad_target = mutable_data<T>(grad_target);
    device.run(device.kernels<T>().kl_div.backward, p, p.n, 1);
  });
  return {grad_input, grad_target};
}

// ------------------------------------------------------------------------------------------------------- autograd

// torch's own ops, which differentiate to any order.
Tensor formula(const Tensor& input, const Tensor& target, bool log_target, bool reduce, c10::SymInt divisor) {
  check(input, target);
  const Tensor result = at::kl_div(input, target, reduce ? at::Reduction::Sum : at::Reduction::None, log_target);
  return reduce ? result.div(at::Scalar(divisor.guard_int(__FILE__, __LINE__))) : result;
}

struct KlDivNode final : KernelNode<KlDivNode, 2, bool, bool, c10::SymInt> {
  static constexpr const char* kName = "KlDivBackward";

  static variable_list gradients(const BackwardCall& call, bool log_target, bool reduce, c10::SymInt divisor) {
    const Tensor input = call.saved(0), target = call.saved(1);
    if (at::GradMode::is_enabled()) {
      return call.differentiate(
          {input, target}, [&](const variable_list& in) { return formula(in[0], in[1], log_target, reduce, divisor); });
    }
    static const Op<Backward> op("charlm::_pointwise_kl_div_backward");
    auto [grad_input, grad_target] =
        op(call.grads[0], input, target, log_target, reduce, divisor, {call.needs(0), call.needs(1)});
    return {grad_input, grad_target};
  }
};

Tensor call(const Tensor& input, const Tensor& target, bool log_target, bool reduce, c10::SymInt divisor) {
  static const Op<Forward> op("charlm::pointwise_kl_div");
  return op(input, target, log_target, reduce, divisor);
}

Tensor autograd(const Tensor& input, const Tensor& target, bool log_target, bool reduce, c10::SymInt divisor) {
  if (needs_formula(input) || needs_formula(target)) return formula(input, target, log_target, reduce, divisor);
  const auto below_autograd = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(input, target, log_target, reduce, divisor);
  };
  if (!at::GradMode::is_enabled() || !(requires_grad(input) || requires_grad(target))) return below_autograd();
  const auto node = make_node<KlDivNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, target));
  Tensor output = below_autograd();
  node->save(input, target);
  node->options = {log_target, reduce, divisor};
  torch::autograd::set_history(output, node);
  return output;
}

// In float32, as torch's own kl_div.
template <c10::DeviceType kDevice>
Tensor autocast(const Tensor& input, const Tensor& target, bool log_target, bool reduce, c10::SymInt divisor) {
  const Autocast autocast(kDevice);
  return call(autocast.cast(input), autocast.cast(target), log_target, reduce, divisor);
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(charlm, m) {
  m.def("pointwise_kl_div(Tensor input, Tensor target, bool log_target, bool reduce, SymInt divisor) -> Tensor");
  m.def(
      "_pointwise_kl_div_backward(Tensor grad_output, Tensor input, Tensor target, bool log_target, bool reduce, "
      "SymInt divisor, bool[2] output_mask) -> (Tensor, Tensor)");
  implement(m, "pointwise_kl_div", &forward);
  implement(m, "_pointwise_kl_div_backward", &backward);
}

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("pointwise_kl_div", &meta_forward);
  m.impl("_pointwise_kl_div_backward", &meta_backward);
}

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("pointwise_kl_div", &autograd);
  m.impl("_pointwise_kl_div_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("pointwise_kl_div", &formula); }
TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { m.impl("pointwise_kl_div", &autocast<c10::DeviceType::CPU>); }
TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { m.impl("pointwise_kl_div", &autocast<c10::DeviceType::CUDA>); }

}  // namespace charlm
