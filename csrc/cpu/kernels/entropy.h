// The entropy of rows of logits: what the adapter fills in, and the functions that each instruction set provides. The
// formulas stand in entropy_rows.h.
#pragma once

#include "../../types.h"

namespace charlm {

// One call's tensors as pointers; C = Compute<T>.
template <class T>
struct EntropyRows {
  using C = Compute<T>;

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

// Each function works on rows [begin, end).
template <class T>
struct EntropyKernels {
  void (*forward)(const EntropyRows<T>&, int64_t begin, int64_t end);
  void (*backward)(const EntropyRows<T>&, int64_t begin, int64_t end);  // writes `grad`
};

}  // namespace charlm
