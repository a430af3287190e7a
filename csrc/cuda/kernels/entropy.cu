// entropy's kernels, compiled for each floating type.
#include "entropy.cuh"

namespace charlm::cuda {

#define CHARLM_INSTANTIATE(T)                                  \
  template int entropy_forward(const EntropyRows<T>&, Stream); \
  template int entropy_backward(const EntropyRows<T>&, Stream);

CHARLM_INSTANTIATE(float)
#ifndef CHARLM_CUDA_FLOAT_ONLY
CHARLM_INSTANTIATE(double)
CHARLM_INSTANTIATE(BFloat16)
CHARLM_INSTANTIATE(Float16)
#endif

}  // namespace charlm::cuda
