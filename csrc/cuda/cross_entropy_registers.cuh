// Loss and gradient of rows that fit in the registers of their threads: of a warp, of a block, or of a cluster of
// blocks. Every byte is read once and written once, and while the threads of one row wait for each other, other blocks
// load and store.
#pragma once

#include "cuda/cross_entropy_walk.cuh"

namespace charlm::cuda {
namespace {

// kThreads of a block share a row with the other blocks of its cluster; each has kPacks packs. A row of one warp is one
// of four of a block.
template <class T, Terms kTerms, int kThreads, int kPacks>
struct RegisterShape {
  static constexpr int kBlockThreads = kThreads < 128 ? 128 : kThreads;
  static constexpr int kRows = kBlockThreads / kThreads;  // of a block
  // Registers for 1024 threads of a multiprocessor: 64 each. What kAll computes for a class needs more.
  static constexpr int kResidentThreads = kTerms == Terms::kAll ? 512 : 1024;
  static constexpr int kResidentBlocks = kResidentThreads / kBlockThreads < 1 ? 1 : kResidentThreads / kBlockThreads;
};

template <class T, Terms kTerms, int kThreads, int kPacks>
__global__ void __launch_bounds__(RegisterShape<T, kTerms, kThreads, kPacks>::kBlockThreads,
                                  RegisterShape<T, kTerms, kThreads, kPacks>::kResidentBlocks)
    cross_entropy_registers(const __grid_constant__ CrossEntropyParams<T> params, const int log2_cluster,
                            const __grid_constant__ Reduction reduction) {
  using Shape = RegisterShape<T, kTerms, kThreads, kPacks>;
  using Row = TermsRow<T, kTerms>;
  using C = Compute<T>;
  constexpr CrossEntropyPass kPass = CrossEntropyPass::kForwardBackward;
  constexpr bool kDense = kTerms != Terms::kPlain;
  constexpr int kWarps = kThreads / kWarp, K = kPackSize<T>;
  using RowSoftmax = Softmax<T, kDense>;
  CHARLM_SHARED(RowSoftmax, parts, 2 * kWarps * kMaxCluster);
  CHARLM_SHARED(TransferBarrier, barriers, 2);
  CHARLM_SHARED(double, scales, Shape::kBlockThreads / kWarp);
  double* const scale = scales + threadIdx.x / kWarp;  // of each warp: registers are scarce
  Joiner<T, kDense, kWarps> joiner(parts, barriers, 1 << log2_cluster);
  const int thread = threadIdx.x % kThreads;
  // Fewer than 2^31: a row has more than kTileMaxClasses classes.
  const int begin = (blockIdx.x >> log2_cluster) * Shape::kRows + threadIdx.x / kThreads;
  const int step = (gridDim.x >> log2_cluster) * Shape::kRows, n_rows = static_cast<int>(params.n_rows);
  const bool is_first = joiner.rank() == 0 && thread == 0;
  double loss_sum = 0;

  for (int n = begin; n < n_rows; n += step) {
    Row row(params, n);
    const bool is_counted = row.is_counted();
    const int target = is_counted ? static_cast<int>(row.target()) : -1;
    const RowPart<T, int> part(row.logits(), row.grad(), static_cast<int>(params.n_classes), thread, joiner.rank(),
                               log2_cluster, target);
    const bool owns_target = part.owns(target, thread, kThreads);
    // Before anything is written: the gradient may overwrite the logits.
    const C target_logit = owns_target ? row.target_logit(row.logits()) : C(0);
    T single = from_compute<T>(-INFINITY);
    if (part.single >= 0) single = row.logits()[part.single];
    uint4 packs[kPacks];
    RowSoftmax softmax;
    if (is_counted) {
      part.load(0, kThreads, packs);
      add_packs<kTerms>(params, row, softmax, packs, part.left, kThreads, part.class_);
      if (part.single >= 0) add_single<kTerms>(params, row, softmax, single, part.single);
    }
    if (n == begin) joiner.wait_for_blocks();
    if (is_counted) {
      softmax = joiner.join(softmax);
      row.finish(softmax);
    }
    if (n == begin) {
      const double divided_by = divisor(params, reduction);
      if (threadIdx.x % kWarp == 0) *scale = 1 / divided_by;
      __syncwarp();
    }

    if (!is_counted) {
      if (is_first) {
        row.store_uncounted();
        if (row.is_bad()) row.record_bad();
      }
      if (!row.template has_zero_gradient<kPass>()) continue;
#pragma unroll
      for (int i = 0; i < kPacks; i++) {
        if (i * kThreads < part.left) store_bits(part.y + i * kThreads * K, uint4{});
      }
      if (part.single >= 0) row.grad()[part.single] = from_compute<T>(0);
      continue;
    }

    if (params.has_class_indices ? owns_target : is_first) {
      const C loss = row.loss(softmax, target_logit);
      loss_sum += loss;
      row.store(softmax, loss);
    }
    row.set_softmax(softmax, *scale);
    const auto line = row.line();
    const C max = row.max();
    if (part.single >= 0) {
      const C z = z_of<kTerms>(params, row, to_compute(single));
      row.grad()[part.single] =
          from_compute<T>(kTerms == Terms::kAll ? row.template gradient<kPass>(z, part.single) : line.at(z, max));
    }
    const T gradient_of_target =
        from_compute<T>(owns_target ? row.template gradient_of_target<kPass>(target_logit) : C(0));
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      if (i * kThreads >= part.left) break;
      C x[K], d[K] = {};
      unpack_again<T>(packs[i], x);
      if constexpr (kTerms == Terms::kAll) {
        if (row.has_dense()) row.template dense<K>(part.class_ + i * kThreads * K, d);
      }
#pragma unroll
      for (int k = 0; k < K; k++) {
        const C z = z_of<kTerms>(params, row, x[k]);
        x[k] = kTerms == Terms::kAll ? row.template gradient_of_other<kPass>(z, d[k]) : line.at(z, max);
      }
      store_bits(part.y + i * kThreads * K, packed<T>(x));
    }
    if (owns_target) row.grad()[target] = gradient_of_target;  // after the pack that holds it
  }
  reduce_losses(params, reduction, loss_sum);
}

}  // namespace
}  // namespace charlm::cuda
