// What the threads that share a row of classes compute together: reductions over a warp or a block, and the softmax of
// a row. The number of threads fixes the order of a reduction, and all threads get the same bits.
#pragma once

#include <math.h>

#include "cuda/load_store.cuh"

namespace charlm::cuda {
namespace {

// ---------------------------------------------------------------------------------------------------------- reductions

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxWarps = kMaxThreads / kWarp;

// The sum over each group of `lanes` neighbouring lanes, a power of two. All lanes of the warp must call it.
template <class C>
__device__ __forceinline__ C sum_over_lanes(C x, int lanes = kWarp) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The maximum over each group of `lanes` neighbouring lanes. NaN is ignored.
template <class C>
__device__ __forceinline__ C max_over_lanes(C x, int lanes = kWarp) {
  for (int step = lanes / 2; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// Reduces `value` over the threads of the block with join(a, b). `shared` holds kMaxWarps values, and may be used again
// after a barrier. shuffle(value, step) returns `value` of the lane `step` lanes later, or of the first lane if step is
// 0.
template <class Value, class Join, class Shuffle>
__device__ __forceinline__ Value join_over_block(Value value, Value* shared, Value nothing, Join join,
                                                 Shuffle shuffle) {
  const int lane = threadIdx.x % kWarp, n_warps = blockDim.x / kWarp;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = join(value, shuffle(value, step));
  if (lane == 0) shared[threadIdx.x / kWarp] = value;
  __syncthreads();
  value = lane < n_warps ? shared[lane] : nothing;
#pragma unroll
  for (int step = kWarp / 2; step > 0; step /= 2) value = join(value, shuffle(value, step));
  // All lanes take the result of the first, since another order of joining may round differently.
  return shuffle(value, 0);
}

template <class C>
__device__ __forceinline__ C shuffle_down(C value, int step) {
  return step == 0 ? __shfl_sync(kAllLanes, value, 0) : __shfl_down_sync(kAllLanes, value, step);
}

template <class C>
__device__ __forceinline__ C sum_over_block(C value, C* shared) {
  return join_over_block(
      value, shared, C(0), [](C a, C b) { return a + b; }, [](C a, int step) { return shuffle_down(a, step); });
}

// -kHuge replaces -inf where it is multiplied by a probability of 0, so that the product is 0 and not NaN. The
// logarithm of no positive number is as small.
template <class C>
constexpr C kHuge = sizeof(C) == sizeof(float) ? C(0x1p126f) : C(0x1p1022);

// Replaces -inf by -kHuge; NaN stays NaN.
template <class C>
__device__ __forceinline__ C finite(C u) {
  return u < -kHuge<C> ? -kHuge<C> : u;
}

// ------------------------------------------------------------------------------------------------------------- softmax

// 2^x for x <= 0. The result may be 0 for x < -126.
__device__ __forceinline__ float exp2_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));  // 2 ulp; exp2f takes three more instructions, for subnormals
  return y;
#else
  return exp2f(x);
#endif
}

// 1 / x for x >= 1: 1 ulp, or 0 for x >= 2^126.
__device__ __forceinline__ float reciprocal_approximate(float x) {
#ifdef __CUDA_ARCH__
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1 / x;
#endif
}

// e^x for x <= 0, as accurate as T needs: 2^(x * log2 e), and for float a first-order correction of the rounding error
// of the product. NaN stays NaN.
template <class T>
__device__ __forceinline__ float exp_of(float x) {
  constexpr float kLog2e = 1.44269504f, kLog2eRest = 1.92596299e-8f, kLn2 = 0.693147181f;
  constexpr float kSmallest = -87.3365f;  // below this the result is subnormal, and the hardware returns 0
  const float product = x * kLog2e, power = exp2_approximate(product);
  if constexpr (sizeof(T) < sizeof(float)) return power;
  const float lost = fmaf(x, kLog2eRest, fmaf(x, kLog2e, -product));
  return x < kSmallest ? 0.0f : fmaf(power, lost * kLn2, power);
}

template <class T>
__device__ __forceinline__ double exp_of(double x) {
  return exp(x);
}

// The softmax of part of a row, computed online (Milakov and Gimelshein 2018): each thread keeps the largest logit so
// far and the sum of exponentials relative to it, and the results of the threads are joined. With kDense it also has
// the sums over d_c of ops/cross_entropy.h.
template <class T, bool kDense>
struct alignas(sizeof(uint64_t)) Softmax {  // 8 bytes at a time between the blocks of a cluster
  using C = Compute<T>;

  C max = -INFINITY;
  C sum = 0;         // sum_c exp(z_c - reference())
  C dense_loss = 0;  // sum_c d_c (reference() - z_c)
  C dense_sum = 0;   // sum_c d_c

  // The logit that the exponentials are relative to: the maximum, or 0 while all logits are -inf.
  __device__ __forceinline__ C reference() const { return max == -INFINITY ? C(0) : max; }

  // Makes the sums relative to a larger maximum.
  __device__ __forceinline__ void rescale_to(C larger) {
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
    rescale_to(largest);
    const C from = reference();
#pragma unroll
    for (int k = 0; k < K; k++) sum += exp_of<T>(z[k] - from);
  }

  // Call after add() of the same logit.
  __device__ __forceinline__ void add_dense(C z, C d) {
    dense_loss += d * (reference() - z);
    dense_sum += d;
  }

  __device__ __forceinline__ static Softmax join(Softmax a, Softmax b) {
    const C larger = fmax(a.max, b.max);
    a.rescale_to(larger);
    b.rescale_to(larger);
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
