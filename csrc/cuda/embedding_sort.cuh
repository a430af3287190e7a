// A stable counting sort of indices, by digits of 8 bits from the lowest on: two kernels a digit, the first of which
// counts the digits of each block's rows. Indices out of range and padding_idx are left out. The order of the rows of
// an index is theirs in the input, so that sums in this order have the same bits in every run.
#pragma once

#include "cuda/async.cuh"
#include "cuda/load_store.cuh"
#include "ops/embedding.h"

namespace charlm::cuda {
namespace {

constexpr int kWarp = 32;
constexpr int kDigitBits = 8, kDigits = 1 << kDigitBits;
constexpr int kSortThreads = 512, kSortWarps = kSortThreads / kWarp;
constexpr int kSortRows = 2048;                      // of a block at a time
constexpr int kSortKeys = kSortRows / kSortThreads;  // of a thread at a time

// Each block reads the counts of all, so their number is bounded, until the 16 bits of a count are.
constexpr int kMaxSortBlocks = 256, kMaxSortSteps = 31;

// Arrays in a workspace, one after the other, each from a multiple of 16 bytes on.
class Workspace {
 public:
  explicit Workspace(void* begin) : begin_(reinterpret_cast<uintptr_t>(begin)) {}

  template <class X>
  X* take(int64_t n) {
    X* const array = reinterpret_cast<X*>(begin_ + bytes_);
    bytes_ += round_up(n * static_cast<int64_t>(sizeof(X)), kPackBytes);
    return array;
  }

  int64_t bytes() const { return bytes_; }

 private:
  uintptr_t begin_;
  int64_t bytes_ = 0;
};

// What the sort leaves. Int holds V and N.
template <class Int>
struct SortedRows {
  const Int* keys;          // [n_sorted], sorted; null if there are pieces
  const Int* positions;     // [n_sorted]: where they were
  const Int* n_sorted;      // at most N
  const Int* starts;        // [kDigits + 1]: where the keys of each highest digit begin
  const Int* piece_starts;  // [kDigits + 1]: how many pieces of segments lie before each index
};

template <class Int>
struct SortPass {
  int64_t n_rows;  // of the input
  int64_t rows_a_block;
  int n_blocks, shift;
  const Int *keys, *positions, *n_sorted;  // of the passes before; null in the first
  uint16_t* counts;                        // [n_blocks, kDigits]
  Int *next_keys, *next_positions;         // `next_keys` may be null
  Int* starts;                             // [kDigits + 1]
  Int* piece_starts;                       // null: none
  int piece_rows;
  bool overlaps;  // with the kernels before and after
};

// The rows of a block, which it handles kSortRows at a time.
template <class Int>
struct SortBlock {
  int64_t begin, end;

  __device__ __forceinline__ explicit SortBlock(const SortPass<Int>& pass) {
    const int64_t n = pass.n_sorted ? static_cast<int64_t>(*pass.n_sorted) : pass.n_rows;
    begin = blockIdx.x * pass.rows_a_block;
    end = n - begin < pass.rows_a_block ? n : begin + pass.rows_a_block;
  }
};

// The keys of rows first, first + step, ...: the index, or -1 where it does not count.
template <int kCount>
__device__ __forceinline__ void load_keys(const Indices& indices, int64_t padding_idx, int64_t first, int step,
                                          int64_t end, int64_t (&key)[kCount], BadIndex& bad) {
  load_indices(indices, first, step, end, key);
#pragma unroll
  for (int k = 0; k < kCount; k++) {
    const int64_t row = first + k * step;
    if (row >= end || !bad.check(indices, row, key[k]) || key[k] == padding_idx) key[k] = -1;
  }
}

// counts[digit] += how many keys of this warp have it; rank[k] = the old count, and those of them that come before in
// the order of (k, lane). A digit of -1 does not count.
template <int kCount>
__device__ __forceinline__ void rank_digits(const int (&digit)[kCount], uint16_t* counts, int (&rank)[kCount]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int k = 0; k < kCount; k++) {
    const unsigned equal = __match_any_sync(~0u, digit[k]);
    const int leader = __ffs(equal) - 1;
    int old = 0;
    if (lane == leader && digit[k] >= 0) {
      old = counts[digit[k]];
      counts[digit[k]] = static_cast<uint16_t>(old + __popc(equal));
    }
    rank[k] = __shfl_sync(~0u, old, leader) + __popc(equal & ((1u << lane) - 1));
    __syncwarp();
  }
}

// The sum of `value` over the threads before in the first kDigits threads. All threads of the block call it.
template <class Int>
__device__ __forceinline__ Int sum_before(Int value, Int* warp_sums) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  Int sum = value;
#pragma unroll
  for (int step = 1; step < kWarp; step *= 2) {
    const Int before = __shfl_up_sync(~0u, sum, step);
    if (lane >= step) sum += before;
  }
  if (lane == kWarp - 1 && warp < kDigits / kWarp) warp_sums[warp] = sum;
  __syncthreads();
  sum -= value;
#pragma unroll
  for (int w = 0; w < kDigits / kWarp; w++) sum += w < warp ? warp_sums[w] : 0;
  __syncthreads();
  return sum;
}

