// Softmax cross-entropy over rows of logits: what the adapter fills in, and the functions that launch the kernels; each
// returns CUDA's error code, 0 for success. The formulas stand in cross_entropy_row.cuh.
#pragma once

#include "index_error.h"
#include "stream.h"

namespace charlm::cuda {

// One call's tensors as device pointers. Rows are targets, N of them; V is the number of classes; C = Compute<T>.
// Pointers marked optional may be null.
template <class T>
struct CrossEntropyRows {
  using C = Compute<T>;

  int64_t n_rows = 0;         // N
  int64_t n_classes = 0;      // V
  const T* logits = nullptr;  // [N, V], a row every `logits_stride` elements
  int64_t logits_stride = 0;
  bool has_target = false;  // else there are `probabilities`
  Indices target;           // [N], each in [0, V) or, if `may_ignore`, `ignore_index`
  bool may_ignore = true;
  int64_t ignore_index = -100;
  const T* probabilities = nullptr;  // [N, V]
  int64_t probabilities_stride = 0;
  const C* weight = nullptr;        // [V], optional: a weight for each class
  const C* weight_sum = nullptr;    // [1] their sum, or 0 without smoothing; null without `weight`
  const C* token_weight = nullptr;  // [N], optional: a weight for each row

  C label_smoothing = 0;
  C lse_square_scale = 0;
  C logit_scale = 1;
  C softcap = 0;  // 0: none
  bool mean = false;
  bool zero_if_all_ignored = false;

  C* row_max = nullptr;        // [N] max_c z_c                      written by forward, read by the gradients
  C* row_sum = nullptr;        // [N] sum_c exp(z_c - row_max)
  C* row_dense_sum = nullptr;  // [N] sum_c d_c, for probabilities only
  C* loss = nullptr;           // [N], optional: the loss of each row, not yet rounded
  T* reduced_loss = nullptr;   // [1], optional: their sum or mean

  const C* grad_loss = nullptr;  // [1], or [N] with `grad_loss_stride` 1; null: 1
  int64_t grad_loss_stride = 0;
  bool keep_if_one = false;  // `grad` is that for a gradient of the loss of 1: nothing to do if it is 1
  T* grad = nullptr;         // [N, V], may be the logits themselves
  int64_t grad_stride = 0;
};

// What a monitor wants to know about each row.
template <class T>
struct CrossEntropyMetrics {
  Compute<T>* lse = nullptr;            // [N] nats
  Compute<T>* entropy = nullptr;        // [N] nats
  int64_t* predicted_tokens = nullptr;  // [N] the first of the largest
};

// Where the kernels of one call run.
struct CrossEntropyLaunch {
  void* workspace = nullptr;     // cross_entropy_workspace() bytes
  int64_t max_shared_bytes = 0;  // of a block
  Stream stream = nullptr;
};

template <class T>
int64_t cross_entropy_workspace(int64_t n_rows, int64_t n_classes);

// The row maxima and sums, and the losses.
template <class T>
int cross_entropy_forward(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at);
// The same and `grad`, the gradient of the logits for unit grad_loss.
template <class T>
int cross_entropy_forward_backward(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at);
// `grad`, for the logits.
template <class T>
int cross_entropy_backward(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at);
// `grad`, for the probabilities.
template <class T>
int cross_entropy_target_backward(const CrossEntropyRows<T>& rows, const CrossEntropyLaunch& at);
template <class T>
int cross_entropy_metrics(const CrossEntropyRows<T>& rows, const CrossEntropyMetrics<T>& out, Stream stream);
// grad *= factor; nothing is read or written if it is 1.
template <class T>
int cross_entropy_scale_grad(T* grad, int64_t n_rows, int64_t n_classes, int64_t stride, const Compute<T>* factor,
                             Stream stream);

}  // namespace charlm::cuda
