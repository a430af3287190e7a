// embedding on CUDA: takes tensors apart, sorts the indices of a large table, and launches the kernels.
#include "../embedding.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "../adapter.h"
#include "device.h"
#include "kernels/embedding.h"

namespace charlm::cuda {
namespace {

Tensor embedding(const Tensor& weight, const Tensor& indices, int64_t, bool, bool) {
  check_embedding(weight, indices);
  const DeviceCall call(weight.device());
  const Tensor index = indices.contiguous();
  at::DimVector shape(indices.sizes().begin(), indices.sizes().end());
  shape.push_back(weight.size(1));
  const Tensor output = at::empty(shape, weight.options());

  EmbeddingTable table;
  table.weight = weight.const_data_ptr();
  table.element_size = static_cast<int64_t>(weight.element_size());
  table.row_stride = weight.stride(0) * table.element_size;
  table.column_stride = weight.stride(1) * table.element_size;
  table.embedding_dim = weight.size(1);
  call.check(embedding_forward(table, call.indices(indices, index, weight.size(0), IndexKind::kIndex), index.numel(),
                               output.mutable_data_ptr(), call.stream()));
  return output;
}

// The indices as torch's sort takes them.
Tensor sortable(const Tensor& indices) {
  const Tensor flat = indices.contiguous().view({-1});
  switch (flat.scalar_type()) {
    case at::kUInt16:
    case at::kUInt32:
    case at::kUInt64:
      return flat.to(at::kLong);
    default:
      return flat;
  }
}

template <class T>
Tensor sum_by_index(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                    bool scale_grad_by_freq) {
  const DeviceCall call(grad_output.device());
  const int64_t n = indices.numel(), d = grad_output.size(-1);
  const auto shape = {num_embeddings, d};
  if (n == 0 || num_embeddings == 0 || d == 0) return at::zeros(shape, grad_output.options());

  const Tensor rows = grad_output.contiguous();
  EmbeddingGradient<T> gradient;
  gradient.n_indices = n;
  gradient.grad_output = const_data<T>(rows);
  gradient.num_embeddings = num_embeddings;
  gradient.embedding_dim = d;
  gradient.padding_idx = padding_idx;
  const auto new_workspace = [&](int64_t size) {
    return at::empty({size}, rows.options().dtype(std::is_same_v<T, double> ? at::kDouble : at::kFloat));
  };

  if (!scale_grad_by_freq && embedding_backward_uses_tables<T>(num_embeddings)) {
    const Tensor grad = at::empty(shape, rows.options()), index = indices.contiguous();
    const Tensor workspace = new_workspace(embedding_backward_tables_size<T>(n, num_embeddings, d));
    gradient.indices = call.indices(indices, index, num_embeddings, IndexKind::kIndex);
    gradient.grad = mutable_data<T>(grad);
    call.check(embedding_backward_tables(gradient, mutable_data<Compute<T>>(workspace), call.stream()));
    return grad;
  }
  const Tensor grad = at::zeros(shape, rows.options());
  const auto [index, positions] = at::sort(sortable(indices), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor workspace = new_workspace(embedding_backward_sorted_size<T>(n, d));
  gradient.indices = call.indices(indices, index, num_embeddings, IndexKind::kIndex);
  gradient.grad = mutable_data<T>(grad);
  call.check(embedding_backward_sorted(gradient, const_data<int64_t>(positions), scale_grad_by_freq,
                                       mutable_data<Compute<T>>(workspace), call.stream()));
  return grad;
}

Tensor embedding_backward(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                          bool scale_grad_by_freq) {
  check_embedding_backward(grad_output, indices);
  return with_float_type(grad_output.scalar_type(), "embedding_backward", [&]<class T>() {
    return sum_by_index<T>(grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq);
  });
}

}  // namespace
}  // namespace charlm::cuda

TORCH_LIBRARY_IMPL(charlm, CHARLM_CUDA_KEY, m) {
  m.impl("embedding", &charlm::cuda::embedding);
  m.impl("embedding_backward", &charlm::cuda::embedding_backward);
}
