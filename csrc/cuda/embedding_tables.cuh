// The gradient of a small table, by privatised tables. A block handles up to 32 columns of a part of the rows of
// grad_output; each of its threads handles a column of every S-th of these rows, which it adds into its own table in
// shared memory, without atomics or barriers between rows. The block adds up the tables of its threads in order and
// writes the sum to the workspace; a second kernel adds up the sums of the blocks in order.
//
// Reads N * D elements and N indices, writes V * D elements, and writes and reads P * V * D numbers of workspace. The
// number of parts P is chosen so that this stays small.
#pragma once

#include "cuda/load_store.cuh"
#include "ops/embedding.h"

namespace charlm::cuda {
namespace {

constexpr int kTableColumns = 32;
constexpr int kTableThreads = 256;
// Shared memory of a block. A multiprocessor of an H100 (227 KiB) holds three blocks, of an A100 (164 KiB) two, and of
// the architectures 8.6, 8.9 and 12.0 (100 KiB) one.
constexpr int kTableBytes = 72 << 10;
constexpr int kRowsAtATime = 1024;  // rows whose indices are in shared memory

// One block, and as many as fit, for each of the 132 multiprocessors of an H100. The same for every GPU, so that
// results do not depend on the GPU.
constexpr int kMinTableBlocks = 132, kMaxTableBlocks = 3 * kMinTableBlocks;

// Rows that a thread loads at a time: 64 bytes, or as many as the registers allow.
template <class T>
constexpr int kTableLoads = sizeof(T) == 2 ? 24 : 64 / sizeof(T);
constexpr int kTableAdds = 4;  // rows that it adds at a time, with one wait for shared memory

template <class T>
struct TablesPlan {
  int64_t n_tiles;         // of columns
  int tile;                // columns of a tile; the last may have fewer
  int n_threads_a_column;  // S
  int64_t n_parts;         // P, of the rows
  int64_t rows_a_part;
  int64_t part_stride;  // numbers from the sums of a part to the next: V * D rounded up to whole packs of T

  TablesPlan(int64_t n, int64_t v, int64_t d) {
    constexpr int64_t kSize = sizeof(Compute<T>);
    n_tiles = ceil_div(d, kTableColumns);
    tile = static_cast<int>(ceil_div(d, n_tiles));
    const int64_t most = kTableBytes / ((v + 1) * tile * kSize);
    n_threads_a_column = static_cast<int>(most < kTableThreads / tile ? most : kTableThreads / tile);

    // As many blocks as fit, if the traffic of the workspace, which mostly stays in the second-level cache, is at most
    // half the bytes of grad_output; at least one per multiprocessor, since an idle GPU costs more; and no more than
    // give each thread one load of rows.
    const int64_t many = ceil_div(kMaxTableBlocks, n_tiles), few = ceil_div(kMinTableBlocks, n_tiles);
    const int64_t half = n * static_cast<int64_t>(sizeof(T)) / (4 * v * kSize);
    const int64_t busy = ceil_div(n, n_threads_a_column * kTableLoads<T>);
    n_parts = half < many ? half : many;
    if (n_parts < few) n_parts = few;
    if (n_parts > busy) n_parts = busy;
    rows_a_part = ceil_div(n, n_parts);
    n_parts = ceil_div(n, rows_a_part);
    part_stride = round_up(v * d, kPackSize<T>);
  }

