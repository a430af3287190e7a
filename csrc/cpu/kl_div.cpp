// kl_div on the CPU.
#include "../kl_div.h"

#include <torch/library.h>

#include "adapter.h"

namespace charlm {
namespace {

// A call's rows, and the state that forward writes and backward reads, as pointers.
template <class T>
KlDivRows<T> kl_div_rows(const Tensor& p, const Tensor& q, const Tensor& state, int64_t p_kind, int64_t q_kind) {
  auto* const data = static_cast<Compute<T>*>(const_cast<void*>(state.const_data_ptr()));
  const int64_t n = state.size(1);
  KlDivRows<T> rows;
  rows.n_classes = p.size(1);
  rows.p_kind = static_cast<Distribution>(p_kind);
  rows.q_kind = static_cast<Distribution>(q_kind);
  rows.p = const_data<T>(p);
  rows.p_stride = p.stride(0);
  rows.q = const_data<T>(q);
  rows.q_stride = q.stride(0);
  rows.p_max = data;
  rows.p_sum = data + n;
  rows.q_max = data + 2 * n;
  rows.q_sum = data + 3 * n;
  rows.mass = data + 4 * n;
  rows.centre = data + 5 * n;
  rows.offset = data + 6 * n;
  return rows;
}

std::tuple<Tensor, Tensor> kl_div(const Tensor& given_p, const Tensor& given_q, int64_t p_kind, int64_t q_kind) {
  check_kl_div(given_p, given_q, p_kind, q_kind);
  const Tensor p = as_class_rows(given_p), q = as_class_rows(given_q);
  const int64_t n = p.size(0), n_classes = p.size(1);
  const Tensor output = at::empty_symint(leading_sizes(given_p), p.options());
  const Tensor state = at::empty({kKlDivState, n}, p.options().dtype(row_dtype(p)));
  if (n_classes == 0) return {output.zero_(), state.zero_()};
  with_float_type(p.scalar_type(), "kl_div", [&]<class T>() {
    KlDivRows<T> rows = kl_div_rows<T>(p, q, state, p_kind, q_kind);
    rows.output = mutable_data<T>(output);
    Blocks(n, 2 * n_classes).parallel_for([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().of<T>().kl_div.forward(rows, begin, end);
    });
  });
  return {output, state};
}

std::tuple<Tensor, Tensor> kl_div_backward(const Tensor& given_grad_output, const Tensor& given_p,
                                           const Tensor& given_q, const Tensor& state, int64_t p_kind, int64_t q_kind,
                                           std::array<bool, 2> output_mask) {
  check_kl_div(given_p, given_q, p_kind, q_kind);
  check_kl_div_gradient(given_grad_output, given_p, state);
  const Tensor p = as_class_rows(given_p), q = as_class_rows(given_q);
  const Tensor grad_output = given_grad_output.to(row_dtype(p)).contiguous();
  Tensor p_grad, q_grad;
  if (output_mask[0]) p_grad = new_output(given_p.sizes(), p.options());
  if (output_mask[1]) q_grad = new_output(given_q.sizes(), q.options());
  with_float_type(p.scalar_type(), "kl_div_backward", [&]<class T>() {
    KlDivRows<T> rows = kl_div_rows<T>(p, q, state, p_kind, q_kind);
    rows.grad_output = const_data<Compute<T>>(grad_output);
    if (p_grad.defined()) rows.p_grad = mutable_data<T>(p_grad);
    if (q_grad.defined()) rows.q_grad = mutable_data<T>(q_grad);
    Blocks(p.size(0), 2 * rows.n_classes).parallel_for([&](int64_t, int64_t begin, int64_t end) {
      cpu_kernels().of<T>().kl_div.backward(rows, begin, end);
    });
  });
  return {p_grad, q_grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CPU, m) {
  m.impl("kl_div", &kl_div);
  m.impl("kl_div_backward", &kl_div_backward);
}

}  // namespace charlm
