// Few classes: a block copies a tile of whole rows to shared memory, 16 bytes at a time whatever V is, and each row is
// shared by as many lanes as leave at most 8 classes to each. A gradient goes back the same way. Every byte of the
// logits is read once, every byte of the gradient written once.
#pragma once

#include "cuda/cross_entropy_totals.cuh"

namespace charlm::cuda {
namespace {

constexpr int kTileThreads = 256;
constexpr int kTileClasses = 8;  // of a row that a lane holds
constexpr int kTileMaxClasses = kWarp * kTileClasses;

// Blocks that a multiprocessor is to hold at once: what this leaves of its registers is enough, and none are spilled.
template <class T, bool kPlain>
constexpr int kTileBlocks = kPlain && sizeof(Compute<T>) == sizeof(float) ? 4 : 2;

// Lanes that share a row of V <= kTileMaxClasses classes: a power of two.
inline int tile_lanes(int64_t n_classes) {
  int lanes = 1;
  while (lanes * kTileClasses < n_classes) lanes *= 2;
  return lanes;
}

// Copies n elements between global and shared memory, `at` and `shared` being equally far from a multiple of 16 bytes.
template <bool kToShared, class T>
__device__ __forceinline__ void copy_tile(T* shared, T* at, int n) {
  const int first = elements_to_alignment(at), head = first < n ? first : n;
  const int n_packs = (n - head) / kPackSize<T>;
  const auto copy = [&](int i) {
    if constexpr (kToShared) {
      shared[i] = at[i];
    } else {
      at[i] = shared[i];
    }
  };
  for (int i = threadIdx.x; i < head; i += kTileThreads) copy(i);
#pragma unroll 4
  for (int p = threadIdx.x; p < n_packs; p += kTileThreads) {
    const int i = head + p * kPackSize<T>;
    // As they are, not as T: else ptxas stores the numbers of a pack one by one for some architectures.
    auto* const in_shared = reinterpret_cast<uint4*>(shared + i);
    auto* const in_global = reinterpret_cast<uint4*>(at + i);
    if constexpr (kToShared) {
      *in_shared = *in_global;
    } else {
      *in_global = *in_shared;
    }
  }
  for (int i = head + n_packs * kPackSize<T> + threadIdx.x; i < n; i += kTileThreads) copy(i);
}

// Copies `n_rows` rows of V, a row every `stride` elements in global memory.
template <bool kToShared, class T>
__device__ __forceinline__ void copy_tile(T* shared, T* at, int64_t stride, int n_rows, int n_classes, bool alike) {
  if (stride == n_classes && alike) return copy_tile<kToShared>(shared, at, n_rows * n_classes);
  for (int i = threadIdx.x; i < n_rows * n_classes; i += kTileThreads) {
    const int row = i / n_classes;
    T* const element = at + row * stride + (i - row * n_classes);
    if constexpr (kToShared) {
      shared[i] = *element;
    } else {
      *element = shared[i];
    }
  }
}

template <class T, GpuPass kPass, bool kPlain>
__global__ void __launch_bounds__(kTileThreads, kTileBlocks<T, kPlain>)
    cross_entropy_tile(const __grid_constant__ CrossEntropyParams<T> rows, int lanes, const Totals* totals,
                       int n_totals, double* losses) {
  using C = Compute<T>;
  constexpr bool kWritesLoss = kPass == GpuPass::kForward || kPass == GpuPass::kForwardBackward;
  if (kPass == GpuPass::kBackward && rows.grad_is_precomputed && *rows.grad_loss == 1) return;
  CHARLM_DYNAMIC_SHARED(Pack<T>, room);  // for the tile, and a pack to shift it by
  const double scale = kPass == GpuPass::kForward ? 1 : 1 / divisor(rows, totals, n_totals);
  const int n_classes = static_cast<int>(rows.n_classes), tile_rows = kTileThreads / lanes;
  const int lane = threadIdx.x % lanes, row_in_tile = threadIdx.x / lanes;
  double loss_sum = 0;

  for (int64_t first = int64_t(blockIdx.x) * tile_rows; first < rows.n_rows; first += int64_t(gridDim.x) * tile_rows) {
    const int64_t left = rows.n_rows - first;
    const int n_rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
    const T* const from = rows.logits + first * rows.logits_stride;
    T* const tile = room->values + (kPackSize<T> - elements_to_alignment(from)) % kPackSize<T>;
    copy_tile<true>(tile, const_cast<T*>(from), rows.logits_stride, n_rows, n_classes, true);
    __syncthreads();

    // Threads without a row take part in the sums, as every lane must, with nothing to add.
    const bool has_row = row_in_tile < n_rows;
    CrossEntropyRow<T, kPlain> row(rows, first + (has_row ? row_in_tile : 0));
    T* const x = tile + row_in_tile * n_classes;
    const int end = has_row ? n_classes : 0;
    C z[kTileClasses];
#pragma unroll
    for (int k = 0; k < kTileClasses; k++) {
      const int c = k * lanes + lane;
      z[k] = c < end ? row.transformed(x[c]) : -INFINITY;
    }
    typename CrossEntropyRow<T, kPlain>::RowSoftmax softmax;
    if constexpr (kWritesLoss) {
      const C target_logit = has_row ? row.target_logit(x) : C(0);
#pragma unroll
      for (int k = 0; k < kTileClasses; k++) softmax.max = fmax(softmax.max, z[k]);
      softmax.max = max_over_lanes(softmax.max, lanes);
      row.template add<kTileClasses>(softmax, z, lane, lanes, end);
      softmax.sum = sum_over_lanes(softmax.sum, lanes);
      if constexpr (!kPlain) {
        softmax.dense_loss = sum_over_lanes(softmax.dense_loss, lanes);
        softmax.dense_sum = sum_over_lanes(softmax.dense_sum, lanes);
      }
      row.finish(softmax);
      if (has_row && lane == 0) {
        const C loss = row.is_counted() ? row.loss(softmax, target_logit) : C(0);
        loss_sum += loss;
        if (row.is_counted()) row.store(softmax, loss);
        if (!row.is_counted()) row.store_uncounted();
      }
    } else if (row.template has_gradient<kPass>()) {
      softmax = row.stored();
    }
    if (has_row && lane == 0 && row.is_bad()) row.record_bad();

    if constexpr (kPass != GpuPass::kForward) {
      if constexpr (kWritesLoss) __syncwarp();  // the row's other lanes have read its target's logit
      if (row.template has_gradient<kPass>()) row.set_softmax(softmax, scale);
#pragma unroll
      for (int k = 0; k < kTileClasses; k++) {
        const int c = k * lanes + lane;
        if (c >= end) continue;
        if (row.template has_zero_gradient<kPass>()) x[c] = from_compute<T>(C(0));
        if (row.template has_gradient<kPass>()) {
          x[c] =
              kPass == GpuPass::kTargetBackward ? row.target_gradient(z[k], c) : row.template gradient<kPass>(z[k], c);
        }
      }
      __syncthreads();
      T* const to = rows.grad + first * rows.grad_stride;
      const bool alike = elements_to_alignment(to) == elements_to_alignment(from);
      copy_tile<false>(tile, to, rows.grad_stride, n_rows, n_classes, alike);
    }
    __syncthreads();  // before the next tile is written over this one
  }
  if constexpr (kWritesLoss) {
    CHARLM_SHARED(double, sums, kMaxWarps);
    loss_sum = sum_over_block(loss_sum, sums);
    if (threadIdx.x == 0) losses[blockIdx.x] = loss_sum;
  }
}

template <class T>
int tile_blocks(const CrossEntropyParams<T>& rows) {
  const int64_t tile_rows = kTileThreads / tile_lanes(rows.n_classes);
  const int64_t tiles = (rows.n_rows + tile_rows - 1) / tile_rows;
  return static_cast<int>(tiles < 1 ? 1 : tiles < kMaxBlocks ? tiles : kMaxBlocks);
}

}  // namespace
}  // namespace charlm::cuda
