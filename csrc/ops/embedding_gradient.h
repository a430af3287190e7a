// The sums of rows by their index, on the CPU and on a GPU: embedding's gradient, and a part of embedding_linear's.
#pragma once

#include "core/device.h"

namespace charlm {

// CPU: `indices` as int64 and contiguous; IndexError for the first outside [0, num_embeddings).
at::Tensor checked_indices(const at::Tensor& indices, int64_t num_embeddings);

// GPU: indices that an op was given, all of them or those at one place of their last dimension.
struct GpuIndices {
  at::Tensor given;
  at::Tensor values;   // [N], contiguous
  int64_t place = -1;  // -1: all

  // For a kernel that reads them from `data`: `values`, or these in another order.
  Indices for_kernel(const Device& device, const at::Tensor& data, int64_t limit) const;
};

// GPU: grad[v, :] = the sum of rows[n, :] over n with index[n] = v: [V, D] and [N, D], both contiguous and of T, `grad`
// from a multiple of 16 bytes on. The order of the sums is fixed; they are in Compute<T> and rounded once.
template <class T>
void sum_by_index_on_gpu(const Device& device, const GpuIndices& index, const at::Tensor& rows, int64_t padding_idx,
                         bool scale_grad_by_freq, const at::Tensor& grad);

}  // namespace charlm
