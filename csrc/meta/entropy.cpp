// Shapes and dtypes of entropy's results, for torch.compile, torch.export and fake tensors.
#include "../entropy.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

namespace charlm {
namespace {

std::tuple<Tensor, Tensor> entropy(const Tensor& logits) {
  check_entropy(logits);
  const auto shape = leading_sizes(logits);
  return {at::empty_symint(shape, logits.options()),
          at::empty_symint({kEntropyState, c10::multiply_integers(shape)}, logits.options().dtype(row_dtype(logits)))};
}

Tensor entropy_backward(const Tensor&, const Tensor& logits, const Tensor&) {
  return at::empty_symint(logits.sym_sizes(), logits.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("entropy", &entropy);
  m.impl("entropy_backward", &entropy_backward);
}

}  // namespace charlm
