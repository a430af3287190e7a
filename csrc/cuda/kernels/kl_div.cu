// kl_div's kernels, compiled for each floating type.
#include "kl_div.cuh"

namespace charlm::cuda {

#define CHARLM_INSTANTIATE(T)                               \
  template int kl_div_forward(const KlDivRows<T>&, Stream); \
  template int kl_div_backward(const KlDivRows<T>&, Stream);

CHARLM_INSTANTIATE(float)
#ifndef CHARLM_CUDA_FLOAT_ONLY
CHARLM_INSTANTIATE(double)
CHARLM_INSTANTIATE(BFloat16)
CHARLM_INSTANTIATE(Float16)
#endif

}  // namespace charlm::cuda
