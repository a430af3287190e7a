// kl_divergence: parameters of its kernels, for every device.
//
// The divergence KL(P || Q) = sum_c p_c (log p_c - log q_c) of rows of distributions, in nats (Kullback and Leibler
// 1951). A row x of logits is read, with m = max_c x_c and S = sum_c exp(x_c - m), as
//   u_c = x_c - m,   w_c = exp(u_c),   log p_c = u_c - log S,   p_c = w_c / S.
// Log-probabilities are read as u = x, probabilities as u = log x and w = x; for both m = 0 and S = 1. With
// l = log S_q - log S_p, M = sum_c p_c and D_c = u^p_c - u^q_c
//   KL = W / S_p + k + M l,   W = sum_c w^p_c (D_c - k).
// For two identical rows each D_c is 0, and so are l and KL, to the bit. For logits p, k is D_c of the most probable
// class (else 0), so that nothing cancels where p is concentrated on it. The gradients:
//   of logits p: p_c (D_c - k - W / S_p)      of logits q: q_c M - p_c
//   of log p:    p_c (D_c + l + 1)            of log q:    -p_c
//   of p:             D_c + l + 1             of q:        -p_c / q_c
// A class with p_c = 0 adds nothing to KL, whatever q_c is, and its own gradient is 0. A class with p_c > 0 = q_c makes
// KL infinite. Infinite gradients are given as 0: that of p_c, of q_c as a probability, and, where p are logits, of the
// whole row of p.
#pragma once

#include "core/kernel.h"

namespace charlm {

// How a row x represents a distribution p: p = softmax(x), p = exp(x), p = x.
enum class Distribution : int64_t { kLogits = 0, kLogProbs = 1, kProbs = 2 };

// C = Compute<T>. Pointers marked optional may be null.
template <class T>
struct KlDivergenceParams {
  using C = Compute<T>;

  int64_t n_rows = 0;     // N
  int64_t n_classes = 0;  // V
  Distribution p_kind = Distribution::kLogits, q_kind = Distribution::kLogits;
  const T* p = nullptr;  // [N, V], a row every `p_stride` elements
  int64_t p_stride = 0;
  const T* q = nullptr;  // [N, V], a row every `q_stride` elements
  int64_t q_stride = 0;

  // Written by forward, read by backward. Of distributions that are not logits the maxima are 0 and the sums 1.
  C* p_max = nullptr;   // [N]
  C* p_sum = nullptr;   // [N] sum_c exp(p_c - p_max)
  C* q_max = nullptr;   // [N]
  C* q_sum = nullptr;   // [N]
  C* mass = nullptr;    // [N] sum_c p_c: 1 for logits
  C* centre = nullptr;  // [N] u^p - u^q of the largest logit of p, 0 for what are not logits
  C* offset = nullptr;  // [N] what is added to u^p_c - u^q_c - centre in the gradient of p
  T* output = nullptr;  // [N] nats, written by forward

  const C* grad_output = nullptr;              // [N]
  const T* unconverted_grad_output = nullptr;  // GPU: in place of grad_output
  T* p_grad = nullptr;                         // [N, V], contiguous, optional, written by backward
  T* q_grad = nullptr;                         // [N, V], contiguous, optional, written by backward
};

template <class T>
struct KlDivergenceKernels {
  Kernel<KlDivergenceParams<T>> forward, backward;
};

}  // namespace charlm
