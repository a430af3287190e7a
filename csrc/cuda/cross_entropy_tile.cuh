// Few classes: a block copies a tile of whole rows to shared memory, 16 bytes at a time for any V. Several lanes share
// a row, each with at most 8 classes. The gradient is copied back in the same way. Each byte of the logits is read
// once, and each byte of the gradient is written once.
#pragma once

#include "cuda/cross_entropy_row.cuh"

namespace charlm::cuda {
namespace {

constexpr int kTileThreads = 256;
constexpr int kTileClasses = 8;  // classes of a row in each lane
constexpr int kTileMaxClasses = kWarp * kTileClasses;

// Blocks that must fit in a multiprocessor, few enough that no registers are spilled.
template <class T, bool kPlain>
constexpr int kTileResidentBlocks = kPlain && sizeof(Compute<T>) == sizeof(float) ? 4 : 2;

// Lanes that share a row of at most kTileMaxClasses classes: a power of two.
inline int tile_lanes(int64_t n_classes) {
  int lanes = 1;
  while (lanes * kTileClasses < n_classes) lanes *= 2;
  return lanes;
}

// Copies n elements between global and shared memory. Both pointers must have the same alignment mod 16 bytes.
template <bool kToShared, class T>
__device__ __forceinline__ void copy_tile(T* shared, T* global, int n) {
  const int first = elements_to_alignment(global), head = first < n ? first : n;
  const int n_packs = (n - head) / kPackSize<T>;
  const auto copy = [&](int i) {
    if constexpr (kToShared) {
      shared[i] = global[i];
    } else {
      global[i] = shared[i];
    }
  };
  for (int i = threadIdx.x; i < head; i += kTileThreads) copy(i);
#pragma unroll 4
  for (int p = threadIdx.x; p < n_packs; p += kTileThreads) {
    const int i = head + p * kPackSize<T>;
    // Copied as uint4: as Pack<T>, ptxas stores the numbers one by one on some architectures.
    auto* const in_shared = reinterpret_cast<uint4*>(shared + i);
    auto* const in_global = reinterpret_cast<uint4*>(global + i);
    if constexpr (kToShared) {
      *in_shared = *in_global;
    } else {
      *in_global = *in_shared;
    }
  }
  for (int i = head + n_packs * kPackSize<T> + threadIdx.x; i < n; i += kTileThreads) copy(i);
}

// Copies `n_rows` rows of V elements; a row starts every `stride` elements in global memory. `alike`: the alignments
// are the same.
template <bool kToShared, class T>
__device__ __forceinline__ void copy_tile(T* shared, T* global, int64_t stride, int n_rows, int n_classes, bool alike) {
  if (stride == n_classes && alike) return copy_tile<kToShared>(shared, global, n_rows * n_classes);
  for (int i = threadIdx.x; i < n_rows * n_classes; i += kTileThreads) {
    const int row = i / n_classes;
    T* const element = global + row * stride + (i - row * n_classes);
    if constexpr (kToShared) {
      shared[i] = *element;
    } else {
      *element = shared[i];
    }
  }
}

template <class T, CrossEntropyPass kPass, bool kPlain>
__global__ void __launch_bounds__(kTileThreads, kTileResidentBlocks<T, kPlain>)
    cross_entropy_tile(const __grid_constant__ CrossEntropyParams<T> params, int lanes,
                       const __grid_constant__ Reduction reduction) {
  using C = Compute<T>;
  constexpr bool kWritesLoss = kPass == CrossEntropyPass::kForward || kPass == CrossEntropyPass::kForwardBackward;
  CHARLM_DYNAMIC_SHARED(Pack<T>, buffer);  // the tile, and a pack more to align it like the logits
  const double scale = kPass == CrossEntropyPass::kForward ? 1 : reciprocal<T>(divisor(params, reduction));
  const int n_classes = static_cast<int>(params.n_classes), tile_rows = kTileThreads / lanes;
  const int lane = threadIdx.x % lanes, row_in_tile = threadIdx.x / lanes;
  double loss_sum = 0;

  for (int64_t first = int64_t(blockIdx.x) * tile_rows; first < params.n_rows;
       first += int64_t(gridDim.x) * tile_rows) {
    const int64_t left = params.n_rows - first;
    const int n_rows = left < tile_rows ? static_cast<int>(left) : tile_rows;
    const T* const from = params.logits + first * params.logits_stride;
    T* const tile = buffer->values + (kPackSize<T> - elements_to_alignment(from)) % kPackSize<T>;
    copy_tile<true>(tile, const_cast<T*>(from), params.logits_stride, n_rows, n_classes, true);
    __syncthreads();

    // All lanes must take part in the reductions; threads without a row add nothing.
    const bool has_row = row_in_tile < n_rows;
    CrossEntropyRow<T, kPlain> row(params, first + (has_row ? row_in_tile : 0));
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

    if constexpr (kPass != CrossEntropyPass::kForward) {
      if constexpr (kWritesLoss) __syncwarp();  // the other lanes of the row have read the logit of the target
      if (row.template has_gradient<kPass>()) row.set_softmax(softmax, scale);
#pragma unroll
      for (int k = 0; k < kTileClasses; k++) {
        const int c = k * lanes + lane;
        if (c >= end) continue;
        if (row.template has_zero_gradient<kPass>()) x[c] = from_compute<T>(C(0));
        if (row.template has_gradient<kPass>()) {
          x[c] = from_compute<T>(kPass == CrossEntropyPass::kTargetBackward ? row.target_gradient(z[k], c)
                                                                            : row.template gradient<kPass>(z[k], c));
        }
      }
      __syncthreads();
      T* const to = params.grad + first * params.grad_stride;
      const bool alike = elements_to_alignment(to) == elements_to_alignment(from);
      copy_tile<false>(tile, to, params.grad_stride, n_rows, n_classes, alike);
    }
    __syncthreads();  // before the next tile overwrites this one
  }
  if constexpr (kWritesLoss) {
    reduce_losses(params, reduction, loss_sum);
  }
}

template <class T>
int tile_blocks(const CrossEntropyParams<T>& params) {
  const int64_t tile_rows = kTileThreads / tile_lanes(params.n_classes);
  return blocks_for(ceil_div(params.n_rows, tile_rows));
}

}  // namespace
}  // namespace charlm::cuda
