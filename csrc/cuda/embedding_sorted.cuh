// The gradient of a table of any size: segmented sums over sorted indices, in two kernels. The first cuts the sorted
// rows into chunks of a fixed number; a segment (the rows of one index) that lies inside its chunk is summed and
// written at once, and of one that reaches beyond, each chunk's part goes to the workspace. The second adds up these
// parts: a block for each segment that crosses the end of the chunk it starts in. A hot index is one long segment, so
// its parts are first summed in groups beside each other, then the groups in order.
//
// Moves N * D elements, N indices and N positions in, the rows that occur out, and at most 2 * N / kChunk * D numbers
// through the workspace, twice.
#pragma once

#include "cuda/convert.cuh"
#include "cuda/index.cuh"
#include "ops/embedding.h"

namespace charlm::cuda {
namespace {

constexpr int kChunk = 64;  // rows
constexpr int kSegmentThreads = 256;
constexpr int kMinLanes = 16, kMaxLanes = 32;  // threads side by side on the columns of a chunk

// kWidth: the columns that each thread owns, one, or a pack where rows begin at multiples of 16 bytes.
template <int kWidth>
constexpr int kRowLoads = kWidth == 1 ? 8 : 4;  // rows that a thread loads before it adds the first

// Where a thread works: n_tiles blocks stand side by side on the columns.
struct SegmentPlace {
  int64_t block;  // of rows
  int tile;       // of columns
  int64_t column;

