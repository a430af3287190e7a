// The gradient of a table of any size: segmented sums over sorted indices, in two kernels. The first divides the sorted
// rows into chunks of a fixed size. A segment (the rows of one index) inside one chunk is summed and written directly;
// of a longer segment, the partial sum of each chunk goes to the workspace. The second kernel adds up these partial
// sums, with one block for each segment that crosses the end of its first chunk. A frequent index is one long segment,
// so its parts are first summed in groups in parallel, then the groups in order.
//
// Reads N * D elements, N indices and N positions, writes the rows that occur, and writes and reads at most
// 2 * N / kChunkRows * D numbers of workspace.
#pragma once

#include "cuda/load_store.cuh"
#include "ops/embedding.h"

namespace charlm::cuda {
namespace {

constexpr int kChunkRows = 64;
constexpr int kSegmentThreads = 256;
constexpr int kMinLanes = 16, kMaxLanes = 32;  // threads that share the columns of a chunk

// Rows that a thread loads before it adds them. kWidth: the columns of a thread, one, or a pack if rows start at
// multiples of 16 bytes.
template <int kWidth>
constexpr int kRowLoads = kWidth == 1 ? 8 : 4;

// The rows and columns of a thread: n_tiles blocks divide the columns among them.
struct SegmentPlace {
  int64_t block;  // of rows
  int tile;       // of columns
  int64_t column;

  __device__ __forceinline__ SegmentPlace(int n_tiles, int width)
      : block(blockIdx.x / n_tiles),
        tile(blockIdx.x % n_tiles),
        column((static_cast<int64_t>(tile) * blockDim.x + threadIdx.x) * width) {}
};

// The partial sums of segments in the workspace, [n_chunks, 2, D]: first that of a segment that began in an earlier
// chunk, then that of a segment that begins here and continues in the next chunk.
template <class C>
__device__ __forceinline__ C* segment_part(C* workspace, int64_t chunk, bool began_before, int64_t d, int64_t column) {
  return workspace + (chunk * 2 + (began_before ? 0 : 1)) * d + column;
}

// Loads sorted indices [begin - 1, begin + n] and positions [begin, begin + n), as far as they exist. The position of a
// row that does not count is -1. `records`: whether this block records an index out of range.
template <class T>
__device__ __forceinline__ void load_sorted(const EmbeddingGradientParams<T>& params, const int64_t* positions,
                                            int64_t begin, int n, bool records, int64_t* index, int64_t* position) {
  constexpr int kCount = 4;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  BadIndex bad;
  for (int first = thread; first < n; first += kCount * kSegmentThreads) {
    int64_t loaded[kCount], from[kCount];
    load_indices(params.indices, begin + first, kSegmentThreads, begin + n, loaded);
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      const int i = first + k * kSegmentThreads;
      from[k] = i < n ? positions[begin + i] : 0;
    }
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      const int i = first + k * kSegmentThreads;
      if (i >= n) break;
      const bool valid = bad.check(params.indices, from[k], loaded[k]);
      index[1 + i] = loaded[k];
      position[i] = valid && loaded[k] != params.padding_idx ? from[k] : -1;
    }
  }
  if (records) bad.record(params.indices);
  if (thread == 0 && begin > 0) index[0] = load_index(params.indices, begin - 1);
  if (thread == 1 && begin + n < params.n_indices) index[1 + n] = load_index(params.indices, begin + n);
}

template <class T, int kWidth>
__global__ void __launch_bounds__(kSegmentThreads, kMinResidentBlocks)
    embedding_sum_chunks(EmbeddingGradientParams<T> params, const int64_t* positions, bool scale_grad_by_freq,
                         int n_tiles, Compute<T>* workspace) {
  using C = Compute<T>;
  constexpr int kLoads = kRowLoads<kWidth>;
  CHARLM_DYNAMIC_SHARED(int64_t, shared);
  int64_t* const index = shared;                                  // [1 + blockDim.y * kChunkRows + 1]
  int64_t* const position = index + blockDim.y * kChunkRows + 2;  // [blockDim.y * kChunkRows]
  const SegmentPlace place(n_tiles, kWidth);
  const int64_t d = params.embedding_dim, n_indices = params.n_indices;
  const int block_rows = blockDim.y * kChunkRows;
  const int64_t block_begin = place.block * block_rows;
  const int block_n = static_cast<int>(n_indices - block_begin < block_rows ? n_indices - block_begin : block_rows);
  load_sorted(params, positions, block_begin, block_n, place.tile == 0, index, position);
  __syncthreads();

  const int64_t chunk = place.block * blockDim.y + threadIdx.y, begin = chunk * kChunkRows;
  if (begin >= n_indices || place.column >= d) return;
  const int n = static_cast<int>(n_indices - begin < kChunkRows ? n_indices - begin : kChunkRows);
  const int64_t* const index_of = index + 1 + threadIdx.y * kChunkRows;  // [-1, n], as far as there are rows
  const int64_t* const position_of = position + threadIdx.y * kChunkRows;
  const bool first_goes_on = begin > 0 && index_of[-1] == index_of[0];
  const bool last_goes_on = begin + n < n_indices && index_of[n] == index_of[n - 1];

  C sum[kWidth] = {};
  int segment_begin = 0;
  for (int first = 0; first < n; first += kLoads) {
    T loaded[kLoads][kWidth] = {};
#pragma unroll
    for (int k = 0; k < kLoads; k++) {
      const int64_t from = first + k < n ? position_of[first + k] : -1;
      if (from >= 0) load_numbers(params.grad_output + from * d + place.column, loaded[k]);
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
          store_numbers(params.grad + index_of[row] * d + place.column, sum);
        }
      }
#pragma unroll
      for (int i = 0; i < kWidth; i++) sum[i] = 0;
      segment_begin = row + 1;
    }
  }
}

