// Rows of whole packs of 16 bytes, from global memory into registers and back. L lanes of a warp share a row.
#pragma once

#include "cuda/cross_entropy_lanes.cuh"

namespace charlm::cuda {
namespace {

constexpr int kMaxPacks = 8;  // of a lane

// Blocks of a multiprocessor, few enough that no registers are spilled.
template <class T, int L, int K, bool kPlain>
constexpr int kPacksBlocks = K > 4 || (L == 2 && K == 4 && !kPlain && sizeof(T) < sizeof(float)) ? 2
                             : !kPlain || sizeof(T) < sizeof(float)                              ? 3
                                                                                                 : 4;

// Of a row, L lanes have up to K packs each: lane j has packs j, j + L, ...
template <class T, int L, int K>
struct RowInPacks {
  static constexpr int kWords = K * kPackBytes / 4;
  static constexpr bool kIsShared = false;

  const CrossEntropyParams<T>& params;
  const int chunk;  // of kWarp / L rows

  __device__ __forceinline__ static int lane() { return opaque(threadIdx.x) % L; }
  // Packs from this lane's first to the end of the row.
  __device__ __forceinline__ int n_left() const { return static_cast<int>(params.n_classes) / kPackSize<T> - lane(); }
  // Computed anew: registers are scarce.
  __device__ __forceinline__ int64_t n() const {
    return int64_t(opaque(chunk)) * (kWarp / L) + opaque(threadIdx.x) % kWarp / L;
  }
  __device__ __forceinline__ const T* from() const { return params.logits + n() * params.logits_stride; }
  __device__ __forceinline__ T* to() const { return params.grad + n() * params.grad_stride; }

  __device__ __forceinline__ void load(uint32_t (&words)[kWords]) const {
    const bool exists = n() < params.n_rows;
    const int left = n_left();
    const T* const first = from() + lane() * kPackSize<T>;
#pragma unroll
    for (int k = 0; k < K; k++) {
      uint4 pack = bits_of_minus_infinity<T>();
      if (exists && k * L < left) pack = load_bits(first + k * L * kPackSize<T>);
      words[4 * k] = pack.x;
      words[4 * k + 1] = pack.y;
      words[4 * k + 2] = pack.z;
      words[4 * k + 3] = pack.w;
    }
  }

  __device__ __forceinline__ bool owns(int c) const { return c / kPackSize<T> % L == lane(); }
  __device__ __forceinline__ T logit(int c) const { return from()[c]; }
  __device__ __forceinline__ void put(int c, T y) const { to()[c] = y; }

  __device__ __forceinline__ float spread(const uint32_t (&words)[kWords], float max, float logit_scale) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      if (k / 4 * L < n_left()) sum += spread_of<T>(words[k], max, logit_scale);
    }
    return sum;
  }

  __device__ __forceinline__ void store(const float (&values)[kWords * kWordSize<T>], float, float a, float b) const {
    const int left = n_left();
    T* const y = to() + lane() * kPackSize<T>;
#pragma unroll
    for (int k = 0; k < K; k++) {
      if (k * L >= left) break;
      uint4 pack;
      const float* const first = values + k * kPackSize<T>;
      pack.x = gradient_of<T>(first, a, b);
      pack.y = gradient_of<T>(first + kWordSize<T>, a, b);
      pack.z = gradient_of<T>(first + 2 * kWordSize<T>, a, b);
      pack.w = gradient_of<T>(first + 3 * kWordSize<T>, a, b);
      store_bits(y + k * L * kPackSize<T>, pack);
    }
  }

  __device__ __forceinline__ void store_zero() const {
    T* const y = to() + lane() * kPackSize<T>;
#pragma unroll 1
    for (int i = 0; i < n_left(); i += L) store_bits(y + i * kPackSize<T>, uint4{});
  }
};

// kPrefetch: the next rows are loaded before the gradient of these is computed.
template <class T, int L, int K, bool kPlain, bool kPrefetch>
__global__ void __launch_bounds__(kSmallThreads, kPacksBlocks<T, L, K, kPlain>)
    cross_entropy_packs(const __grid_constant__ CrossEntropyParams<T> params, SmallLayout layout,
                        const __grid_constant__ Reduction reduction) {
  using Row = RowInPacks<T, L, K>;
  constexpr int kRows = kWarp / L;  // of a warp
  const CrossEntropyPass pass =
      kPrefetch && layout.pass != CrossEntropyPass::kForward ? CrossEntropyPass::kForwardBackward : layout.pass;
  const int row_in_chunk = threadIdx.x % kWarp / L, warp = threadIdx.x / kWarp;
  const int step = gridDim.x * kSmallWarps;
  const auto has = [&](int chunk) { return int64_t(chunk) * kRows < params.n_rows; };
  CHARLM_SHARED(SmallState, state, 1);
  uint32_t words[Row::kWords];
  LoadedIndex next;
  const auto load = [&](int chunk) {
    const int64_t n = int64_t(chunk) * kRows + row_in_chunk;
    Row{params, chunk}.load(words);
    if (n < params.n_rows) next.load(params.target, n);
  };
  int chunk = kPrefetch ? warp * gridDim.x + blockIdx.x : blockIdx.x * kSmallWarps + warp;
  if (has(chunk)) load(chunk);
  state->begin(params, pass, reduction);
  for (; has(chunk); chunk += step) {
    const SmallRow<T> row(params, pass, chunk, kRows, row_in_chunk, threadIdx.x % L == 0, next);
    pass_over_row<kPlain, T, L>(params, pass, row, Row{params, chunk}, words, *state, [&] {
      if (kPrefetch && has(chunk + step)) load(chunk + step);
    });
    if (!kPrefetch && has(chunk + step)) load(chunk + step);
  }
  if (pass != CrossEntropyPass::kBackward) reduce_losses(params, reduction, state->loss_sum());
}

}  // namespace
}  // namespace charlm::cuda
