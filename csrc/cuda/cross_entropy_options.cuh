// Rows of few classes with any option, through a ring of chunks in shared memory.
#pragma once

#include "cuda/chunk_ring.cuh"
#include "cuda/cross_entropy_reduction.cuh"
#include "cuda/cross_entropy_row.cuh"

namespace charlm::cuda {
namespace {

// Blocks of a multiprocessor, few enough that no registers are spilled.
template <class T>
constexpr int kOptionsBlocks = sizeof(Compute<T>) == sizeof(float) ? 2 : 1;

constexpr int kLaneClasses = 8;  // classes of a row in each lane

// Any option and type. kForward is kForwardBackward without the gradient.
template <class T, CrossEntropyPass kPass>
__global__ void __launch_bounds__(kSmallThreads, kOptionsBlocks<T>)
    cross_entropy_options(const __grid_constant__ CrossEntropyParams<T> params,
                          const __grid_constant__ SmallLayout layout, const __grid_constant__ Reduction reduction) {
  using C = Compute<T>;
  constexpr bool kWritesLoss = kPass == CrossEntropyPass::kForwardBackward;
  CHARLM_DYNAMIC_SHARED(unsigned char, shared);
  CHARLM_SHARED(TransferBarrier, barriers, kSmallWarps * kMaxStages);
  const bool has_gradient = layout.pass != CrossEntropyPass::kForward;
  const int lanes = layout.lanes, lane = threadIdx.x % lanes, n_classes = static_cast<int>(params.n_classes);
  ChunkRing<T, true> ring(params, layout, chunk_rows_of<T>(lanes), shared, barriers);
  const C scale = row_scale(params, layout.pass, reduction);
  double loss_sum = 0;
  for (; ring.has_chunk(); ring.finish(has_gradient)) {
    T* const chunk = ring.wait();
    for (int first = 0; first < ring.n_rows(); first += kWarp / lanes) {
      // All lanes must take part in the reductions; lanes without a row add nothing.
      const int r = first + threadIdx.x % kWarp / lanes;
      const bool exists = r < ring.n_rows();
      CrossEntropyRow<T, false> row(params, ring.first_row() + (exists ? r : 0));
      T* const x = chunk + (exists ? r : 0) * n_classes;
      const int end = exists ? n_classes : 0;
      C z[kLaneClasses];
#pragma unroll
      for (int k = 0; k < kLaneClasses; k++) {
        const int c = k * lanes + lane;
        z[k] = c < end ? row.transformed(x[c]) : -INFINITY;
      }
      typename CrossEntropyRow<T, false>::RowSoftmax softmax;
      if constexpr (kWritesLoss) {
        const C target_logit = exists ? row.target_logit(x) : C(0);
#pragma unroll
        for (int k = 0; k < kLaneClasses; k++) softmax.max = fmax(softmax.max, z[k]);
        softmax.max = max_over_lanes(softmax.max, lanes);
        row.template add<kLaneClasses>(softmax, z, lane, lanes, end);
        softmax.sum = sum_over_lanes(softmax.sum, lanes);
        softmax.dense_loss = sum_over_lanes(softmax.dense_loss, lanes);
        softmax.dense_sum = sum_over_lanes(softmax.dense_sum, lanes);
        row.finish(softmax);
        if (exists && lane == 0) {
          const C loss = row.is_counted() ? row.loss(softmax, target_logit) : C(0);
          loss_sum += loss;
          if (row.is_counted()) row.store(softmax, loss);
          if (!row.is_counted()) row.store_uncounted();
        }
      } else if (row.template has_gradient<kPass>()) {
        softmax = row.stored();
      }
      if (exists && lane == 0 && row.is_bad()) row.record_bad();
      if (first == 0) ring.refill();
      if (!has_gradient) continue;
      __syncwarp();  // the other lanes of the row have read the logit of the target
      if (row.template has_gradient<kPass>()) row.set_softmax(softmax, scale);
#pragma unroll
      for (int k = 0; k < kLaneClasses; k++) {
        const int c = k * lanes + lane;
        if (c >= end) continue;
        if (row.template has_zero_gradient<kPass>()) x[c] = from_compute<T>(C(0));
        if (row.template has_gradient<kPass>()) {
          x[c] = from_compute<T>(kPass == CrossEntropyPass::kTargetBackward ? row.target_gradient(z[k], c)
                                                                            : row.template gradient<kPass>(z[k], c));
        }
      }
    }
  }
  ring.end();
  if (kWritesLoss) reduce_losses(params, reduction, loss_sum);
}

}  // namespace
}  // namespace charlm::cuda
