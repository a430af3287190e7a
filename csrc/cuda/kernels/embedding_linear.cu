// embedding_linear's kernels, for every dtype.
#include "embedding_linear.cuh"

namespace charlm::cuda {

#define CHARLM_INSTANTIATE(T)                                                      \
  template int embedding_linear_forward<T>(const EmbeddingLinearRows<T>&, Stream); \
  template int embedding_linear_activation_backward<T>(Activation, const T*, const T*, int64_t, Compute<T>*, Stream);

CHARLM_INSTANTIATE(float)
#ifndef CHARLM_CUDA_FLOAT_ONLY
CHARLM_INSTANTIATE(double)
CHARLM_INSTANTIATE(BFloat16)
CHARLM_INSTANTIATE(Float16)
#endif

}  // namespace charlm::cuda