// counts[warp][digit] becomes the sum over the warps before; returns the sum over all. For thread < kDigits.
__device__ __forceinline__ int sum_counts_of_warps(uint16_t* counts, int digit) {
  int count[kSortWarps], sum = 0;
#pragma unroll
  for (int w = 0; w < kSortWarps; w++) count[w] = counts[w * kDigits + digit];
#pragma unroll
  for (int w = 0; w < kSortWarps; w++) {
    counts[w * kDigits + digit] = static_cast<uint16_t>(sum);
    sum += count[w];
  }
  return sum;
}

template <class Int, bool kFirst>
__global__ void __launch_bounds__(kSortThreads)
    embedding_count_digits(SortPass<Int> pass, Indices indices, int64_t padding_idx) {
  CHARLM_SHARED(int, count, kDigits);
  const int thread = threadIdx.x;
  if (pass.overlaps) {
    let_next_kernel_begin();
    if (!kFirst) wait_for_previous_kernel();
  }
  const SortBlock<Int> block(pass);
  if (thread < kDigits) count[thread] = 0;
  __syncthreads();
  BadIndex bad;
  for (int64_t first = block.begin + thread; first < block.end; first += kSortRows) {
    int64_t key[kSortKeys];
    if constexpr (kFirst) {
      load_keys(indices, padding_idx, first, kSortThreads, block.end, key, bad);
    } else {
#pragma unroll
      for (int k = 0; k < kSortKeys; k++) {
        key[k] = first + k * kSortThreads < block.end ? pass.keys[first + k * kSortThreads] : -1;
      }
    }
#pragma unroll
    for (int k = 0; k < kSortKeys; k++) {
      if (key[k] >= 0) atomicAdd(&count[key[k] >> pass.shift & (kDigits - 1)], 1);
    }
  }
  if constexpr (kFirst) bad.record(indices);
  __syncthreads();
  if (thread < kDigits) pass.counts[blockIdx.x * kDigits + thread] = static_cast<uint16_t>(count[thread]);
}

// The sum of the counts of digit `thread` of the blocks in [begin, end), for thread < kDigits. Each warp adds up some
// blocks, into `part` [kSortWarps, kDigits].
template <class Int>
__device__ __forceinline__ Int sum_counts_of_blocks(const uint16_t* counts, int begin, int end, Int* part) {
  constexpr int kLaneDigits = kDigits / kWarp;
  const int thread = threadIdx.x, lane = thread % kWarp, warp = thread / kWarp;
  Int sum[kLaneDigits] = {};
#pragma unroll 8
  for (int block = begin + warp; block < end; block += kSortWarps) {
    const Pack<uint16_t> pack = load_pack(counts + block * kDigits + lane * kLaneDigits);
#pragma unroll
    for (int i = 0; i < kLaneDigits; i++) sum[i] += pack.values[i];
  }
#pragma unroll
  for (int i = 0; i < kLaneDigits; i++) part[warp * kDigits + lane * kLaneDigits + i] = sum[i];
  __syncthreads();
  Int total = 0;
  if (thread < kDigits) {
#pragma unroll
    for (int w = 0; w < kSortWarps; w++) total += part[w * kDigits + thread];
  }
  __syncthreads();
  return total;
}

