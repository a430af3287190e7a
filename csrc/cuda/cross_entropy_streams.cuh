// One pass over rows of any length: losses alone, and gradients from a stored softmax.
#pragma once

#include "cuda/cross_entropy_reduction.cuh"
#include "cuda/cross_entropy_walk.cuh"

namespace charlm::cuda {
namespace {

constexpr int kStreamPacks = 4;  // that a thread loads before it uses the first
constexpr int kStreamThreads = 256;

// Losses. A row is shared by a warp or by the blocks of a cluster.
template <class T, Terms kTerms, int kThreads>
__global__ void __launch_bounds__(kStreamThreads, kTerms == Terms::kAll || sizeof(T) == sizeof(double) ? 2 : 4)
    cross_entropy_forward(const __grid_constant__ CrossEntropyParams<T> params, const int log2_cluster,
                          const __grid_constant__ Reduction reduction) {
  using C = Compute<T>;
  constexpr bool kDense = kTerms != Terms::kPlain;
  constexpr int kWarps = kThreads / kWarp, kRows = kStreamThreads / kThreads;
  using RowSoftmax = Softmax<T, kDense>;
  CHARLM_SHARED(RowSoftmax, parts, 2 * kWarps * kMaxCluster);
  CHARLM_SHARED(TransferBarrier, barriers, 2);
  Joiner<T, kDense, kWarps> joiner(parts, barriers, 1 << log2_cluster);
  const int thread = threadIdx.x % kThreads;
  const int64_t begin = int64_t(blockIdx.x >> log2_cluster) * kRows + threadIdx.x / kThreads;
  const int64_t step = int64_t(gridDim.x >> log2_cluster) * kRows;
  const bool is_first = joiner.rank() == 0 && thread == 0;
  double loss_sum = 0;
  for (int64_t n = begin; n < params.n_rows; n += step) {
    const TermsRow<T, kTerms> row(params, n);
    const T* const x = row.logits();
    RowSoftmax softmax;
    C target_logit = 0;
    if (row.is_counted()) {
      if (is_first) target_logit = row.target_logit(x);
      const RowPart<T> part(x, const_cast<T*>(x), params.n_classes, thread, joiner.rank(), log2_cluster);
      for (int i = 0; i * kThreads < part.left; i += kStreamPacks) {
        uint4 packs[kStreamPacks];
        part.load(i, kThreads, packs);
        add_packs<kTerms>(params, row, softmax, packs, part.left - i * kThreads, kThreads,
                          part.class_ + int64_t(i) * kThreads * kPackSize<T>);
      }
      if (part.single >= 0) add_single<kTerms>(params, row, softmax, x[part.single], part.single);
    }
    if (n == begin) joiner.wait_for_blocks();
    if (row.is_counted()) {
      softmax = joiner.join(softmax);
      row.finish(softmax);
      if (is_first) {
        const C loss = row.loss(softmax, target_logit);
        loss_sum += loss;
        row.store(softmax, loss);
      }
    } else if (is_first) {
      row.store_uncounted();
      if (row.is_bad()) row.record_bad();
    }
  }
  reduce_losses(params, reduction, loss_sum);
}

// Backward after a gradient that forward computed: at most one block for each multiprocessor of an H100, since each
// empty block takes time, and threads enough for the case that there is something to do.
constexpr int kRescaleBlocks = 128;
constexpr int kRescaleThreads = 512;

constexpr int kItemPacks = kWarp * kStreamPacks;

// Pieces of a row, one for each warp: at least one, which has the elements outside of packs.
template <class T>
__host__ __device__ int64_t items_of(int64_t n_classes) {
  const int64_t n_packs = n_classes / kPackSize<T>;
  return n_packs <= kItemPacks ? 1 : (n_packs + kItemPacks - 1) / kItemPacks;
}

__device__ __forceinline__ int64_t row_of_item(int64_t item, int64_t n_items, int64_t end) {
  // A division of 64 bits would take as long as the work on some packs.
  return end <= UINT32_MAX ? static_cast<unsigned>(item) / static_cast<unsigned>(n_items) : item / n_items;
}

// Gradients from a stored softmax. With grad_is_precomputed nothing is left to do if grad_loss is 1: the launch has few
// blocks, which then end at once.
template <class T, CrossEntropyPass kPass, Terms kTerms>
__global__ void __launch_bounds__(kRescaleThreads, kTerms == Terms::kPlain && sizeof(T) < sizeof(double) ? 2 : 1)
    cross_entropy_gradient(const __grid_constant__ CrossEntropyParams<T> params,
                           const __grid_constant__ Reduction reduction) {
  using C = Compute<T>;
  constexpr int K = kPackSize<T>;
  double scale = 1;
  if (kPass == CrossEntropyPass::kBackward && params.grad_is_precomputed) {
    if (grad_loss_of(params, 0) == 1) return;
    // Each block counts all targets itself: for another factor, one launch is still faster than two.
    if (needs_totals(params)) {
      scale = reciprocal<T>(divisor(params, count_targets(params, threadIdx.x, blockDim.x)));
    } else {
      scale = reciprocal<T>(divisor(params, reduction));
    }
  } else {
    scale = reciprocal<T>(divisor(params, reduction));
  }
  const int lane = threadIdx.x % kWarp, n_warps = blockDim.x / kWarp;
  const int64_t n_items = items_of<T>(params.n_classes), end = params.n_rows * n_items;
  for (int64_t item = int64_t(blockIdx.x) * n_warps + threadIdx.x / kWarp; item < end;
       item += int64_t(gridDim.x) * n_warps) {
    const int64_t n = row_of_item(item, n_items, end);
    const int first = static_cast<int>(item - n * n_items) * kStreamPacks;
    TermsRow<T, kTerms> row(params, n);
    if (first == 0 && lane == 0 && row.is_bad()) row.record_bad();
    const bool has_gradient = row.template has_gradient<kPass>();
    if (!has_gradient && !row.template has_zero_gradient<kPass>()) continue;
    const RowPart<T> part(row.logits(), row.grad(), params.n_classes, lane, 0, 0);
    const int64_t single = first == 0 ? part.single : -1;
    if (!has_gradient) {
#pragma unroll
      for (int i = 0; i < kStreamPacks; i++) {
        const int at = (first + i) * kWarp;
        if (at < part.left) store_bits(part.y + int64_t(at) * K, uint4{});
      }
      if (single >= 0) row.grad()[single] = from_compute<T>(0);
      continue;
    }
    uint4 packs[kStreamPacks];
    part.load(first, kWarp, packs);
    // Before anything is written: the gradient may overwrite the logits.
    const T* const x = row.logits();
    const C x_single = single >= 0 ? to_compute(x[single]) : C(0);
    // The target, if this thread has it: its gradient is computed apart.
    int64_t target = -1;
    if (params.has_class_indices && kPass != CrossEntropyPass::kTargetBackward && !row.is_bad() &&
        part.owns(row.target(), kWarp)) {
      const int64_t i = (row.target() - part.class_) / (kWarp * K);
      if (row.target() == single || (row.target() != part.single && i >= first && i < first + kStreamPacks)) {
        target = row.target();
      }
    }
    const C x_target = target >= 0 ? to_compute(x[target]) : C(0);
    row.set_softmax(row.stored(), scale);
    const GradientLine<T, kTerms == Terms::kPlain> line(row);
    const auto gradient = [&](C value, int64_t c, C d) {
      const C z = z_of<kTerms>(params, row, value);
      if constexpr (kPass == CrossEntropyPass::kTargetBackward) return row.target_gradient(z, c);
      if constexpr (kTerms != Terms::kAll) return line.at(z);
      return row.template gradient_of_other<kPass>(z, d);
    };
#pragma unroll
    for (int i = 0; i < kStreamPacks; i++) {
      const int at = (first + i) * kWarp;
      if (at >= part.left) break;
      const int64_t c = part.class_ + int64_t(at) * K;
      C values[K], d[K] = {};
      unpack<T>(packs[i], values);
      if constexpr (kTerms == Terms::kAll && kPass != CrossEntropyPass::kTargetBackward) {
        if (row.has_dense()) row.template dense<K>(c, d);
      }
      if constexpr (kTerms == Terms::kAll && kPass == CrossEntropyPass::kBackward) {
        row.template transform<K>(values);
        row.template gradients_of_others<K>(values, d);
      } else {
#pragma unroll
        for (int k = 0; k < K; k++) values[k] = gradient(values[k], c + k, d[k]);
      }
      store_bits(part.y + int64_t(at) * K, packed<T>(values));
    }
    if (single >= 0) {
      const C d = kTerms == Terms::kAll && row.has_dense() ? row.dense(single) : C(0);
      row.grad()[single] = from_compute<T>(gradient(x_single, single, d));
    }
    if (target >= 0) {  // after the pack that holds it
      row.grad()[target] = from_compute<T>(row.template gradient_of_target<kPass>(z_of<kTerms>(params, row, x_target)));
    }
  }
}

// grad *= factor. The launch has few blocks, which end at once if the factor is 1.
template <class T>
__global__ void __launch_bounds__(kRescaleThreads, 2)
    cross_entropy_scale_gradient(const __grid_constant__ ScaleParams<T> params) {
  const Compute<T> by = load_gradient<T>(params.factor, params.unconverted_factor, 0);
  if (by == 1) return;
  const int lane = threadIdx.x % kWarp, n_warps = blockDim.x / kWarp;
  const int64_t n_items = items_of<T>(params.n_columns), end = params.n_rows * n_items;
  for (int64_t item = int64_t(blockIdx.x) * n_warps + threadIdx.x / kWarp; item < end;
       item += int64_t(gridDim.x) * n_warps) {
    const int64_t n = row_of_item(item, n_items, end);
    const int first = static_cast<int>(item - n * n_items) * kStreamPacks;
    T* const row = params.grad + n * params.stride;
    const RowPart<T> part(row, row, params.n_columns, lane, 0, 0);
    uint4 packs[kStreamPacks];
    part.load(first, kWarp, packs);
#pragma unroll
    for (int i = 0; i < kStreamPacks; i++) {
      const int at = (first + i) * kWarp;
      if (at >= part.left) break;
      Compute<T> x[kPackSize<T>];
      unpack<T>(packs[i], x);
#pragma unroll
      for (Compute<T>& value : x) value *= by;
      store_bits(part.y + int64_t(at) * kPackSize<T>, packed<T>(x));
    }
    if (first == 0 && part.single >= 0) row[part.single] = from_compute<T>(to_compute(row[part.single]) * by);
  }
}

}  // namespace
}  // namespace charlm::cuda
