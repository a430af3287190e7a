// torch's kl_div as one pass over input and target: checks, shapes, the CPU's implementation, autograd, functorch and
// autocast. The caller has broadcast and promoted the two.
#include "pointwise_kl_div.h"

#include <ATen/Functions.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include <array>
#include <atomic>
#include <tuple>

#include "autograd/kernel_node.h"
#include "cpu/adapter.h"
#include "pointwise_kl_div_checks.h"

namespace charlm {
namespace {

// ------------------------------------------------------------------------------------------------------ CPU

template <class T>
bool is_above_rounding(T largest, at::ScalarType dtype) {
  const double epsilon = dtype == at::kDouble  ? 0x1p-52
                         : dtype == at::kFloat ? 0x1p-23
                         : dtype == at::kHalf  ? 0x1p-10
                                               : 0x1p-7;
  return largest > 16 * epsilon;
}

Tensor pointwise_kl_div(const Tensor& given_input, const Tensor& given_target, bool log_target, bool reduce,
                        c10::SymInt divisor) {
  check_pointwise_kl_div(given_input, given_target);
  const Tensor input = given_input.contiguous(), target = given_target.contiguous();
  const Tensor output = reduce ? at::empty({}, input.options()) : new_output(input.sizes(), input.options());
  std::atomic<bool> is_positive = false;
  with_float_type(input.scalar_type(), "kl_div", [&]<class T>() {
    PointwiseKlDiv<T> p;
    p.n = input.numel();
    p.log_target = log_target;
    p.input = const_data<T>(input);
    p.target = const_data<T>(target);
    p.output = reduce ? nullptr : mutable_data<T>(output);
    const double sum = Blocks(p.n, 1).parallel_sum([&] {
      return [&](int64_t begin, int64_t end) {
        Compute<T> largest = 0;
        const double of_block = cpu_kernels().of<T>().pointwise_kl_div.forward(p, begin, end, &largest);
        if (is_above_rounding(largest, input.scalar_type())) is_positive = true;
        return of_block;
      };
    });
    if (reduce) output.fill_(sum / static_cast<double>(divisor.expect_int()));
  });
  if (is_positive) {
    TORCH_WARN_ONCE(
        "kl_div: input holds a value > 0, which is the logarithm of no probability. input must hold "
        "log-probabilities, such as log_softmax gives; charlm.functional.kl_divergence takes logits and "
        "probabilities.");
  }
  return output;
}

std::tuple<Tensor, Tensor> pointwise_kl_div_backward(const Tensor& given_grad, const Tensor& given_input,
                                                     const Tensor& given_target, bool log_target, bool reduce,
                                                     c10::SymInt divisor, std::array<bool, 2> output_mask) {
  check_pointwise_kl_div_backward(given_grad, given_input, given_target, reduce);
  const Tensor input = given_input.contiguous(), target = given_target.contiguous();
  const Tensor grad = given_grad.to(row_dtype(input)).contiguous();
  Tensor grad_input, grad_target;
  if (output_mask[0]) grad_input = new_output(input.sizes(), input.options());
  if (output_mask[1]) grad_target = new_output(input.sizes(), input.options());
  with_float_type(input.scalar_type(), "kl_div_backward", [&]<class T>() {
    const auto p = pointwise_kl_div_gradient<T>(grad, input, target, log_target, reduce, divisor.expect_int(),
                                                grad_input, grad_target);
    Blocks(p.n, 1).parallel_for(
        [&](int64_t, int64_t begin, int64_t end) { cpu_kernels().of<T>().pointwise_kl_div.backward(p, begin, end); });
  });
  return {grad_input, grad_target};
}

// ------------------------------------------------------------------------------------------------------ Meta

Tensor meta(const Tensor& input, const Tensor& target, bool, bool reduce, c10::SymInt) {
  check_pointwise_kl_div(input, target);
  return at::empty_symint(reduce ? c10::SymIntArrayRef() : input.sym_sizes(), input.options());
}

std::tuple<Tensor, Tensor> meta_backward(const Tensor&, const Tensor& input, const Tensor&, bool, bool, c10::SymInt,
                                         std::array<bool, 2> output_mask) {
  const auto gradient = [&](bool needed) {
    return needed ? at::empty_symint(input.sym_sizes(), input.options()) : Tensor();
  };
  return {gradient(output_mask[0]), gradient(output_mask[1])};
}

// -------------------------------------------------------------------------------------------------- autograd

using Forward = Tensor(const Tensor&, const Tensor&, bool, bool, c10::SymInt);
using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, bool, bool, c10::SymInt,
                                            std::array<bool, 2>);

Tensor call(const Tensor& input, const Tensor& target, bool log_target, bool reduce, c10::SymInt divisor) {
  static const auto op =
      c10::Dispatcher::singleton().findSchemaOrThrow("charlm::pointwise_kl_div", "").typed<Forward>();
  return op.call(input, target, log_target, reduce, divisor);
}

// In torch's own ops, which differentiate to any order.
Tensor by_formula(const Tensor& input, const Tensor& target, bool log_target, bool reduce, c10::SymInt divisor) {
  check_pointwise_kl_div(input, target);
  const Tensor result = at::kl_div(input, target, reduce ? at::Reduction::Sum : at::Reduction::None, log_target);
  return reduce ? result.div(at::Scalar(divisor.guard_int(__FILE__, __LINE__))) : result;
}

struct PointwiseKlDivNode final : KernelNode<PointwiseKlDivNode, 2, bool, bool, c10::SymInt> {
  static constexpr const char* kName = "PointwiseKlDivBackward";

