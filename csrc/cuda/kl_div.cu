// kl_div on a GPU, element by element. The formulas are in ops/kl_div.h. Each block adds up its elements, and one more
// block adds up the sums of the blocks in order, so that every run gives the same bits.
#include "cuda/rows.cuh"
#include "ops/kl_div.h"

namespace charlm::cuda {
namespace {

constexpr int kThreads = 256;
// Blocks that must fit in a multiprocessor. With 5 or more, the logarithm of double spills registers on 10.0.
template <class T>
constexpr int kResidentBlocks = sizeof(T) == 8 ? 4 : 6;

template <class C>
struct Target {
  C log_t, t;
};

template <class T>
__device__ __forceinline__ Target<Compute<T>> read_target(const KlDivParams<T>& params, int64_t i) {
  const Compute<T> value = to_compute(params.target[i]);
  if (params.log_target) return {value, exp(value)};
  return {log(value), value};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    kl_div_values(const __grid_constant__ KlDivParams<T> params, Compute<T>* sums) {
  using C = Compute<T>;
  CHARLM_SHARED(C, shared, kMaxWarps);
  C sum = 0;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < params.n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const C x = to_compute(params.input[i]);
    const Target<C> target = read_target(params, i);
    const C value = params.log_target ? target.t * (target.log_t - x)
                                      : (target.t == 0 ? C(0) : target.t * target.log_t) - target.t * x;
    if (params.output) {
      params.output[i] = from_compute<T>(value);
    } else {
      sum += value;
    }
  }
  if (params.output) return;
  sum = sum_over_block(sum, shared);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}

template <class T>
__global__ void __launch_bounds__(kThreads) kl_div_total(const Compute<T>* sums, int n_sums, double divisor, T* total) {
  CHARLM_SHARED(double, shared, kMaxWarps);
  double sum = 0;
  for (int i = threadIdx.x; i < n_sums; i += kThreads) sum += sums[i];
  sum = sum_over_block(sum, shared);
  if (threadIdx.x == 0) *total = from_compute<T>(static_cast<Compute<T>>(sum / divisor));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kResidentBlocks<T>)
    kl_div_gradients(const __grid_constant__ KlDivParams<T> params) {
  using C = Compute<T>;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < params.n;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const C g = params.factor * params.grad_output[i * params.grad_stride];
    const Target<C> target = read_target(params, i);
    if (params.grad_input) params.grad_input[i] = from_compute<T>(-target.t * g);
    if (params.grad_target) {
      const C difference = target.log_t - to_compute(params.input[i]);
      // As in torch, t / t is NaN for 0 and infinity.
      const C inner = params.log_target ? target.t * difference + target.t : difference + target.t / target.t;
      params.grad_target[i] = from_compute<T>(inner * g);
    }
  }
}

inline int kl_div_blocks(int64_t n) { return blocks_for(ceil_div(n, 4 * kThreads), kKlDivWorkspace); }

template <class T>
int kl_div_forward(const KlDivParams<T>& params, Launch& launch) {
  auto* const sums = static_cast<Compute<T>*>(launch.workspace);
  const int blocks = kl_div_blocks(params.n);
  const int error = launch_kernel(kl_div_values<T>, blocks, kThreads, 0, launch.stream, params, sums);
  if (error != 0 || params.output) return error;
  return launch_kernel(kl_div_total<T>, 1, kThreads, 0, launch.stream, sums, blocks, params.divisor, params.total);
}

template <class T>
int kl_div_backward(const KlDivParams<T>& params, Launch& launch) {
  return launch_kernel(kl_div_gradients<T>, kl_div_blocks(params.n), kThreads, 0, launch.stream, params);
}

CHARLM_REGISTER_KERNELS(kl_div, {&kl_div_forward<T>, &kl_div_backward<T>});

}  // namespace
}  // namespace charlm::cuda
