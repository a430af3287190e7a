// The softmax of a row, made in one walk: each thread keeps the largest of its logits so far and the sum of
// exponentials relative to it, and the threads' results are joined (Milakov and Gimelshein 2018).
#pragma once

#include <math.h>

#include "cuda/reduce.cuh"

namespace charlm::cuda {
namespace {

// 2^x, x <= 0; below -126 it may be 0.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 2 ulp; exp2f adds three instructions for subnormals
  return y;
#else
  return exp2f(x);
#endif
}

// e^x for x <= 0, as accurate as the numbers T that it serves: 2^(x * log2 e), and for float what the product loses is
// made good to first order. NaN stays NaN.
template <class T>
__device__ __forceinline__ float exp_of(float x) {
  constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.92596299e-8f, kLn2 = 0.693147181f;
  constexpr float kSmallest = -87.3365f;  // below, the result is subnormal: the hardware gives 0
  const float product = x * kLog2e, power = exp2_approximate(product);
  if constexpr (sizeof(T) < sizeof(float)) return power;
  const float lost = fmaf(x, kLog2eRest, fmaf(x, kLog2e, -product));
  return x < kSmallest ? 0.0f : fmaf(power, lost * kLn2, power);
}

template <class T>
__device__ __forceinline__ double exp_of(double x) {
  return exp(x);
}

// m, S and the sums over d_c of cross_entropy_row.cuh, of a part of a row. Without kDense the latter are unused.
template <class T, bool kDense>
struct Softmax {
  using C = Compute<T>;

  C max = -INFINITY;
  C sum = 0;         // sum_c exp(z_c - reference())
  C dense_loss = 0;  // sum_c d_c (reference() - z_c)
  C dense_sum = 0;   // sum_c d_c

  // What the sums are relative to: the maximum, or 0 while all logits are -inf.
  __device__ __forceinline__ C reference() const { return max == -INFINITY ? C(0) : max; }

  // Makes the sums relative to a larger maximum.
  __device__ __forceinline__ void raise(C larger) {
    if (!(larger > max)) return;
    const C before = reference();
    sum *= exp_of<T>(max - larger);
    max = larger;
    if constexpr (kDense) dense_loss += (larger - before) * dense_sum;
  }

  template <int K>
  __device__ __forceinline__ void add(const C (&z)[K]) {
    C largest = z[0];
#pragma unroll
    for (int k = 1; k < K; k++) largest = fmax(largest, z[k]);
    raise(largest);
    const C from = reference();
#pragma unroll
    for (int k = 0; k < K; k++) sum += exp_of<T>(z[k] - from);
  }

  // After `add` of the same logit.
  __device__ __forceinline__ void add_dense(C z, C d) {
    dense_loss += d * (reference() - z);
    dense_sum += d;
  }

  __device__ __forceinline__ static Softmax join(Softmax a, Softmax b) {
    const C larger = fmax(a.max, b.max);
    a.raise(larger);
    b.raise(larger);
    a.sum += b.sum;
    if constexpr (kDense) {
      a.dense_loss += b.dense_loss;
      a.dense_sum += b.dense_sum;
    }
    return a;
  }

  __device__ __forceinline__ Softmax shuffled(int step) const {
    Softmax s;
    s.max = shuffle_down(max, step);
    s.sum = shuffle_down(sum, step);
    if constexpr (kDense) {
      s.dense_loss = shuffle_down(dense_loss, step);
      s.dense_sum = shuffle_down(dense_sum, step);
    }
    return s;
  }

  __device__ __forceinline__ Softmax over_block(Softmax* shared) const {
    return join_over_block(*this, shared, Softmax{}, &Softmax::join,
                           [](const Softmax& s, int step) { return s.shuffled(step); });
  }
};

}  // namespace
}  // namespace charlm::cuda