// The number of rows in a chunk that have this index. All threads of the block must call it.
__device__ __forceinline__ int count_rows(const Indices& indices, int64_t n_indices, int64_t chunk, int64_t index) {
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t n = chunk * kChunkRows + thread;
  return __syncthreads_count(thread < kChunkRows && n < n_indices && load_index(indices, n) == index);
}

// One block for each chunk except the last: joins the parts of the segment that begins in the chunk and continues, if
// any.
template <class T, int kWidth>
__global__ void __launch_bounds__(kSegmentThreads, kMinResidentBlocks)
    embedding_join_chunks(EmbeddingGradientParams<T> params, bool scale_grad_by_freq, int n_tiles,
                          const Compute<T>* workspace) {
  using C = Compute<T>;
  CHARLM_SHARED(C, shared, kWidth * kSegmentThreads);  // [group, element, lane]
  const SegmentPlace place(n_tiles, kWidth);
  const Indices& indices = params.indices;
  const int64_t d = params.embedding_dim, n_indices = params.n_indices;
  const int64_t chunk = place.block, next = (chunk + 1) * kChunkRows;
  const int64_t index = load_index(indices, next);
  if (load_index(indices, next - 1) != index) return;
  if (chunk > 0 && load_index(indices, chunk * kChunkRows - 1) == index) return;  // the segment began earlier
  if (!in_range(indices, index) || index == params.padding_idx) return;

  // Counts the following chunks that begin with this index, kSegmentThreads at a time.
  const int lane = threadIdx.x, n_lanes = blockDim.x, group = threadIdx.y, n_groups = blockDim.y;
  int64_t last = chunk;
  for (int found = kSegmentThreads; found == kSegmentThreads; last += found) {
    const int64_t row = (last + 1 + group * n_lanes + lane) * kChunkRows;
    found = __syncthreads_count(row < n_indices && load_index(indices, row) == index);
  }
  C factor = 1;
  if (scale_grad_by_freq) {
    const int in_first = count_rows(indices, n_indices, chunk, index);
    const int in_last = count_rows(indices, n_indices, last, index);
    factor = C(1) / static_cast<C>(in_first + (last - chunk - 1) * kChunkRows + in_last);
  }

  // Part i is the partial sum of chunk + i.
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
  store_numbers(params.grad + index * d + place.column, sum);
}

template <class T, int kWidth>
int sum_sorted(const EmbeddingGradientParams<T>& params, const Launch& launch) {
  auto* const workspace = static_cast<Compute<T>*>(launch.workspace);
  const int64_t n_chunks = ceil_div(params.n_indices, kChunkRows), d = params.embedding_dim;
  int lanes = power_of_two(ceil_div(d, kWidth));
  lanes = lanes < kMinLanes ? kMinLanes : lanes > kMaxLanes ? kMaxLanes : lanes;
  const int rows = kSegmentThreads / lanes, n_tiles = static_cast<int>(ceil_div(d, lanes * kWidth));
  const dim3 block(lanes, rows);
  const int64_t shared_bytes = (2 * rows * kChunkRows + 2) * sizeof(int64_t);
  // The grid cannot exceed 2^31 blocks, since each block reads at least half a kilobyte of its own.
  int error = launch_kernel(&embedding_sum_chunks<T, kWidth>,
                            dim3(static_cast<unsigned>(ceil_div(n_chunks, rows) * n_tiles)), block, shared_bytes,
                            launch.stream, params, params.positions, params.scale_grad_by_freq, n_tiles, workspace);
  if (error != 0 || n_chunks == 1) return error;
  return launch_kernel(&embedding_join_chunks<T, kWidth>, dim3(static_cast<unsigned>((n_chunks - 1) * n_tiles)), block,
                       0, launch.stream, params, params.scale_grad_by_freq, n_tiles, workspace);
}

template <class T>
int64_t sorted_workspace(int64_t n_indices, int64_t embedding_dim) {
  return ceil_div(n_indices, kChunkRows) * 2 * embedding_dim;
}

template <class T>
int backward_by_sort(const EmbeddingGradientParams<T>& params, Launch& launch) {
  const bool packs =
      params.embedding_dim % kPackSize<T> == 0 && reinterpret_cast<uintptr_t>(params.grad_output) % kPackBytes == 0;
  return packs ? sum_sorted<T, kPackSize<T>>(params, launch) : sum_sorted<T, 1>(params, launch);
}

}  // namespace
}  // namespace charlm::cuda
