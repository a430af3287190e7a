// What a reduction divides by, and the reduction itself. Partial results lie in the workspace; whoever needs them adds
// them up in their order, so that no block waits for another and the same bits come out each time.
#pragma once

#include "cuda/cross_entropy_row.cuh"

namespace charlm::cuda {
namespace {

struct Totals {
  double weight;  // of the targets that are not ignored
  int64_t count;
};

// The targets are counted by so many blocks at most: each lane of a warp adds up a few of their totals.
constexpr int kTotalsPerLane = 4;
constexpr int kMaxTotals = kTotalsPerLane * kWarp;
constexpr int kTotalsThreads = 256;
constexpr int kTargetsInFlight = 4;  // that a thread waits for at once

template <class T>
bool needs_totals(const CrossEntropyParams<T>& rows) {
  return rows.mean && (rows.has_target || rows.token_weight);
}

template <class T>
__global__ void __launch_bounds__(kTotalsThreads, kMinBlocks)
    cross_entropy_totals(const __grid_constant__ CrossEntropyParams<T> rows, Totals* totals) {
  if (rows.grad_is_precomputed && *rows.grad_loss == 1) return;  // nor will the next kernel do anything
  CHARLM_SHARED(double, weights, kMaxWarps);
  CHARLM_SHARED(int64_t, counts, kMaxWarps);
  double weight = 0;
  int64_t count = 0;
  const int64_t step = int64_t(gridDim.x) * kTotalsThreads;
  for (int64_t first = blockIdx.x * kTotalsThreads + threadIdx.x; first < rows.n_rows;
       first += kTargetsInFlight * step) {
    int64_t targets[kTargetsInFlight];
    if (rows.has_target) load_indices(rows.target, first, step, rows.n_rows, targets);
#pragma unroll
    for (int k = 0; k < kTargetsInFlight; k++) {
      const int64_t n = first + k * step;
      if (n >= rows.n_rows) break;
      double w = rows.token_weight ? rows.token_weight[n] : 1;
      if (rows.has_target) {
        if ((rows.may_ignore && targets[k] == rows.ignore_index) || !in_range(rows.target, targets[k])) continue;
        if (rows.weight) w *= rows.weight[targets[k]];
      }
      weight += w;
      count++;
    }
  }
  weight = sum_over_block(weight, weights);
  count = sum_over_block(count, counts);
  if (threadIdx.x == 0) totals[blockIdx.x] = {weight, count};
}

// What the sum of the losses is divided by. All lanes of a warp must call.
template <class T>
__device__ __forceinline__ double divisor(const CrossEntropyParams<T>& rows, const Totals* totals, int n_totals) {
  if (!rows.mean) return 1;
  if (n_totals == 0) return rows.zero_if_all_ignored && rows.n_rows == 0 ? 1 : static_cast<double>(rows.n_rows);
  double weight = 0;
  int64_t count = 0;
#pragma unroll
  for (int k = 0; k < kTotalsPerLane; k++) {
    const int i = k * kWarp + threadIdx.x % kWarp;
    weight += i < n_totals ? totals[i].weight : 0;
    count += i < n_totals ? totals[i].count : 0;
  }
  weight = sum_over_lanes(weight);
  return rows.zero_if_all_ignored && sum_over_lanes(count) == 0 ? 1 : weight;
}

// One block: the sum or mean of the losses from the sums that the blocks of a kernel made.
template <class T>
__global__ void __launch_bounds__(kMaxThreads)
    cross_entropy_reduce(const __grid_constant__ CrossEntropyParams<T> rows, const Totals* totals, int n_totals,
                         const double* losses, int n_losses) {
  CHARLM_SHARED(double, sums, kMaxWarps);
  double sum = 0;
  for (int i = threadIdx.x; i < n_losses; i += blockDim.x) sum += losses[i];
  sum = sum_over_block(sum, sums);
  const double divided_by = divisor(rows, totals, n_totals);
  if (threadIdx.x != 0) return;
  const bool none = rows.mean && !rows.zero_if_all_ignored && (rows.n_rows == 0 || rows.n_classes == 0);
  const auto loss = static_cast<Compute<T>>(none ? double(NAN) : sum / divided_by);
  if (rows.is_loss_unrounded) {
    *static_cast<Compute<T>*>(rows.reduced_loss) = loss;
  } else {
    *static_cast<T*>(rows.reduced_loss) = from_compute<T>(loss);
  }
}

}  // namespace
}  // namespace charlm::cuda
