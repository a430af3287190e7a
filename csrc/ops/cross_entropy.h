// cross_entropy: parameters of its kernels, for every device.
//
// With z = logit_scale * x, or softcap * tanh(logit_scale * x / softcap), m = max_c z_c, S = sum_c exp(z_c - m),
// lse = m + log S, class weights w, row weight t and e = label_smoothing, the loss of a row is
//   class index y:     t * (sum_c q_c (lse - z_c) + lse_square_scale * w_y * lse^2),  q_c = (1 - e) w_y [c = y] + d_c,
//                                                                                     d_c = e / V * w_c
//   probabilities p:   t * (sum_c d_c (lse - z_c) + lse_square_scale * lse^2),        d_c = w_c ((1 - e) p_c + e / V)
// and its gradient with respect to z_c is, with u = w_y or 1 and Q = sum_c q_c,
//   t * (exp(z_c - m) / S * (Q + 2 * lse_square_scale * u * lse) - q_c).
// m and S are kept apart, and lse - z_c is computed as (m - z_c) + log S: logits far from zero lose nothing.
// Label smoothing: Szegedy et al. 2016; the squared lse (z-loss): PaLM, Chowdhery et al. 2022; softcap: Gemma 2, 2024.
#pragma once

#include "core/kernel.h"

namespace charlm {

// kBackwardWithMetrics (GPU): the gradient of the loss and those of lse and entropy, which ignored rows have too.
enum class CrossEntropyPass { kForward, kForwardBackward, kBackward, kTargetBackward, kBackwardWithMetrics };

// A row is one target. C = Compute<T>. Pointers marked optional may be null.
template <class T>
struct CrossEntropyParams {
  using C = Compute<T>;

  int64_t n_rows = 0;         // N
  int64_t n_classes = 0;      // V
  const T* logits = nullptr;  // [N, V], a row every `logits_stride` elements
  int64_t logits_stride = 0;
  bool has_class_indices = false;  // class indices; otherwise there are `probabilities` (null too if V is 0)
  Indices target;                  // [N], each in [0, V) or ignore_index; on the CPU int64 and already checked
  bool may_ignore = true;          // GPU: false for uint64 targets, which are never a negative ignore_index
  int64_t ignore_index = -100;
  const T* probabilities = nullptr;  // [N, V]
  int64_t probabilities_stride = 0;
  const C* weight = nullptr;        // [V], optional: a weight for each class
  const C* weight_sum = nullptr;    // [], of `weight`, or 0 without smoothing; null without `weight`
  const C* token_weight = nullptr;  // [N], optional: a weight for each row

  C label_smoothing = 0;
  C lse_square_scale = 0;
  C logit_scale = 1;
  C softcap = 0;                     // 0: none
  bool mean = false;                 // GPU: divide by the total weight
  bool zero_if_all_ignored = false;  // GPU: ... unless every row is ignored
  double grad_scale = 1;             // CPU: factor of every gradient: 1 / total weight for a mean

  // Written by forward, read by backward.
  C* row_max = nullptr;          // [N] max_c z_c
  C* row_sum = nullptr;          // [N] sum_c exp(z_c - row_max)
  C* row_dense_sum = nullptr;    // [N] sum_c d_c, for probabilities only
  C* loss = nullptr;             // [N], optional: the loss of each row
  T* rounded_loss = nullptr;     // [N], optional, GPU: in place of `loss`
  void* reduced_loss = nullptr;  // [], optional, GPU: the sum or mean of the losses, T or (unrounded) C

  const C* grad_loss = nullptr;              // [], or [N] with `grad_loss_stride` 1; null: 1
  const T* unconverted_grad_loss = nullptr;  // GPU: in place of grad_loss
  int64_t grad_loss_stride = 0;
  bool is_loss_unrounded = false;    // GPU: of reduced_loss
  bool grad_is_precomputed = false;  // GPU: `grad` already holds the gradient for a unit grad_loss
  T* grad = nullptr;                 // [N, V], may be the logits themselves
  int64_t grad_stride = 0;

  // Written by metrics, which also writes row_max and row_sum (optional) of rows whose target is ignored.
  C* lse = nullptr;                     // [N] nats
  C* entropy = nullptr;                 // [N] nats, H; read by backward with `grad_entropy`
  int64_t* predicted_tokens = nullptr;  // [N] the first class with the largest logit

  // Optional: backward adds p_c (grad_lse - grad_entropy (log p_c + H)) to the gradient of z_c.
  const C* grad_lse = nullptr;      // [N]
  const C* grad_entropy = nullptr;  // [N]
};

// grad *= factor, without any memory access if factor is 1.
template <class T>
struct ScaleParams {
  int64_t n_rows = 0, n_columns = 0;
  T* grad = nullptr;  // [n_rows, n_columns], a row every `stride` elements
  int64_t stride = 0;
  const Compute<T>* factor = nullptr;     // []
  const T* unconverted_factor = nullptr;  // in place of factor
};

template <class T>
struct CrossEntropyKernels {
  Kernel<CrossEntropyParams<T>> forward;  // on the CPU also reports the sum of the losses in `Launch`
  // Loss and gradient in one pass, the gradient for a unit grad_loss. CPU: requests one row of scratch for half types.
  Kernel<CrossEntropyParams<T>> forward_backward;
  Kernel<CrossEntropyParams<T>> backward;         // the gradient of the logits
  Kernel<CrossEntropyParams<T>> target_backward;  // the gradient of the probabilities
  Kernel<CrossEntropyParams<T>> metrics;
  Kernel<ScaleParams<T>> scale;                             // GPU
  int64_t (*workspace)(int64_t n_rows, int64_t n_classes);  // GPU: bytes that the first four request
};

// CPU: the number of ignored targets among [begin, end), or -1 if one is neither ignored nor a class.
using CountIgnored = int64_t (*)(const int64_t* target, int64_t begin, int64_t end, int64_t n_classes, bool may_ignore,
                                 int64_t ignore_index);

}  // namespace charlm
