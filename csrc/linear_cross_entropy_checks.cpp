// Shapes and dtypes of linear_cross_entropy's arguments, refused with the error types that torch uses.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "linear_cross_entropy.h"

namespace charlm {
namespace {

void check_matches(const Tensor& input, const Tensor& t, const char* name) {
  check_same_device(input, "input", t, name);
  TORCH_CHECK(input.scalar_type() == t.scalar_type(), "expected input and ", name, " to have the same dtype, but got ",
              input.scalar_type(), " and ", t.scalar_type());
}

}  // namespace

Tensor like_logits(const LinearCrossEntropyArguments& a) {
  c10::SymDimVector shape(a.input.sym_sizes().begin(), a.input.sym_sizes().end() - 1);
  shape.push_back(a.linear_weight.sym_size(0));
  return at::empty({1}, a.input.options().dtype(loss_dtype(a))).expand_symint(shape);
}

void check_linear_cross_entropy(const LinearCrossEntropyArguments& a) {
  TORCH_CHECK(a.input.dim() == 1 || a.input.dim() == 2, "expected input with dimensionality 1 or 2, got ",
              a.input.dim());
  TORCH_CHECK(a.linear_weight.dim() == 2, "expected linear_weight with dimensionality 2, got ", a.linear_weight.dim());
  TORCH_CHECK(a.input.sym_size(-1) == a.linear_weight.sym_size(1),
              "expected equal input and linear_weight last dimensions (in_features), got ", a.input.sym_size(-1),
              " and ", a.linear_weight.sym_size(1), ", respectively");
  check_matches(a.input, a.linear_weight, "linear_weight");
  if (a.linear_bias) {
    check_matches(a.input, *a.linear_bias, "linear_bias");
    TORCH_CHECK(a.linear_bias->dim() == 1 && a.linear_bias->sym_size(0) == a.linear_weight.sym_size(0),
                "expected linear_bias shape ", a.linear_weight.sym_size(0), ", got ", a.linear_bias->sym_sizes());
  }
  TORCH_CHECK(a.block_rows >= 0, "block_rows must not be negative, got ", a.block_rows);
  TORCH_CHECK(a.gemm >= 0 && a.gemm <= 2, "gemm must be 0, 1 or 2, got ", a.gemm);
  check_cross_entropy(a.options, like_logits(a), a.target, a.weight, a.token_weight);
}

}  // namespace charlm
