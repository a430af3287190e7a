// entropy: parameters of its kernels, for every device.
//
// The entropy, in nats, of the softmax of each row of logits z. With m = max_c z_c, S = sum_c exp(z_c - m),
// p_c = exp(z_c - m) / S and the mean distance d = sum_c p_c (m - z_c),
//   H = log S + d,    dH / dz_c = -p_c (log p_c + H) = p_c ((m - z_c) - d).
// Both terms of H are >= 0, so nothing cancels, however far the logits are from zero. A class with z_c = -inf has
// p_c = 0 and adds nothing (0 log 0 = 0). A row without any finite logit has no softmax: its entropy is NaN.
#pragma once

#include "core/kernel.h"

namespace charlm {

// C = Compute<T>.
template <class T>
struct EntropyParams {
  using C = Compute<T>;

  int64_t n_rows = 0;         // N
  int64_t n_classes = 0;      // V
  const T* logits = nullptr;  // [N, V], a row every `logits_stride` elements
  int64_t logits_stride = 0;

  // Written by forward, read by backward.
  C* row_max = nullptr;       // [N] m
  C* row_sum = nullptr;       // [N] S
  C* row_distance = nullptr;  // [N] d
  T* entropy = nullptr;       // [N] nats, written by forward

  const C* grad_output = nullptr;              // [N]
  const T* unconverted_grad_output = nullptr;  // GPU: in place of grad_output
  T* grad = nullptr;                           // [N, V], contiguous, written by backward
};

template <class T>
struct EntropyKernels {
  Kernel<EntropyParams<T>> forward, backward;
};

}  // namespace charlm
