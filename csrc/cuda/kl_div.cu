// kl_div on a GPU, element by element. The formulas stand in ops/kl_div.h. Each block adds up its elements, and one
// more block adds up the blocks in their order: the sum has the same bits each time.
#include "cuda/convert.cuh"
#include "cuda/reduce.cuh"
#include "ops/kl_div.h"

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
__device__ __forceinline__ Target<Compute<T>> read_target(const KlDivParams<T>& p, int64_t i) {
  const Compute<T> value = to_compute(p.target[i]);
  if (p.log_target) return {value, exp(value)};
  return {log(value), value};
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>)
    kl_div_values(const __grid_constant__ KlDivParams<T> p, Compute<T>* sums) {
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
__global__ void __launch_bounds__(kThreads) kl_div_total(const Compute<T>* sums, int n_sums, double divisor, T* total) {
  CHARLM_SHARED(double, shared, kMaxWarps);
  double sum = 0;
  for (int i = threadIdx.x; i < n_sums; i += kThreads) sum += sums[i];
  sum = sum_over_block(sum, shared);
  if (threadIdx.x == 0) *total = from_compute<T>(static_cast<Compute<T>>(sum / divisor));
}

template <class T>
__global__ void __launch_bounds__(kThreads, kBlocks<T>) kl_div_gradients(const __grid_constant__ KlDivParams<T> p) {
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

inline int kl_div_blocks(int64_t n) {
  const int64_t blocks = ceil_div(n, 4 * kThreads);
  return static_cast<int>(blocks < 1 ? 1 : blocks < kKlDivWorkspace ? blocks : kKlDivWorkspace);
}

template <class T>
int kl_div_forward(const KlDivParams<T>& p, Launch& at) {
  auto* const sums = static_cast<Compute<T>*>(at.workspace);
  const int blocks = kl_div_blocks(p.n);
  const int error = launch(kl_div_values<T>, blocks, kThreads, 0, at.stream, p, sums);
  if (error != 0 || p.output) return error;
  return launch(kl_div_total<T>, 1, kThreads, 0, at.stream, sums, blocks, p.divisor, p.total);
}

template <class T>
int kl_div_backward(const KlDivParams<T>& p, Launch& at) {
  return launch(kl_div_gradients<T>, kl_div_blocks(p.n), kThreads, 0, at.stream, p);
}

CHARLM_REGISTER_KERNELS(kl_div, {&kl_div_forward<T>, &kl_div_backward<T>});

}  // namespace
}  // namespace charlm::cuda