  __device__ __forceinline__ SegmentPlace(int n_tiles, int width)
      : block(blockIdx.x / n_tiles),
        tile(blockIdx.x % n_tiles),
        column((static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * width) {}
};

// The parts of segments in the workspace: [n_chunks, 2, D], first that of a segment which began in a chunk before, then
// that of one which goes on in the next chunk.
template <class C>
__device__ __forceinline__ C* segment_part(C* workspace, int64_t chunk, bool began_before, int64_t d, int64_t column) {
  return workspace + (chunk * 2 + (began_before ? 0 : 1)) * d + column;
}

// Loads sorted indices [begin - 1, begin + n] and positions [begin, begin + n) as far as there are any. The position of
// a row that does not count is -1. `records`: whether this block says so if an index is out of range.
template <class T>
__device__ __forceinline__ void load_sorted(const EmbeddingGradientParams<T>& gradient, const int64_t* positions,
                                            int64_t begin, int n, bool records, int64_t* index, int64_t* position) {
  constexpr int kCount = 4;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  BadIndex bad;
  for (int first = thread; first < n; first += kCount * kSegmentThreads) {
    int64_t loaded[kCount], from[kCount];
    load_indices(gradient.indices, begin + first, kSegmentThreads, begin + n, loaded);
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      const int i = first + k * kSegmentThreads;
      from[k] = i < n ? positions[begin + i] : 0;
    }
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      const int i = first + k * kSegmentThreads;
      if (i >= n) break;
      const bool valid = bad.check(gradient.indices, from[k], loaded[k]);
      index[1 + i] = loaded[k];
      position[i] = valid && loaded[k] != gradient.padding_idx ? from[k] : -1;
    }
  }
  if (records) bad.record(gradient.indices);
  if (thread == 0 && begin > 0) index[0] = load_index(gradient.indices, begin - 1);
  if (thread == 1 && begin + n < gradient.n_indices) index[1 + n] = load_index(gradient.indices, begin + n);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kSegmentThreads, kMinBlocks)
    embedding_sum_chunks(EmbeddingGradientParams<T> gradient, const int64_t* positions, bool scale_grad_by_freq,
                         int n_tiles, Compute<T>* workspace) {
  using C = Compute<T>;
  constexpr int kLoads = kRowLoads<kWidth>;
  CHARLM_DYNAMIC_SHARED(int64_t, shared);
  int64_t* const index = shared;                              // [1 + blockDim.y * kChunk + 1]
  int64_t* const position = index + blockDim.y * kChunk + 2;  // [blockDim.y * kChunk]
  const SegmentPlace place(n_tiles, kWidth);
  const int64_t d = gradient.embedding_dim, n_indices = gradient.n_indices;
  const int block_rows = blockDim.y * kChunk;
  const int64_t block_begin = place.block * block_rows;
  const int block_n = static_cast<int>(n_indices - block_begin < block_rows ? n_indices - block_begin : block_rows);
  load_sorted(gradient, positions, block_begin, block_n, place.tile == 0, index, position);
  __syncthreads();

  const int64_t chunk = place.block * blockDim.y + threadIdx.y, begin = chunk * kChunk;
  if (begin >= n_indices || place.column >= d) return;
  const int n = static_cast<int>(n_indices - begin < kChunk ? n_indices - begin : kChunk);
  const int64_t* const index_of = index + 1 + threadIdx.y * kChunk;  // [-1, n], where there are such rows
  const int64_t* const position_of = position + threadIdx.y * kChunk;
  const bool first_goes_on = begin > 0 && index_of[-1] == index_of[0];
  const bool last_goes_on = begin + n < n_indices && index_of[n] == index_of[n - 1];

  C sum[kWidth] = {};
  int segment_begin = 0;
  for (int first = 0; first < n; first += kLoads) {
    T loaded[kLoads][kWidth] = {};
#pragma unroll
    for (int k = 0; k < kLoads; k++) {
      const int64_t from = first + k < n ? position_of[first + k] : -1;
      if (from >= 0) load_numbers(gradient.grad_output + from * d + place.column, loaded[k]);
    }
#pragma unroll
    for (int k = 0; k < kLoads; k++) {
      const int row = first + k;
      if (row >= n) break;
#pragma unroll
      for (int i = 0; i < kWidth; i++) sum[i] += to_compute(loaded[k][i]);
      if (row + 1 < n && index_of[row + 1] == index_of[row]) continue;
      if (position_of[row] >= 0) {
        const bool began_before = segment_begin == 0 && first_goes_on;
        if (began_before || (row + 1 == n && last_goes_on)) {
          store_numbers(segment_part(workspace, chunk, began_before, d, place.column), sum);
        } else {
          const C factor = scale_grad_by_freq ? C(1) / static_cast<C>(row + 1 - segment_begin) : C(1);
#pragma unroll
          for (int i = 0; i < kWidth; i++) sum[i] *= factor;
          store_numbers(gradient.grad + index_of[row] * d + place.column, sum);
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; i++) sum[i] = 0;
      segment_begin = row + 1;
    }
  }
}

// How many of a chunk's rows have this index. All threads of the block must call.
__device__ __forceinline__ int count_rows(const Indices& indices, int64_t n_indices, int64_t chunk, int64_t index) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t n = chunk * kChunk + thread;
  return __syncthreads_count(thread < kChunk && n < n_indices && load_index(indices, n) == index);
}

// A block for each chunk but the last: joins the parts of the segment that starts in it and goes on, if there is one.
template <class T, int kWidth>
__global__ void __launch_bounds__(kSegmentThreads, kMinBlocks)
    embedding_join_chunks(EmbeddingGradientParams<T> gradient, bool scale_grad_by_freq, int n_tiles,
                          const Compute<T>* workspace) {
  using C = Compute<T>;
  CHARLM_SHARED(C, shared, kWidth * kSegmentThreads);  // [group, element, lane]
  const SegmentPlace place(n_tiles, kWidth);
  const Indices& indices = gradient.indices;
  const int64_t d = gradient.embedding_dim, n_indices = gradient.n_indices;
  const int64_t chunk = place.block, next = (chunk + 1) * kChunk;
  const int64_t index = load_index(indices, next);
  if (load_index(indices, next - 1) != index) return;
  if (chunk > 0 && load_index(indices, chunk * kChunk - 1) == index) return;  // it began before
  if (!in_range(indices, index) || index == gradient.padding_idx) return;

  // The chunks that begin with this index are neighbours: as many as there are, kSegmentThreads at a time.
  const int lane = threadIdx.x, n_lanes = blockDim.x, group = threadIdx.y, n_groups = blockDim.y;
  int64_t last = chunk;
  for (int found = kSegmentThreads; found == kSegmentThreads; last += found) {
    const int64_t row = (last + 1 + group * n_lanes + lane) * kChunk;
    found = __syncthreads_count(row < n_indices && load_index(indices, row) == index);
  }
  C factor = 1;
  if (scale_grad_by_freq) {
    const int in_first = count_rows(indices, n_indices, chunk, index);
    const int in_last = count_rows(indices, n_indices, last, index);
    factor = C(1) / static_cast<C>(in_first + (last - chunk - 1) * kChunk + in_last);
  }

  // Part 0 is that of `chunk`, part i that of chunk + i.
  const int64_t n_parts = last - chunk + 1, parts_a_group = (n_parts + n_groups - 1) / n_groups;
  C sum[kWidth] = {};
  if (place.column < d) {
    const int64_t begin = group * parts_a_group;
    const int64_t end = begin + parts_a_group < n_parts ? begin + parts_a_group : n_parts;
#pragma unroll 4
    for (int64_t part = begin; part < end; part++) {
      C values[kWidth];
      load_numbers(segment_part(workspace, chunk + part, part > 0, d, place.column), values);
#pragma unroll
      for (int i = 0; i < kWidth; i++) sum[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; i++) shared[(group * kWidth + i) * n_lanes + lane] = sum[i];
  __syncthreads();
  if (group != 0 || place.column >= d) return;
  for (int g = 1; g < n_groups && g * parts_a_group < n_parts; g++) {
#pragma unroll
    for (int i = 0; i < kWidth; i++) sum[i] += shared[(g * kWidth + i) * n_lanes + lane];
  }
#pragma unroll
  for (int i = 0; i < kWidth; i++) sum[i] *= factor;
  store_numbers(gradient.grad + index * d + place.column, sum);
}

template <class T, int kWidth>
int sum_sorted(const EmbeddingGradientParams<T>& gradient, const Launch& at) {
  auto* const workspace = static_cast<Compute<T>*>(at.workspace);
  const int64_t n_chunks = ceil_div(gradient.n_indices, kChunk), d = gradient.embedding_dim;
  int lanes = power_of_two(ceil_div(d, kWidth));
  lanes = lanes < kMinLanes ? kMinLanes : lanes > kMaxLanes ? kMaxLanes : lanes;
  const int rows = kSegmentThreads / lanes, n_tiles = static_cast<int>(ceil_div(d, lanes * kWidth));
  const dim3 block(lanes, rows);
  const int64_t shared_bytes = (2 * rows * kChunk + 2) * sizeof(int64_t);
  // A grid reaches 2^31 blocks, which is never too few: each of them reads half a kilobyte of its own, or more.
  int error =
      launch(&embedding_sum_chunks<T, kWidth>, dim3(static_cast<unsigned>(ceil_div(n_chunks, rows) * n_tiles)), block,
             shared_bytes, at.stream, gradient, gradient.positions, gradient.scale_grad_by_freq, n_tiles, workspace);
  if (error != 0 || n_chunks == 1) return error;
  return launch(&embedding_join_chunks<T, kWidth>, dim3(static_cast<unsigned>((n_chunks - 1) * n_tiles)), block, 0,
                at.stream, gradient, gradient.scale_grad_by_freq, n_tiles, workspace);
}

template <class T>
int64_t sorted_workspace(int64_t n_indices, int64_t embedding_dim) {
  return ceil_div(n_indices, kChunk) * 2 * embedding_dim;
}

template <class T>
int backward_by_sort(const EmbeddingGradientParams<T>& gradient, Launch& at) {
  const bool packs =
      gradient.embedding_dim % kPackSize<T> == 0 && reinterpret_cast<uintptr_t>(gradient.grad_output) % kPackBytes == 0;
  return packs ? sum_sorted<T, kPackSize<T>>(gradient, at) : sum_sorted<T, 1>(gradient, at);
}

}  // namespace
}  // namespace charlm::cuda
