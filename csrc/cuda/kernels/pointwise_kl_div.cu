// torch's kl_div, element by element: ../../pointwise_kl_div.h has the formulas. A sum is made by each block of its
// elements, and by one more block over the blocks, in their order: the same bits each time.
#include "convert.cuh"
#include "grid.h"
#include "pointwise_kl_div.h"
#include "reduce.cuh"

namespace charlm::cuda {
namespace {

constexpr int kThreads = 256;
// The blocks that fit in a multiprocessor at once. With 5 or more, double's logarithm spills registers on 10.0.
template <class T>
constexpr int kBlocks = sizeof(T) == 8 ? 4 : 6;

template <class C>
struct Target {
  C log_t, t;
};

template <class T>
__device__ __forceinline__ Target<Compute<T>> read_target(const PointwiseKlDiv<T>& p, int64_t i) {
  const Compute<T> value = to_compute(p.target[i]);
  if (p.log_target) return {value, exp(value)};
  return {log(value), value};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    pointwise_kl_div_values(const __grid_constant__ PointwiseKlDiv<T> p, Compute<T>* sums) {
  using C = Compute<T>;
  CHARLM_SHARED(C, shared, kMaxWarps);
  C sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const C x = to_compute(p.input[i]);
    const Target<C> target = read_target(p, i);
    const C value =
        p.log_target ? target.t * (target.log_t - x) : (target.t == 0 ? C(0) : target.t * target.log_t) - target.t * x;
    if (p.output) {
      p.output[i] = from_compute<T>(value);
    } else {
      sum += value;
    }
  }
  if (p.output) return;
  sum = sum_over_block(sum, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    pointwise_kl_div_total(const Compute<T>* sums, int n_sums, double divisor, T* total) {
  CHARLM_SHARED(double, shared, kMaxWarps);
  double sum = 0;
  for (int i = threadIdx.x; i < n_sums; i += kThreads) sum += sums[i];
  sum = sum_over_block(sum, shared);
  if (threadIdx.x == 0) *total = from_compute<T>(static_cast<Compute<T>>(sum / divisor));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    pointwise_kl_div_gradients(const __grid_constant__ PointwiseKlDiv<T> p) {
  using C = Compute<T>;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < p.n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const C g = p.factor * p.grad_output[i * p.grad_stride];
    const Target<C> target = read_target(p, i);
    if (p.grad_input) p.grad_input[i] = from_compute<T>(-target.t * g);
    if (p.grad_target) {
      const C difference = target.log_t - to_compute(p.input[i]);
      // As torch's: t / t is NaN for 0 and infinity.
      const C inner = p.log_target ? target.t * difference + target.t : difference + target.t / target.t;
      p.grad_target[i] = from_compute<T>(inner * g);
    }
  }
}

inline int pointwise_blocks(int64_t n) {
  const int64_t blocks = ceil_div(n, 4 * kThreads);
  return static_cast<int>(blocks < 1 ? 1 : blocks < kMostPointwiseBlocks ? blocks : kMostPointwiseBlocks);
}

}  // namespace

template <class T>
int pointwise_kl_div_forward(const PointwiseKlDiv<T>& p, Compute<T>* sums, T* total, double divisor, Stream stream) {
  const int blocks = pointwise_blocks(p.n);
  const int error = launch(pointwise_kl_div_values<T>, blocks, kThreads, 0, stream, p, sums);
  if (error != 0 || p.output) return error;
  return launch(pointwise_kl_div_total<T>, 1, kThreads, 0, stream, sums, blocks, divisor, total);
}

template <class T>
int pointwise_kl_div_backward(const PointwiseKlDiv<T>& p, Stream stream) {
  return launch(pointwise_kl_div_gradients<T>, pointwise_blocks(p.n), kThreads, 0, stream, p);
}

#define CHARLM_INSTANTIATE(T)                                                                       \
  template int pointwise_kl_div_forward(const PointwiseKlDiv<T>&, Compute<T>*, T*, double, Stream); \
  template int pointwise_kl_div_backward(const PointwiseKlDiv<T>&, Stream);

CHARLM_INSTANTIATE(float)
#ifndef CHARLM_CUDA_FLOAT_ONLY
CHARLM_INSTANTIATE(double)
CHARLM_INSTANTIATE(BFloat16)
CHARLM_INSTANTIATE(Float16)
#endif

}  // namespace charlm::cuda
