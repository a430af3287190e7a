// cross_entropy on the CPU.
#include "../cross_entropy_ops.h"
#include "cross_entropy_call.h"

namespace charlm {
namespace {

void scale_grad_(Tensor& grad, const Tensor& factor) {
  if (factor.item<double>() != 1) grad.mul_(factor);
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CPU, m) {
  CrossEntropyOps<CrossEntropyCall>::register_in(m);
  m.impl("cross_entropy_scale_grad_", &scale_grad_);
}

}  // namespace charlm
