// The divisor of a mean, and the reduction of the losses. Each block writes a partial result to the workspace, and who
// needs the result adds them in the order of the blocks: no block waits for another, and every run gives the same bits.
// A call is two kernels: cross_entropy_prepare, and one that computes losses or gradients. On sm_90 and later the
// second begins at once and waits for the first only where it needs the divisor.
#pragma once

#include "cuda/async.cuh"
#include "cuda/rows.cuh"
#include "ops/cross_entropy.h"

namespace charlm::cuda {
namespace {

// Of the targets that are not ignored.
struct Totals {
  double weight = 0;
  int64_t count = 0;
};

// Blocks that count the targets: each lane of a warp adds up two of their totals.
constexpr int kMaxTotals = 2 * kWarp;
constexpr int kTotalsThreads = 1024;
constexpr int kTargetsInFlight = 4;  // targets that a thread loads at once

// What the kernels of a call share.
struct Reduction {
  Totals* totals = nullptr;        // [kMaxTotals], of which n_totals are written
  double* losses = nullptr;        // [kMaxBlocks], by the blocks of the second kernel
  unsigned* n_finished = nullptr;  // [], of these blocks
  double known_divisor = 1;        // without totals
  int n_totals = 0;
  bool is_dependent = false;  // the second kernel must wait for the first
};

template <class T>
__host__ __device__ bool needs_totals(const CrossEntropyParams<T>& params) {
  return params.mean && (params.has_class_indices || params.token_weight);
}

// Counts the targets first, first + step, ... of each thread of a block. All threads get the sum.
template <class T>
__device__ __forceinline__ Totals count_targets(const CrossEntropyParams<T>& params, int64_t first, int64_t step) {
  CHARLM_SHARED(double, weights, kMaxWarps);
  CHARLM_SHARED(int64_t, counts, kMaxWarps);
  Totals sum;
  for (; first < params.n_rows; first += kTargetsInFlight * step) {
    int64_t targets[kTargetsInFlight];
    if (params.has_class_indices) load_indices(params.target, first, step, params.n_rows, targets);
#pragma unroll
    for (int k = 0; k < kTargetsInFlight; k++) {
      const int64_t n = first + k * step;
      if (n >= params.n_rows) break;
      double w = params.token_weight ? params.token_weight[n] : 1;
      if (params.has_class_indices) {
        if ((params.may_ignore && targets[k] == params.ignore_index) || !in_range(params.target, targets[k])) continue;
        if (params.weight) w *= params.weight[targets[k]];
      }
      sum.weight += w;
      sum.count++;
    }
  }
  sum.count = sum_over_block(sum.count, counts);
  sum.weight =
      params.weight || params.token_weight ? sum_over_block(sum.weight, weights) : static_cast<double>(sum.count);
  return sum;
}

template <class T>
__global__ void __launch_bounds__(kTotalsThreads)
    cross_entropy_prepare(const __grid_constant__ CrossEntropyParams<T> params, const Reduction reduction) {
  if (reduction.is_dependent) let_next_kernel_begin();
  if (blockIdx.x == 0 && threadIdx.x == 0) *reduction.n_finished = 0;
  if (reduction.n_totals == 0) return;
  const Totals totals =
      count_targets(params, blockIdx.x * kTotalsThreads + threadIdx.x, int64_t(gridDim.x) * kTotalsThreads);
  if (threadIdx.x == 0) reduction.totals[blockIdx.x] = totals;
}

// The divisor of the sum of the losses.
template <class T>
__host__ __device__ __forceinline__ double divisor(const CrossEntropyParams<T>& params, const Totals& totals) {
  return params.zero_if_all_ignored && totals.count == 0 ? 1 : totals.weight;
}

// The same, from what cross_entropy_prepare wrote, for which it waits. All threads of the block must call it.
template <class T>
__device__ __forceinline__ double divisor(const CrossEntropyParams<T>& params, const Reduction& reduction) {
  if (reduction.is_dependent) wait_for_previous_kernel();
  if (reduction.n_totals == 0) return reduction.known_divisor;
  // Few registers: the threads that call this hold a row in theirs.
  const auto sum_of = [&](auto member) {
    const int first = threadIdx.x % kWarp, second = first + kWarp;
    auto sum = (Totals{}).*member, other = sum;
    if (first < reduction.n_totals) sum = reduction.totals[first].*member;
    if (second < reduction.n_totals) other = reduction.totals[second].*member;
    sum += other;
#pragma unroll 1
    for (int step = kWarp / 2; step > 0 && reduction.n_totals > 1; step /= 2) {
      sum += __shfl_xor_sync(kAllLanes, sum, step);
    }
    return reduction.n_totals > 1 ? sum : __shfl_sync(kAllLanes, sum, 0);
  };
  if (params.zero_if_all_ignored && sum_of(&Totals::count) == 0) return 1;
  return sum_of(&Totals::weight);
}

// The factor of each row's gradient. For types that compute in float: a division would take more registers than the
// threads that hold a row have left, and two steps of Newton's method give the same up to the last bit of a double.
template <class T>
__device__ __forceinline__ double reciprocal(double x) {
  if constexpr (sizeof(Compute<T>) == sizeof(double)) return 1 / x;
  const double guess = __fdividef(1, static_cast<float>(x));
  if (guess == 0 || !(fabs(guess) <= 3e38)) return guess;
  const double better = guess * (2 - x * guess);
  return better * (2 - x * better);
}

// Ends a kernel whose threads have the losses `loss`. The last block to get here adds the sums of the blocks in their
// order and writes the reduced loss. All threads of the block must call it.
template <class T>
__device__ __forceinline__ void reduce_losses(const CrossEntropyParams<T>& params, const Reduction& reduction,
                                              double loss) {
  if (reduction.is_dependent) wait_for_previous_kernel();
  if (!params.reduced_loss) return;
  constexpr unsigned kInFlight = 16;
  CHARLM_SHARED(double, sums, kMaxWarps);
  CHARLM_SHARED(bool, is_last, 1);
  loss = sum_over_block(loss, sums);
  if (threadIdx.x == 0) {
    reduction.losses[blockIdx.x] = loss;
    __threadfence();
    *is_last = atomicAdd(reduction.n_finished, 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!*is_last) return;
  __threadfence();
  double sum = 0;
  for (unsigned first = threadIdx.x; first < gridDim.x; first += kInFlight * blockDim.x) {
    double losses[kInFlight];
#pragma unroll
    for (unsigned k = 0; k < kInFlight; k++) {
      const unsigned i = first + k * blockDim.x;
      losses[k] = i < gridDim.x ? reduction.losses[i] : 0;
    }
#pragma unroll
    for (unsigned k = 0; k < kInFlight; k++) sum += losses[k];
  }
  sum = sum_over_block(sum, sums);
  const double total_weight = divisor(params, reduction);
  if (threadIdx.x != 0) return;
  const bool none = params.mean && !params.zero_if_all_ignored && (params.n_rows == 0 || params.n_classes == 0);
  const auto mean = static_cast<Compute<T>>(none ? double(NAN) : sum / total_weight);
  if (params.is_loss_unrounded) {
    *static_cast<Compute<T>*>(params.reduced_loss) = mean;
  } else {
    *static_cast<T*>(params.reduced_loss) = from_compute<T>(mean);
  }
}

}  // namespace
}  // namespace charlm::cuda
