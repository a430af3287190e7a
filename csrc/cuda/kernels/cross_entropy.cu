// cross_entropy's kernels, compiled for each floating type.
#include "cross_entropy_launch.cuh"

namespace charlm::cuda {

#define CHARLM_INSTANTIATE(T)                                                                            \
  template int64_t cross_entropy_workspace<T>(int64_t, int64_t);                                         \
  template int cross_entropy_forward(const CrossEntropyRows<T>&, const CrossEntropyLaunch&);             \
  template int cross_entropy_forward_backward(const CrossEntropyRows<T>&, const CrossEntropyLaunch&);    \
  template int cross_entropy_backward(const CrossEntropyRows<T>&, const CrossEntropyLaunch&);            \
  template int cross_entropy_target_backward(const CrossEntropyRows<T>&, const CrossEntropyLaunch&);     \
  template int cross_entropy_metrics(const CrossEntropyRows<T>&, const CrossEntropyMetrics<T>&, Stream); \
  template int cross_entropy_scale_grad(T*, int64_t, int64_t, int64_t, const Compute<T>*, Stream);

CHARLM_INSTANTIATE(float)
#ifndef CHARLM_CUDA_FLOAT_ONLY
CHARLM_INSTANTIATE(double)
CHARLM_INSTANTIATE(BFloat16)
CHARLM_INSTANTIATE(Float16)
#endif

}  // namespace charlm::cuda
