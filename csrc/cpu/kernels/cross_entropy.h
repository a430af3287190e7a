// Softmax cross-entropy over rows of logits: what the adapter fills in, and the functions that each instruction
// set provides. The formulas stand in cross_entropy_rows.h.
#pragma once

#include "../../types.h"

namespace charlm {

// One call's tensors as pointers. Rows are targets, N of them; V is the number of classes; C = Compute<T>.
// Without `target` there are `probabilities` (null too if V is 0); pointers marked optional may be null.
template <class T>
struct CrossEntropyRows {
  using C = Compute<T>;

  int64_t n_classes = 0;      // V
  const T* logits = nullptr;  // [N, V], a row every `logits_stride` elements
  int64_t logits_stride = 0;
  const int64_t* target = nullptr;  // [N], each in [0, V) or `ignore_index`: checked before
  int64_t ignore_index = -100;
  const T* probabilities = nullptr;  // [N, V]
  int64_t probabilities_stride = 0;
  const C* weight = nullptr;        // [V], optional: a weight for each class
  const C* token_weight = nullptr;  // [N], optional: a weight for each row
  C weight_sum = 0;                 // sum of the class weights, V without `weight`

  C label_smoothing = 0;
  C lse_square_scale = 0;
  C logit_scale = 1;
  C softcap = 0;  // 0: none

  C* row_max = nullptr;         // [N] max_c z_c           written by forward, read by the gradients
  C* row_sum = nullptr;         // [N] sum_c exp(z_c - row_max)
  C* row_dense_sum = nullptr;   // [N] sum_c d_c, for probabilities only
  T* loss = nullptr;            // [N], optional: the loss of each row
  C* unrounded_loss = nullptr;  // [N], optional: the same, where it is still to be summed

  const C* grad_loss = nullptr;  // [1], or [N] with `grad_loss_stride` 1
  int64_t grad_loss_stride = 0;
  double grad_scale = 1;  // what a reduction multiplies each row with: 1 / total weight for a mean
  T* grad = nullptr;      // [N, V], may be the logits themselves
  int64_t grad_stride = 0;
};

// What a monitor wants to know about each row; every pointer is optional.
template <class T>
struct CrossEntropyMetrics {
  Compute<T>* lse = nullptr;            // [N] nats
  Compute<T>* entropy = nullptr;        // [N] nats
  int64_t* predicted_tokens = nullptr;  // [N] the first of the largest
};

// The number of ignored targets among [begin, end), or -1 if there is one that is no class.
using CountIgnored = int64_t (*)(const int64_t* target, int64_t begin, int64_t end, int64_t n_classes, bool may_ignore,
                                 int64_t ignore_index);

// Each function works on rows [begin, end).
template <class T>
struct CrossEntropyKernels {
  double (*forward)(const CrossEntropyRows<T>&, int64_t begin, int64_t end);  // returns the sum of the rows' losses
  // Both at once; `scratch` is room for V numbers, used for half types only.
  double (*forward_backward)(const CrossEntropyRows<T>&, Compute<T>* scratch, int64_t begin, int64_t end);
  void (*backward)(const CrossEntropyRows<T>&, int64_t begin, int64_t end);         // writes `grad`, for the logits
  void (*target_backward)(const CrossEntropyRows<T>&, int64_t begin, int64_t end);  // ... for the probabilities
  void (*metrics)(const CrossEntropyRows<T>&, const CrossEntropyMetrics<T>&, int64_t begin, int64_t end);
};

}  // namespace charlm
