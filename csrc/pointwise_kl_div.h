// torch.nn.functional.kl_div: t (log t - x) of each pair of a log-probability x (`input`) and a probability t
// (`target`), or with log_target exp(t) (t - x). In torch's own arithmetic: 0 log 0 is 0, but 0 * -inf is NaN, and a
// negative target is NaN. The gradients:
//   of x: -t       of t: log t + 1 - x (NaN where t = 0, as torch's)
//   of x: -exp(t)  of t: exp(t) (t - x + 1)                              with log_target
#pragma once

#include <stdint.h>

#include "types.h"

namespace charlm {

// One call's tensors as pointers, on the CPU or on a GPU; C = Compute<T>. Pointers marked optional may be null.
template <class T>
struct PointwiseKlDiv {
  using C = Compute<T>;

  int64_t n = 0;  // elements
  bool log_target = false;
  const T* input = nullptr;   // [n]
  const T* target = nullptr;  // [n]

  T* output = nullptr;  // [n], optional: each element's value; without it forward returns their sum

  const C* grad_output = nullptr;  // [n], or one number for all (grad_stride 0)
  int64_t grad_stride = 0;
  C factor = 1;              // of grad_output
  T* grad_input = nullptr;   // [n], optional
  T* grad_target = nullptr;  // [n], optional
};

// The CPU's functions, of each instruction set, on elements [begin, end).
template <class T>
struct PointwiseKlDivKernels {
  // Writes `output` or returns the sum; raises *largest to the largest input.
  double (*forward)(const PointwiseKlDiv<T>&, int64_t begin, int64_t end, Compute<T>* largest);
  void (*backward)(const PointwiseKlDiv<T>&, int64_t begin, int64_t end);
};

}  // namespace charlm
