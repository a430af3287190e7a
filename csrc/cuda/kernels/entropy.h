// The entropy of rows of logits: what the adapter fills in, and the functions that launch the kernels; each returns
// CUDA's error code, 0 for success. The formulas stand in entropy.cuh.
#pragma once

#include "../../types.h"
#include "stream.h"

namespace charlm::cuda {

// One call's tensors as device pointers; C = Compute<T>.
template <class T>
struct EntropyRows {
  using C = Compute<T>;

  int64_t n_rows = 0;         // N
  int64_t n_classes = 0;      // V
  const T* logits = nullptr;  // [N, V], a row every `logits_stride` elements
  int64_t logits_stride = 0;

  C* row_max = nullptr;       // [N] m = max_c z_c             written by forward, read by backward
  C* row_sum = nullptr;       // [N] S = sum_c exp(z_c - m)
  C* row_distance = nullptr;  // [N] sum_c p_c (m - z_c)
  T* entropy = nullptr;       // [N] nats

  const C* grad_output = nullptr;  // [N]
  T* grad = nullptr;               // [N, V], contiguous
};

template <class T>
int entropy_forward(const EntropyRows<T>& rows, Stream stream);
// `grad`
template <class T>
int entropy_backward(const EntropyRows<T>& rows, Stream stream);

}  // namespace charlm::cuda
