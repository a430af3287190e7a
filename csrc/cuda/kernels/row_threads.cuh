// The threads that share a row of classes: a warp for few classes, a block for many. They walk over the row by
// neighbours, so that a warp reads 32 of them at once, and join what they found in an order that the launch fixes.
#pragma once

#include "convert.cuh"
#include "grid.h"
#include "reduce.cuh"

namespace charlm::cuda {
namespace {

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
constexpr C kFar = sizeof(C) == sizeof(float) ? C(0x1p126f) : C(0x1p1022);

// NaN stays.
template <class C>
__device__ __forceinline__ C finite(C u) {
  return u < -kFar<C> ? -kFar<C> : u;
}

}  // namespace
}  // namespace charlm::cuda
