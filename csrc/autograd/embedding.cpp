// embedding's derivative: the rows of the incoming gradient summed by index; linear, so its own derivative is a gather.
#include "../embedding.h"

#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_backward.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "kernel_node.h"

namespace charlm {
namespace {

using Forward = Tensor(const Tensor&, const Tensor&, int64_t, bool, bool);
using Backward = Tensor(const Tensor&, const Tensor&, c10::SymInt, int64_t, bool);

struct EmbeddingBackward final : KernelNode<EmbeddingBackward, 1, c10::SymInt, int64_t, bool, bool> {
  static constexpr const char* kName = "EmbeddingBackward";

  static variable_list gradients(const BackwardCall& call, const c10::SymInt& num_embeddings, int64_t padding_idx,
                                 bool scale_grad_by_freq, bool sparse) {
    const Tensor& grad = call.grads[0];
    const Tensor index = call.saved(0);
    if (sparse) {
      return {at::embedding_backward_symint(grad, index.to(at::kLong), num_embeddings, padding_idx, scale_grad_by_freq,
                                            sparse)};
    }
    if (at::GradMode::is_enabled()) {
      return {differentiable(grad, index.to(at::kLong), num_embeddings, padding_idx, scale_grad_by_freq)};
    }
    static const auto op =
        c10::Dispatcher::singleton().findSchemaOrThrow("charlm::embedding_backward", "").typed<Backward>();
    return {op.call(grad, index, num_embeddings, padding_idx, scale_grad_by_freq)};
  }

  // The backward is itself differentiated: torch's own op. The division by the counts stands outside of it, because
  // its derivative forgets them.
  static Tensor differentiable(const Tensor& grad_output, const Tensor& index, const c10::SymInt& num_embeddings,
                               int64_t padding_idx, bool scale_grad_by_freq) {
    raise_recorded_index_error(index);
    Tensor grad = grad_output;
    if (scale_grad_by_freq) {
      const Tensor ones = at::ones_like(index, grad.options());
      const Tensor none = at::zeros_symint({num_embeddings}, grad.options());
      const Tensor counts = none.index_add(0, index.flatten(), ones.flatten());
      grad = grad / counts.index({index}).unsqueeze(-1);
    }
    return at::embedding_dense_backward_symint(grad, index, num_embeddings, padding_idx, false);
  }
};

Tensor by_formula(const Tensor& weight, const Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq,
                  bool sparse) {
  check_embedding(weight, indices);
  return at::embedding(weight, indices.to(at::kLong), padding_idx, scale_grad_by_freq, sparse);
}

Tensor embedding(const Tensor& weight, const Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq,
                 bool sparse) {
  if (needs_formula(weight) || needs_formula(indices)) {
    return by_formula(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  }
  const auto below_autograd = [&] {
    static const auto op = c10::Dispatcher::singleton().findSchemaOrThrow("charlm::embedding", "").typed<Forward>();
    at::AutoDispatchBelowADInplaceOrView guard;
    return op.call(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  };
  if (!at::GradMode::is_enabled() || !weight.requires_grad()) return below_autograd();
  const auto node = make_node<EmbeddingBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(weight));
  Tensor output = below_autograd();
  node->save(indices);
  node->options = {weight.sym_size(0), padding_idx, scale_grad_by_freq, sparse};
  torch::autograd::set_history(output, node);
  return output;
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("embedding", &embedding);
  m.impl("embedding_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("embedding", &by_formula); }

}  // namespace charlm