// Writes each row where its digit belongs, in the order of the digits: the rows of a digit, 8 of a step for random
// ones, are then written together. The first block also writes `starts` and `piece_starts`.
template <class Int, bool kFirst>
__global__ void __launch_bounds__(kSortThreads, sizeof(Int) == 4 ? kMinResidentBlocks : 1)
    embedding_scatter_by_digit(SortPass<Int> pass, Indices indices, int64_t padding_idx) {
  CHARLM_SHARED(uint16_t, counts, kSortWarps* kDigits);
  CHARLM_SHARED(Int, part, kSortWarps * kDigits);  // also a step's keys and positions
  static_assert(2 * kSortRows <= kSortWarps * kDigits);
  CHARLM_SHARED(Int, base, kDigits);
  CHARLM_SHARED(int, starts, kDigits + 1);  // of the digits among a step's rows
  CHARLM_SHARED(Int, warp_sums, kDigits / kWarp);
  const int thread = threadIdx.x, warp = thread / kWarp, lane = thread % kWarp;
  if (pass.overlaps) {
    let_next_kernel_begin();
    if (!kFirst) wait_for_previous_kernel();
  }
  const SortBlock<Int> block(pass);

  const auto load_base = [&] {
    const int me = static_cast<int>(blockIdx.x);
    const Int before = sum_counts_of_blocks(pass.counts, 0, me, part);
    const Int total = before + sum_counts_of_blocks(pass.counts, me, pass.n_blocks, part);
    const Int start = sum_before(thread < kDigits ? total : Int(0), warp_sums);
    if (thread < kDigits) base[thread] = start + before;
    if (me != 0) return;
    const Int pieces = pass.piece_starts && thread < kDigits ? (total + pass.piece_rows - 1) / pass.piece_rows : 0;
    const Int piece = sum_before(pieces, warp_sums);
    if (thread < kDigits) {
      pass.starts[thread] = start;
      if (pass.piece_starts) pass.piece_starts[thread] = piece;
    }
    if (thread == kDigits - 1) {
      pass.starts[kDigits] = start + total;
      if (pass.piece_starts) pass.piece_starts[kDigits] = piece + pieces;
    }
  };

  if constexpr (!kFirst) load_base();
  for (int64_t step = block.begin; step < block.end; step += kSortRows) {
    const int64_t first = step + warp * (kSortRows / kSortWarps) + lane;
    int64_t key[kSortKeys];
    Int position[kSortKeys];
    if constexpr (kFirst) {
      BadIndex bad;  // recorded by the kernel before
      load_keys(indices, padding_idx, first, kWarp, block.end, key, bad);
    }
#pragma unroll
    for (int k = 0; k < kSortKeys; k++) {
      const int64_t row = first + k * kWarp;
      position[k] = static_cast<Int>(row);
      if constexpr (!kFirst) {
        key[k] = row < block.end ? pass.keys[row] : -1;
        position[k] = row < block.end ? pass.positions[row] : 0;
      }
    }
    for (int i = thread; i < kSortWarps * kDigits; i += kSortThreads) counts[i] = 0;
    __syncthreads();
    int digit[kSortKeys], rank[kSortKeys];
#pragma unroll
    for (int k = 0; k < kSortKeys; k++) {
      digit[k] = key[k] < 0 ? -1 : static_cast<int>(key[k] >> pass.shift & (kDigits - 1));
    }
    rank_digits(digit, counts + warp * kDigits, rank);
    __syncthreads();
    const int in_step = thread < kDigits ? sum_counts_of_warps(counts, thread) : 0;
    if (kFirst && step == block.begin) {
      if (pass.overlaps) wait_for_previous_kernel();
      load_base();
    }
    const int start = static_cast<int>(sum_before(Int(in_step), warp_sums));
    if (thread < kDigits) {
      starts[thread] = start;
      base[thread] -= start;
    }
    if (thread == kDigits - 1) starts[kDigits] = start + in_step;
    __syncthreads();
    Int *const step_keys = part, *const step_positions = part + kSortRows;
#pragma unroll
    for (int k = 0; k < kSortKeys; k++) {
      if (digit[k] < 0) continue;
      const int to = starts[digit[k]] + counts[warp * kDigits + digit[k]] + rank[k];
      step_keys[to] = static_cast<Int>(key[k]);
      step_positions[to] = position[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSortKeys; k++) {
      const int i = k * kSortThreads + thread;
      if (i >= starts[kDigits]) break;
      const Int next = step_keys[i], to = base[next >> pass.shift & (kDigits - 1)] + i;
      if (pass.next_keys) pass.next_keys[to] = next;
      pass.next_positions[to] = step_positions[i];
    }
    __syncthreads();
    if (thread < kDigits) base[thread] += start + in_step;
  }
}

// The sort's arrays in a workspace, and its launches. `piece_rows` > 0: V is at most kDigits, and segments are divided
// into pieces of at most so many rows.
template <class Int>
class Sort {
 public:
  Sort(Workspace& workspace, int64_t n_rows, int64_t num_embeddings, int piece_rows) {
    const int64_t steps = ceil_div(n_rows, int64_t{kSortRows} * kMaxSortBlocks);
    const int64_t rows_a_block = kSortRows * (steps < kMaxSortSteps ? steps : kMaxSortSteps);
    pass_.n_rows = n_rows;
    pass_.rows_a_block = rows_a_block;
    pass_.n_blocks = static_cast<int>(ceil_div(n_rows, rows_a_block));
    pass_.piece_rows = piece_rows;
    while (n_passes_ * kDigitBits < 63 && num_embeddings > int64_t{1} << n_passes_ * kDigitBits) n_passes_++;
    pass_.counts = workspace.take<uint16_t>(pass_.n_blocks * kDigits);
    for (int i = 0; i < 2; i++) {
      starts_[i] = workspace.take<Int>(kDigits + 1);
      if (n_passes_ <= i) continue;
      if (piece_rows == 0) keys_[i] = workspace.take<Int>(n_rows);
      positions_[i] = workspace.take<Int>(n_rows);
    }
    if (piece_rows > 0) pass_.piece_starts = workspace.take<Int>(kDigits + 1);
  }

  SortedRows<Int> result() const {
    const int last = (n_passes_ - 1) % 2;
    return {keys_[last], positions_[last], starts_[0] + kDigits, starts_[last_starts()], pass_.piece_starts};
  }

  int highest_digit_shift() const { return (n_passes_ - 1) * kDigitBits; }

  // The first kernel waits for all work before it; on sm_90 the others begin early.
  template <class T>
  int run(const EmbeddingGradientParams<T>& params, const Launch& launch) {
    const dim3 grid(static_cast<unsigned>(pass_.n_blocks));
    SortPass<Int> pass = pass_;
    pass.overlaps = launch.compute_capability >= kSm90;
    for (int i = 0; i < n_passes_; i++) {
      pass.shift = i * kDigitBits;
      pass.next_keys = keys_[i % 2];
      pass.next_positions = positions_[i % 2];
      pass.starts = starts_[i > 0];
      LaunchOptions options;
      options.is_dependent = pass.overlaps && i > 0;
      int error =
          launch_kernel(options, i == 0 ? &embedding_count_digits<Int, true> : &embedding_count_digits<Int, false>,
                        grid, dim3(kSortThreads), 0, launch.stream, pass, params.indices, params.padding_idx);
      if (error != 0) return error;
      options.is_dependent = pass.overlaps;
      error = launch_kernel(options,
                            i == 0 ? &embedding_scatter_by_digit<Int, true> : &embedding_scatter_by_digit<Int, false>,
                            grid, dim3(kSortThreads), 0, launch.stream, pass, params.indices, params.padding_idx);
      if (error != 0) return error;
      pass.keys = pass.next_keys;
      pass.positions = pass.next_positions;
      pass.n_sorted = starts_[0] + kDigits;
    }
    return 0;
  }

 private:
  int last_starts() const { return n_passes_ > 1; }

  SortPass<Int> pass_ = {};
  int n_passes_ = 1;
  Int* keys_[2] = {};
  Int* positions_[2] = {};
  Int* starts_[2] = {};  // of the first pass, and of the last
};

}  // namespace
}  // namespace charlm::cuda
