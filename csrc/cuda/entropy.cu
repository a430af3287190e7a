// entropy on a GPU. The formulas stand in ops/entropy.h. Forward makes two passes over a row, for m and then for the
// sums; in the second the row is in a cache.
#include "cuda/reduce.cuh"
#include "cuda/softmax.cuh"
#include "ops/entropy.h"

namespace charlm::cuda {
namespace {

template <class C>
struct EntropyMax {
  C value = -INFINITY;  // a NaN is dropped

  __device__ __forceinline__ static EntropyMax join(EntropyMax a, EntropyMax b) { return {fmax(a.value, b.value)}; }
  __device__ __forceinline__ EntropyMax shuffled(int by) const { return {shuffle_down(value, by)}; }
};

template <class C>
struct EntropySums {
  C sum = 0, distance = 0;

  __device__ __forceinline__ static EntropySums join(EntropySums a, EntropySums b) {
    return {a.sum + b.sum, a.distance + b.distance};
  }
  __device__ __forceinline__ EntropySums shuffled(int by) const {
    return {shuffle_down(sum, by), shuffle_down(distance, by)};
  }
};

template <class T, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    entropy_forward_rows(const __grid_constant__ EntropyParams<T> rows) {
  using C = Compute<T>;
  using Threads = RowThreads<kBlock>;
  CHARLM_SHARED(EntropyMax<C>, maxima, kMaxWarps);
  CHARLM_SHARED(EntropySums<C>, sums, kMaxWarps);
  for (int64_t n = Threads::first_row(); n < rows.n_rows; n += Threads::row_step()) {
    const T* const z = rows.logits + n * rows.logits_stride;
    EntropyMax<C> largest;
    for (int64_t c = Threads::first(); c < rows.n_classes; c += Threads::step()) {
      largest.value = fmax(largest.value, to_compute(z[c]));
    }
    const C m = Threads::join(largest, maxima).value;
    EntropySums<C> of_row;
    for (int64_t c = Threads::first(); c < rows.n_classes; c += Threads::step()) {
      const C t = to_compute(z[c]) - m, e = exp_of<T>(t);
      of_row.sum += e;
      of_row.distance -= e * finite(t);
    }
    of_row = Threads::join(of_row, sums);
    if (Threads::first() != 0) continue;
    const C distance = of_row.distance / of_row.sum;  // 0 / 0 is the NaN of a row without a softmax
    rows.row_max[n] = m;
    rows.row_sum[n] = of_row.sum;
    rows.row_distance[n] = distance;
    rows.entropy[n] = from_compute<T>(log(of_row.sum) + distance);
  }
}

template <class T, bool kBlock>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    entropy_backward_rows(const __grid_constant__ EntropyParams<T> rows) {
  using C = Compute<T>;
  using Threads = RowThreads<kBlock>;
  for (int64_t n = Threads::first_row(); n < rows.n_rows; n += Threads::row_step()) {
    const T* const z = rows.logits + n * rows.logits_stride;
    T* const grad = rows.grad + n * rows.n_classes;
    const C m = rows.row_max[n], distance = rows.row_distance[n], factor = rows.grad_output[n] / rows.row_sum[n];
    for (int64_t c = Threads::first(); c < rows.n_classes; c += Threads::step()) {
      const C t = to_compute(z[c]) - m;
      grad[c] = from_compute<T>((exp_of<T>(t) * factor) * (-finite(t) - distance));
    }
  }
}

template <class T>
int entropy_forward(const EntropyParams<T>& rows, Launch& at) {
  const auto kernel = shares_block(rows.n_classes) ? entropy_forward_rows<T, true> : entropy_forward_rows<T, false>;
  return launch(kernel, row_blocks(rows.n_rows, rows.n_classes), kRowThreads, 0, at.stream, rows);
}

template <class T>
int entropy_backward(const EntropyParams<T>& rows, Launch& at) {
  const auto kernel = shares_block(rows.n_classes) ? entropy_backward_rows<T, true> : entropy_backward_rows<T, false>;
  return launch(kernel, row_blocks(rows.n_rows, rows.n_classes), kRowThreads, 0, at.stream, rows);
}

CHARLM_REGISTER_KERNELS(entropy, {&entropy_forward<T>, &entropy_backward<T>});

}  // namespace
}  // namespace charlm::cuda
