// Shapes and dtypes of embedding's results, for torch.compile, torch.export and fake tensors.
#include "../embedding.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include "../checks.h"

namespace charlm {
namespace {

Tensor embedding(const Tensor& weight, const Tensor& indices, int64_t, bool, bool) {
  check_embedding(weight, indices);
  c10::SymDimVector shape(indices.sym_sizes().begin(), indices.sym_sizes().end());
  shape.push_back(weight.sym_size(1));
  return at::empty_symint(shape, weight.options());
}

Tensor embedding_backward(const Tensor& grad_output, const Tensor& indices, c10::SymInt num_embeddings, int64_t, bool) {
  return at::empty_symint({std::move(num_embeddings), grad_output.sym_size(-1)}, grad_output.options());
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("embedding", &embedding);
  m.impl("embedding_backward", &embedding_backward);
}

}  // namespace charlm