  static variable_list gradients(const BackwardCall& call, bool log_target, bool reduce, c10::SymInt divisor) {
    const Tensor input = call.saved(0), target = call.saved(1);
    if (at::GradMode::is_enabled()) {
      return call.differentiate({input, target}, [&](const variable_list& in) {
        return by_formula(in[0], in[1], log_target, reduce, divisor);
      });
    }
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("charlm::pointwise_kl_div_backward", "").typed<Backward>();
    auto [grad_input, grad_target] =
        op.call(call.grads[0], input, target, log_target, reduce, divisor, {call.needs(0), call.needs(1)});
    return {grad_input, grad_target};
  }
};

Tensor autograd(const Tensor& input, const Tensor& target, bool log_target, bool reduce, c10::SymInt divisor) {
  if (needs_formula(input) || needs_formula(target)) return by_formula(input, target, log_target, reduce, divisor);
  const auto below_autograd = [&] {
    at::AutoDispatchBelowADInplaceOrView guard;
    return call(input, target, log_target, reduce, divisor);
  };
  if (!at::GradMode::is_enabled() || !(requires_grad(input) || requires_grad(target))) return below_autograd();
  const auto node = make_node<PointwiseKlDivNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(input, target));
  Tensor output = below_autograd();
  node->save(input, target);
  node->options = {log_target, reduce, divisor};
  torch::autograd::set_history(output, node);
  return output;
}

// In float32, as torch's own.
template <c10::DeviceType kDevice>
Tensor autocast(const Tensor& input, const Tensor& target, bool log_target, bool reduce, c10::SymInt divisor) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(at::autocast::get_autocast_dispatch_key_from_device_type(kDevice));
  const auto cast = [](const Tensor& t) { return at::autocast::cached_cast(at::kFloat, t, kDevice); };
  return call(cast(input), cast(target), log_target, reduce, divisor);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CPU, m) {
  m.impl("pointwise_kl_div", &pointwise_kl_div);
  m.impl("pointwise_kl_div_backward", &pointwise_kl_div_backward);
}

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("pointwise_kl_div", &meta);
  m.impl("pointwise_kl_div_backward", &meta_backward);
}

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("pointwise_kl_div", &autograd);
  m.impl("pointwise_kl_div_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("pointwise_kl_div", &by_formula); }

TORCH_LIBRARY_IMPL(charlm, AutocastCPU, m) { m.impl("pointwise_kl_div", &autocast<c10::DeviceType::CPU>); }

TORCH_LIBRARY_IMPL(charlm, AutocastCUDA, m) { m.impl("pointwise_kl_div", &autocast<c10::DeviceType::CUDA>); }

}  // namespace charlm
