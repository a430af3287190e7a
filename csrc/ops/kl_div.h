// kl_div: parameters of its kernels, for every device.
//
// torch.nn.functional.kl_div, for each pair of a log-probability x (`input`) and a probability t (`target`):
// t (log t - x), or exp(t) (t - x) with log_target. The arithmetic is torch's: 0 log 0 is 0, but 0 * -inf is NaN, and
// so is the value for a negative target. The gradients:
//   without log_target   of x: -t         of t: log t + 1 - x (NaN where t = 0, as in torch)
//   with log_target      of x: -exp(t)    of t: exp(t) (t - x + 1)
#pragma once

#include "core/kernel.h"

namespace charlm {

// C = Compute<T>. Pointers marked optional may be null.
template <class T>
struct KlDivParams {
  using C = Compute<T>;

  int64_t n = 0;  // elements
  bool log_target = false;
  const T* input = nullptr;   // [n]
  const T* target = nullptr;  // [n]

  T* output = nullptr;  // [n], optional: the value of each element; without it forward adds them up
  T* total = nullptr;   // [], GPU, without `output`: the sum divided by `divisor`
  double divisor = 1;

  const C* grad_output = nullptr;              // [n], or [] with `grad_stride` 0
  const T* unconverted_grad_output = nullptr;  // GPU: in place of grad_output
  int64_t grad_stride = 0;
  C factor = 1;              // of grad_output
  T* grad_input = nullptr;   // [n], optional
  T* grad_target = nullptr;  // [n], optional
};

// Numbers in the compute type of workspace that forward requests on a GPU.
constexpr int kKlDivWorkspace = 1024;

template <class T>
struct KlDivKernels {
  Kernel<KlDivParams<T>> forward;  // on the CPU also reports the sum and the largest input in `Launch`
  Kernel<KlDivParams<T>> backward;
};

}  // namespace charlm