  int64_t table_bytes(int64_t v) const { return (v + 1) * tile * n_threads_a_column * sizeof(Compute<T>); }
};

// The indices of rows [begin, begin + n) as offsets into the table of a thread. Padding and indices out of range refer
// to the unused row V.
template <class T>
__device__ __forceinline__ void load_offsets(const EmbeddingGradientParams<T>& params, int64_t begin, int n,
                                             uint16_t* offsets) {
  constexpr int kCount = 4;
  const int n_threads = blockDim.x * blockDim.y, thread = threadIdx.y * blockDim.x + threadIdx.x;
  BadIndex bad;
  for (int first = thread; first < n; first += kCount * n_threads) {
    int64_t index[kCount];
    load_indices(params.indices, begin + first, n_threads, begin + n, index);
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      const int i = first + k * n_threads;
      if (i >= n) break;
      const bool counts = bad.check(params.indices, begin + i, index[k]) && index[k] != params.padding_idx;
      offsets[i] = static_cast<uint16_t>((counts ? index[k] : params.num_embeddings) * n_threads);
    }
  }
  if (blockIdx.x == 0) bad.record(params.indices);
}

// Adds values[k] to table[offset[k]] in the order of k. Equal offsets carry the sum from one k to the next.
template <class C, int kCount>
__device__ __forceinline__ void add_to_table(C* table, const int (&offset)[kCount], const C* values) {
  C sum[kCount];
#pragma unroll
  for (int k = 0; k < kCount; k++) sum[k] = table[offset[k]];
#pragma unroll
  for (int k = 0; k < kCount; k++) {
#pragma unroll
    for (int earlier = 0; earlier < k; earlier++) {
      if (offset[earlier] == offset[k]) sum[k] = sum[earlier];
    }
    sum[k] += values[k];
  }
#pragma unroll
  for (int k = 0; k < kCount; k++) table[offset[k]] = sum[k];
}

// values[k] = x[k * stride] if k * step < n, otherwise 0.
template <class T, int kCount>
__device__ __forceinline__ void load_rows(const T* x, int64_t stride, int step, int n, T (&values)[kCount]) {
#pragma unroll
  for (int k = 0; k < kCount; k++) {
    values[k] = {};
    if (k * step < n) values[k] = x[k * stride];
  }
}

// Grid [n_tiles, P], block [tile, S].
template <class T>
__global__ void __launch_bounds__(kTableThreads, kMinResidentBlocks)
    embedding_fill_tables(EmbeddingGradientParams<T> params, int64_t rows_a_part, int64_t part_stride,
                          Compute<T>* workspace) {
  using C = Compute<T>;
  constexpr int kLoads = kTableLoads<T>;
  CHARLM_DYNAMIC_SHARED(C, tables);  // [V + 1, S, tile]
  CHARLM_SHARED(uint16_t, offsets, kRowsAtATime);
  const int n_threads = blockDim.x * blockDim.y, step = blockDim.y;
  const int v_end = static_cast<int>(params.num_embeddings);
  C* const table = tables + threadIdx.y * blockDim.x + threadIdx.x;  // a row starts every n_threads numbers
  for (int v = 0; v <= v_end; v++) table[v * n_threads] = 0;

  const int64_t d = params.embedding_dim, column = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t begin = blockIdx.y * rows_a_part;
  const int64_t end = begin + rows_a_part < params.n_indices ? begin + rows_a_part : params.n_indices;
  for (int64_t first_row = begin; first_row < end; first_row += kRowsAtATime) {
    const int n = static_cast<int>(end - first_row < kRowsAtATime ? end - first_row : kRowsAtATime);
    const int n_loaded = column < d ? n : 0;
    const T* values = params.grad_output + (first_row + threadIdx.y) * d + column;
    // The next rows are loaded while the current ones are added.
    T next[kLoads];
    load_rows(values, step * d, step, n_loaded - static_cast<int>(threadIdx.y), next);
    __syncthreads();  // the offsets of the previous rows have been used
    load_offsets(params, first_row, n, offsets);
    __syncthreads();
    for (int row = threadIdx.y; row < n; row += kLoads * step) {
      C value[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; k++) value[k] = to_compute(next[k]);
      values += kLoads * step * d;
      load_rows(values, step * d, step, n_loaded - row - kLoads * step, next);
#pragma unroll
      for (int first = 0; first < kLoads; first += kTableAdds) {
        int offset[kTableAdds];
#pragma unroll
        for (int k = 0; k < kTableAdds; k++) {
          const int i = row + (first + k) * step;
          offset[k] = i < n ? offsets[i] : v_end * n_threads;
        }
        add_to_table(table, offset, &value[first]);
      }
    }
  }

  __syncthreads();
  if (column >= d) return;
  for (int v = threadIdx.y; v < v_end; v += step) {
    C sum = 0;
    for (int s = 0; s < step; s++) sum += tables[v * n_threads + s * blockDim.x + threadIdx.x];
    if (gridDim.y == 1) {
      params.grad[v * d + column] = from_compute<T>(sum);
    } else {
      workspace[blockIdx.y * part_stride + v * d + column] = sum;
    }
  }
}

constexpr int kSumLanes = 32, kSumGroups = 8, kSumThreads = kSumLanes * kSumGroups;

// grad = the sum of the parts. Block [kSumLanes, kSumGroups]: each thread sums a pack of columns over one of kSumGroups
// groups of parts.
template <class T>
__global__ void __launch_bounds__(kSumThreads, kMinResidentBlocks)
    embedding_sum_parts(const Compute<T>* workspace, int64_t n_parts, int64_t part_stride, int64_t n_elements,
                        T* grad) {
  using C = Compute<T>;
  constexpr int kWidth = kPackSize<T>;
  CHARLM_SHARED(C, shared, kSumGroups * kWidth * kSumLanes);  // [group, element, lane]
  const int lane = threadIdx.x, group = threadIdx.y;
  const int64_t element = (static_cast<int64_t>(blockIdx.x) * kSumLanes + lane) * kWidth;

  C sum[kWidth] = {};
  if (element < n_elements) {
    const int64_t end = n_parts * (group + 1) / kSumGroups;
#pragma unroll 4
    for (int64_t part = n_parts * group / kSumGroups; part < end; part++) {
      C values[kWidth];
      load_numbers(workspace + part * part_stride + element, values);
#pragma unroll
      for (int i = 0; i < kWidth; i++) sum[i] += values[i];
    }
  }
#pragma unroll
  for (int i = 0; i < kWidth; i++) shared[(group * kWidth + i) * kSumLanes + lane] = sum[i];
  __syncthreads();
  if (group != 0 || element >= n_elements) return;
  for (int g = 1; g < kSumGroups; g++) {
#pragma unroll
    for (int i = 0; i < kWidth; i++) sum[i] += shared[(g * kWidth + i) * kSumLanes + lane];
  }
  if (element + kWidth <= n_elements) {
    store_numbers(grad + element, sum);
  } else {
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      if (element + i < n_elements) grad[element + i] = from_compute<T>(sum[i]);
    }
  }
}

