// The log-sum-exp, the entropy and the arg max of each row, and the scaling of a gradient in place.
#pragma once

#include "cross_entropy_block.cuh"

namespace charlm::cuda {
namespace {

// The largest logit and the first class that has it; a NaN is larger than any number.
template <class C>
struct Largest {
  C value = -INFINITY;
  int64_t c = INT64_MAX;

  __device__ __forceinline__ static Largest join(Largest a, Largest b) {
    const bool a_nan = a.value != a.value, b_nan = b.value != b.value;
    const bool same = a.value == b.value || (a_nan && b_nan);
    const bool take_b = same ? b.c < a.c : b_nan || (!a_nan && b.value > a.value);
    return take_b ? b : a;
  }
};

// A block for each row, which is read twice: for the maximum, then for the sums relative to it.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_metrics_kernel(const __grid_constant__ CrossEntropyRows<T> rows, CrossEntropyMetrics<T> out) {
  using C = Compute<T>;
  CHARLM_SHARED(Largest<C>, parts, kMaxWarps);
  CHARLM_SHARED(C, sums, kMaxWarps);
  CHARLM_SHARED(C, spreads, kMaxWarps);
  for (int64_t n = blockIdx.x; n < rows.n_rows; n += gridDim.x) {
    const CrossEntropyRow<T, false> row(rows, n);
    const T* const x = row.logits();
    Largest<C> largest;
    for (int64_t c = threadIdx.x; c < rows.n_classes; c += blockDim.x) {
      largest = Largest<C>::join(largest, {row.transformed(x[c]), c});
    }
    __syncthreads();  // the parts of the row before have been read
    largest = join_over_block(largest, parts, Largest<C>{}, &Largest<C>::join, [](const Largest<C>& a, int step) {
      return Largest<C>{shuffle_down(a.value, step), shuffle_down(a.c, step)};
    });
    const C m = largest.value;
    C sum = 0, spread = 0;
    for (int64_t c = threadIdx.x; c < rows.n_classes; c += blockDim.x) {
      const C z = row.transformed(x[c]), e = exp_of<C>(z - m);
      sum += e;
      if (e != 0) spread += e * (m - z);  // a class of probability 0 adds nothing, even where z = -inf
    }
    sum = sum_over_block(sum, sums);
    spread = sum_over_block(spread, spreads);
    if (threadIdx.x != 0) continue;
    const C log_sum = log(sum);
    out.lse[n] = m == INFINITY || m == -INFINITY ? m : m + log_sum;
    out.entropy[n] = log_sum + spread / sum;
    out.predicted_tokens[n] = largest.c;
  }
}

template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_scale_grad_kernel(T* grad, int64_t n_rows, int64_t n_classes, int64_t stride,
                                    const Compute<T>* factor) {
  const Compute<T> by = *factor;
  if (by == 1) return;
  for (int64_t n = blockIdx.x; n < n_rows; n += gridDim.x) {
    T* const y = grad + n * stride;
    const Span<T> span(y, y, n_classes);
    const auto scaled = [&](T value) { return from_compute<T>(to_compute(value) * by); };
    span.for_each_single([&](int64_t i) { y[i] = scaled(y[i]); });
    span.template for_each_pack<kLoadsInFlight>([&](int64_t p) { return load_pack(y + span.pack(p)); },
                                                [&](int64_t p, Pack<T> pack) {
#pragma unroll
                                                  for (T& value : pack.values) value = scaled(value);
                                                  store_pack(y + span.pack(p), pack);
                                                });
  }
}

}  // namespace
}  // namespace charlm::cuda
