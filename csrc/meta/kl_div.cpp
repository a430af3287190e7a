// Shapes and dtypes of kl_div's results, for torch.compile, torch.export and fake tensors.
#include "../kl_div.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace charlm {
namespace {

std::tuple<Tensor, Tensor> kl_div(const Tensor& p, const Tensor& q, int64_t p_kind, int64_t q_kind) {
  check_kl_div(p, q, p_kind, q_kind);
  const auto shape = leading_sizes(p);
  return {at::empty_symint(shape, p.options()),
          at::empty_symint({kKlDivState, c10::multiply_integers(shape)}, p.options().dtype(row_dtype(p)))};
}

std::tuple<Tensor, Tensor> kl_div_backward(const Tensor&, const Tensor& p, const Tensor& q, const Tensor&, int64_t,
                                           int64_t, std::array<bool, 2> output_mask) {
  Tensor p_grad, q_grad;
  if (output_mask[0]) p_grad = at::empty_symint(p.sym_sizes(), p.options());
  if (output_mask[1]) q_grad = at::empty_symint(q.sym_sizes(), q.options());
  return {p_grad, q_grad};
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("kl_div", &kl_div);
  m.impl("kl_div_backward", &kl_div_backward);
}

}  // namespace charlm