template <class T>
bool uses_tables(int64_t num_embeddings) {
  return num_embeddings < kTableBytes / (kTableColumns * static_cast<int64_t>(sizeof(Compute<T>)));
}

template <class T>
int64_t tables_workspace(int64_t n_indices, int64_t num_embeddings, int64_t embedding_dim) {
  const TablesPlan<T> plan(n_indices, num_embeddings, embedding_dim);
  return plan.n_parts == 1 ? 0 : plan.n_parts * plan.part_stride;
}

template <class T>
int backward_by_tables(const EmbeddingGradientParams<T>& params, Launch& launch) {
  auto* const workspace = static_cast<Compute<T>*>(launch.workspace);
  const int64_t v = params.num_embeddings, d = params.embedding_dim;
  const TablesPlan<T> plan(params.n_indices, v, d);
  const dim3 grid(static_cast<unsigned>(plan.n_tiles), static_cast<unsigned>(plan.n_parts));
  const int error =
      launch_kernel(&embedding_fill_tables<T>, grid, dim3(plan.tile, plan.n_threads_a_column), plan.table_bytes(v),
                    launch.stream, params, plan.rows_a_part, plan.part_stride, workspace);
  if (error != 0 || plan.n_parts == 1) return error;
  const int64_t packs = plan.part_stride / kPackSize<T>;
  return launch_kernel(&embedding_sum_parts<T>, dim3(static_cast<unsigned>(ceil_div(packs, kSumLanes))),
                       dim3(kSumLanes, kSumGroups), 0, launch.stream, workspace, plan.n_parts, plan.part_stride, v * d,
                       params.grad);
}

}  // namespace
}  // namespace charlm::cuda
