// The sums of rows by their index, for every adapter whose gradient is made of them.
#pragma once

#include <ATen/core/Tensor.h>

#include "device.h"

namespace charlm::cuda {

// Indices of an op: all that it was given, or those at one place of their last dimension.
struct SomeIndices {
  at::Tensor given;
  at::Tensor values;   // [N], contiguous
  int64_t place = -1;  // -1: all

  // For a kernel that reads them from `data`: `values`, or these in another order.
  Indices for_kernel(const DeviceCall& call, const at::Tensor& data, int64_t limit) const {
    Indices indices = call.indices(given, data, limit, IndexKind::kIndex);
    if (place >= 0) name_place(indices.against);
    return indices;
  }

 private:
  void name_place(IndexLimit& against) const {
    against.kind = IndexKind::kIndexAtPlace;
    if (given.dim() > IndexLimit::kMaxDims) {
      against.n_dims = 2;
      against.sizes[0] = values.numel();
      against.sizes[1] = given.size(-1);
    }
    against.first() = place;
  }
};

// grad[v, :] = the sum of rows[n, :] over n with index[n] = v: [V, D] and [N, D], both contiguous and of T, `grad` from
// a multiple of 16 bytes on. The order of the sums is fixed; they are made in Compute<T> and rounded once.
template <class T>
void sum_by_index(const DeviceCall& call, const SomeIndices& index, const at::Tensor& rows, int64_t padding_idx,
                  bool scale_grad_by_freq, const at::Tensor& grad);

}  // namespace charlm::cuda
