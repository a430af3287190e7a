// Results that the threads of a warp, or of a block, make together. The order is fixed by the number of threads, and
// all threads get the same bits.
#pragma once

#include "cuda.cuh"

namespace charlm::cuda {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarp = 32;
constexpr int kMaxThreads = 1024;  // of a block
constexpr int kMaxWarps = kMaxThreads / kWarp;

// The sum over each group of `lanes` neighbouring lanes (a power of two). All lanes of the warp must call.
template <class C>
__device__ __forceinline__ C sum_over_lanes(C x, int lanes = kWarp) {
  for (int step = lanes / 2; step > 0; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

// The maximum over each group of lanes. A NaN is dropped.
template <class C>
__device__ __forceinline__ C max_over_lanes(C x, int lanes = kWarp) {
  for (int step = lanes / 2; step > 0; step /= 2) x = fmax(x, __shfl_xor_sync(kAllLanes, x, step));
  return x;
}

// join(a, b) over the threads of the block. `shared` has room for kMaxWarps; it may be used again after a barrier.
// `shuffle(value, step)` is `value` of the lane `step` further on, and with step 0 of the first lane.
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
  return shuffle(value, 0);  // one lane's result for all: two orders of joining may round differently
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

}  // namespace
}  // namespace charlm::cuda
