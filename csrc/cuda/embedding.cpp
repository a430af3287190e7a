// embedding on CUDA: takes tensors apart, sorts the indices of a large table, and launches the kernels.
#include "../embedding.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/sort.h>
#include <torch/library.h>

#include "../adapter.h"
#include "device.h"
#include "embedding_gradient.h"
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
  switch (indices.scalar_type()) {
    case at::kUInt16:
    case at::kUInt32:
    case at::kUInt64:
      return indices.to(at::kLong);
    default:
      return indices;
  }
}

Tensor embedding_backward(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                          bool scale_grad_by_freq) {
  check_embedding_backward(grad_output, indices);
  return with_float_type(grad_output.scalar_type(), "embedding_backward", [&]<class T>() {
    const DeviceCall call(grad_output.device());
    const SomeIndices index{indices, indices.contiguous().view({-1})};
    const Tensor grad = at::empty({num_embeddings, grad_output.size(-1)}, grad_output.options());
    sum_by_index<T>(call, index, grad_output.contiguous(), padding_idx, scale_grad_by_freq, grad);
    return grad;
  });
}

}  // namespace

template <class T>
void sum_by_index(const DeviceCall& call, const SomeIndices& index, const Tensor& rows, int64_t padding_idx,
                  bool scale_grad_by_freq, const Tensor& grad) {
  const int64_t n = index.values.numel(), v = grad.size(0), d = grad.size(1);
  if (n == 0 || v == 0 || d == 0) {
    grad.zero_();
    return;
  }
  EmbeddingGradient<T> gradient;
  gradient.n_indices = n;
  gradient.grad_output = const_data<T>(rows);
  gradient.num_embeddings = v;
  gradient.embedding_dim = d;
  gradient.padding_idx = padding_idx;
  gradient.grad = mutable_data<T>(grad);
  const auto new_workspace = [&](int64_t size) {
    return at::empty({size}, grad.options().dtype(std::is_same_v<T, double> ? at::kDouble : at::kFloat));
  };

  if (!scale_grad_by_freq && embedding_backward_uses_tables<T>(v)) {
    const Tensor workspace = new_workspace(embedding_backward_tables_size<T>(n, v, d));
    gradient.indices = index.for_kernel(call, index.values, v);
    call.check(embedding_backward_tables(gradient, mutable_data<Compute<T>>(workspace), call.stream()));
    return;
  }
  grad.zero_();
  const auto [sorted, positions] = at::sort(sortable(index.values), /*stable=*/true, /*dim=*/0, /*descending=*/false);
  const Tensor workspace = new_workspace(embedding_backward_sorted_size<T>(n, d));
  gradient.indices = index.for_kernel(call, sorted, v);
  call.check(embedding_backward_sorted(gradient, const_data<int64_t>(positions), scale_grad_by_freq,
                                       mutable_data<Compute<T>>(workspace), call.stream()));
}

#define CHARLM_INSTANTIATE(T) \
  template void sum_by_index<T>(const DeviceCall&, const SomeIndices&, const Tensor&, int64_t, bool, const Tensor&);

CHARLM_INSTANTIATE(float)
#ifndef CHARLM_CUDA_FLOAT_ONLY
CHARLM_INSTANTIATE(double)
CHARLM_INSTANTIATE(BFloat16)
CHARLM_INSTANTIATE(Float16)
#endif

}  // namespace charlm::cuda

TORCH_LIBRARY_IMPL(charlm, CHARLM_CUDA_KEY, m) {
  m.impl("embedding", &charlm::cuda::embedding);
  m.impl("embedding_backward", &charlm::cuda::embedding_backward);
}
