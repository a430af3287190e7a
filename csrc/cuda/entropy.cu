// entropy on a GPU. The formulas are in ops/entropy.h. Forward makes two passes over a row, for m and for the sums; the
// second reads the row from a cache.
#include "cuda/rows.cuh"
#include "ops/entropy.h"

namespace charlm::cuda {
namespace {

template <class C>
struct EntropyMax {
  C value = -INFINITY;  // NaN is ignored

  __device__ __forceinline__ static EntropyMax join(EntropyMax a, EntropyMax b) { return {fmax(a.value, b.value)}; }
  __device__ __forceinline__ EntropyMax shuffled(int step) const { return {shuffle_down(value, step)}; }
};

template <class C>
struct EntropySums {
  C sum = 0, distance = 0;

  __device__ __forceinline__ static EntropySums join(EntropySums a, EntropySums b) {
    return {a.sum + b.sum, a.distance + b.distance};
  }
  __device__ __forceinline__ EntropySums shuffled(int step) const {
    return {shuffle_down(sum, step), shuffle_down(distance, step)};
  }
};

template <class T, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, kMinResidentBlocks)
    entropy_forward_rows(const __grid_constant__ EntropyParams<T> params) {
  using C = Compute<T>;
  using Threads = RowThreads<kBlock>;
  CHARLM_SHARED(EntropyMax<C>, maxima, kMaxWarps);
  CHARLM_SHARED(EntropySums<C>, sums, kMaxWarps);
  for (int64_t n = Threads::first_row(); n < params.n_rows; n += Threads::row_step()) {
    const T* const z = params.logits + n * params.logits_stride;
    EntropyMax<C> largest;
    for (int64_t c = Threads::first(); c < params.n_classes; c += Threads::step()) {
      largest.value = fmax(largest.value, to_compute(z[c]));
    }
    const C m = Threads::join(largest, maxima).value;
    EntropySums<C> of_row;
    for (int64_t c = Threads::first(); c < params.n_classes; c += Threads::step()) {
      const C t = to_compute(z[c]) - m, e = exp_of<T>(t);
      of_row.sum += e;
      of_row.distance -= e * finite(t);
    }
    of_row = Threads::join(of_row, sums);
    if (Threads::first() != 0) continue;
    const C distance = of_row.distance / of_row.sum;  // NaN (of -inf - -inf) for a row without a softmax
    params.row_max[n] = m;
    params.row_sum[n] = of_row.sum;
    params.row_distance[n] = distance;
    params.entropy[n] = from_compute<T>(log(of_row.sum) + distance);
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, kMinResidentBlocks)
    entropy_backward_rows(const __grid_constant__ EntropyParams<T> params) {
  using C = Compute<T>;
  using Threads = RowThreads<kBlock>;
  for (int64_t n = Threads::first_row(); n < params.n_rows; n += Threads::row_step()) {
    const T* const z = params.logits + n * params.logits_stride;
    T* const grad = params.grad + n * params.n_classes;
    const C m = params.row_max[n], distance = params.row_distance[n],
            factor = params.grad_output[n] / params.row_sum[n];
    for (int64_t c = Threads::first(); c < params.n_classes; c += Threads::step()) {
      const C t = to_compute(z[c]) - m;
      grad[c] = from_compute<T>((exp_of<T>(t) * factor) * (-finite(t) - distance));
    }
  }
}

template <class T>
int entropy_forward(const EntropyParams<T>& params, Launch& launch) {
  const auto kernel = shares_block(params.n_classes) ? entropy_forward_rows<T, true> : entropy_forward_rows<T, false>;
  return launch_kernel(kernel, row_blocks(params.n_rows, params.n_classes), kRowThreads, 0, launch.stream, params);
}

template <class T>
int entropy_backward(const EntropyParams<T>& params, Launch& launch) {
  const auto kernel = shares_block(params.n_classes) ? entropy_backward_rows<T, true> : entropy_backward_rows<T, false>;
  return launch_kernel(kernel, row_blocks(params.n_rows, params.n_classes), kRowThreads, 0, launch.stream, params);
}

CHARLM_REGISTER_KERNELS(entropy, {&entropy_forward<T>, &entropy_backward<T>});

}  // namespace
}  // namespace charlm::cuda
