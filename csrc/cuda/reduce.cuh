// Results that the threads of a warp, or of a block, make together. The order is fixed by the number of threads, and
// all threads get the same bits.
#pragma once

#include "cuda/convert.cuh"
#include "cuda/cuda.cuh"

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

// ---------------------------------------------------------------------------------------------------------- rows
// The threads that share a row of classes: a warp for few classes, a block for many. They walk over the row by
// neighbours, so that a warp reads 32 of them at once, and join what they found in an order that the launch fixes.

constexpr int kRowThreads = 256;  // of a block
constexpr int64_t kMostClassesOfWarp = 1024;

template <bool kBlock>
struct RowThreads {
  __device__ __forceinline__ static int64_t first_row() {
    return kBlock ? blockIdx.x : (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / kWarp;
  }
  __device__ __forceinline__ static int64_t row_step() {
    return kBlock ? gridDim.x : static_cast<int64_t>(gridDim.x) * (blockDim.x / kWarp);
  }
  __device__ __forceinline__ static int first() { return kBlock ? threadIdx.x : threadIdx.x % kWarp; }
  __device__ __forceinline__ static int step() { return kBlock ? blockDim.x : kWarp; }

  // Value::join(a, b) over the threads; all get the same bits. `shared` has room for kMaxWarps and is not used by a
  // warp; between two uses of it there must be a barrier, which a join of other memory is.
  template <class Value>
  __device__ __forceinline__ static Value join(Value value, Value* shared) {
    const auto shuffle = [](const Value& v, int by) { return v.shuffled(by); };
    if constexpr (kBlock) {
      return join_over_block(value, shared, Value{}, &Value::join, shuffle);
    } else {
#pragma unroll
      for (int by = kWarp / 2; by > 0; by /= 2) value = Value::join(value, shuffle(value, by));
      return shuffle(value, 0);
    }
  }
};

inline bool shares_block(int64_t n_classes) { return n_classes > kMostClassesOfWarp; }

inline int row_blocks(int64_t n_rows, int64_t n_classes) {
  const int64_t blocks = shares_block(n_classes) ? n_rows : ceil_div(n_rows, kRowThreads / kWarp);
  return static_cast<int>(blocks < 1 ? 1 : blocks < kMaxBlocks ? blocks : kMaxBlocks);
}

// What -inf becomes where it is multiplied by a probability of 0: the product is 0. No logarithm of a number reaches
// it.
template <class C>
constexpr C kHuge = sizeof(C) == sizeof(float) ? C(0x1p126f) : C(0x1p1022);

// NaN stays.
template <class C>
__device__ __forceinline__ C finite(C u) {
  return u < -kHuge<C> ? -kHuge<C> : u;
}

}  // namespace
}  // namespace charlm::cuda
