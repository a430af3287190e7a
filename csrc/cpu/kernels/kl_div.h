// The Kullback-Leibler divergence of rows of distributions: what the adapter fills in, and the functions that each
// instruction set provides. The formulas stand in kl_div_rows.h.
#pragma once

#include "../../distribution.h"
#include "../../types.h"

namespace charlm {

// One call's tensors as pointers; C = Compute<T>. Pointers marked optional may be null.
template <class T>
struct KlDivRows {
  using C = Compute<T>;

  int64_t n_classes = 0;  // V
  Distribution p_kind = Distribution::kLogits, q_kind = Distribution::kLogits;
  const T* p = nullptr;  // [N, V], a row every `p_stride` elements
  int64_t p_stride = 0;
  const T* q = nullptr;
  int64_t q_stride = 0;

  // Written by forward, read by backward; for what are not logits, maxima are 0 and sums 1.
  C* p_max = nullptr;   // [N]
  C* p_sum = nullptr;   // [N] sum_c exp(p_c - p_max)
  C* q_max = nullptr;   // [N]
  C* q_sum = nullptr;   // [N]
  C* mass = nullptr;    // [N] sum_c p_c: 1 for logits
  C* centre = nullptr;  // [N] u^p - u^q of the largest logit of p, 0 for what are not logits
  C* offset = nullptr;  // [N] what is added to u^p_c - u^q_c - centre in the gradient of p
  T* output = nullptr;  // [N] nats

  const C* grad_output = nullptr;  // [N]
  T* p_grad = nullptr;             // [N, V], contiguous, optional
  T* q_grad = nullptr;             // [N, V], contiguous, optional
};

// Each function works on rows [begin, end).
template <class T>
struct KlDivKernels {
  void (*forward)(const KlDivRows<T>&, int64_t begin, int64_t end);
  void (*backward)(const KlDivRows<T>&, int64_t begin, int64_t end);  // writes `p_grad` and `q_grad`
};

}  // namespace charlm
