// The gradient of a small table, in two kernels. A block handles a part of the rows of grad_output and up to 64 columns
// or so. It sorts the indices of at most kSortRows rows at a time in shared memory; groups of threads sum equal shares
// of the sorted rows, and add the sum of each segment to a table in shared memory. A segment that goes on in the next
// share is completed after a barrier, so nothing needs an atomic. The block writes its table to the workspace, and a
// second kernel adds up the tables of all parts.
//
// Reads N * D elements, and N indices for each tile of columns; writes V * D elements, and writes and reads P * V * D
// numbers of workspace, P parts. Narrow rows are first copied to shared memory as they lie, in one bulk copy on sm_90,
// so that no memory transaction is used in part.
#pragma once

#include "cuda/embedding_sorted.cuh"

namespace charlm::cuda {
namespace {

// Shared memory of a block: a table of at most kTableBytes. All of it fits in the 99 KiB of the architectures 8.6, 8.9
// and 12.0.
constexpr int64_t kTableBytes = 64 << 10, kTableBlockBytes = 96 << 10;
// Tiles are this narrow only where the table has fewer columns, or more would not fit.
constexpr int kMinTableLanes = 8, kMaxTableLanes = 16, kMaxUnpackedTableLanes = 64;
constexpr int kStagedRowBytes = 64;  // rows narrower than this are copied to shared memory first
constexpr int kRowAlignment = 16;    // parts and staged rows begin at multiples of this many rows, so of 16 bytes

// The 132 multiprocessors of an H100, one block each, or two, one after the other, if a block has more rows than it
// sorts at once. The same for every GPU, so that results do not depend on the GPU.
constexpr int64_t kTableBlocks = 132;
constexpr int64_t kFewestTableRows = 128;  // of a part

// Numbers of a block's table and of the first sums of its groups, in whole packs.
__host__ __device__ constexpr int64_t table_numbers(int64_t v, int n_groups, int columns) {
  constexpr int64_t kPack = kPackBytes / sizeof(float);
  return ((v + n_groups) * columns + kPack - 1) / kPack * kPack;
}

template <class T, int kWidth, bool kStaged>
struct TablesPlan {
  int lanes;  // threads that share the columns of a tile
  int64_t n_tiles;
  int batch_rows;  // that a block sorts at a time
  int64_t rows_a_part, n_parts;
  int64_t stride;  // numbers from the table of a part to the next

  TablesPlan(int64_t n, int64_t v, int64_t d) {
    constexpr int64_t kSize = sizeof(Compute<T>);
    constexpr int kMost = kWidth == 1 ? kMaxUnpackedTableLanes : kMaxTableLanes;
    const int64_t packs = ceil_div(d, kWidth);
    lanes = packs >= kMost ? kMost : kStaged ? static_cast<int>(packs) : power_of_two(packs);
    if (lanes < kMinTableLanes) lanes = kMinTableLanes;
    while (v * columns() * kSize > kTableBytes) lanes /= 2;
    n_tiles = ceil_div(packs, lanes);
    batch_rows = kSortRows;
    if (kStaged) {
      const int64_t most = (kTableBlockBytes - stage_begin(v)) / (d * static_cast<int64_t>(sizeof(T)));
      if (most < batch_rows) batch_rows = static_cast<int>(most / kRowAlignment * kRowAlignment);
    }
    const int64_t blocks = n * n_tiles > kTableBlocks * batch_rows ? 2 * kTableBlocks : kTableBlocks;
    rows_a_part = round_up(ceil_div(n, ceil_div(blocks, n_tiles)), kRowAlignment);
    const int64_t fewest = v > kFewestTableRows ? v : kFewestTableRows;
    if (rows_a_part < fewest) rows_a_part = round_up(fewest, kRowAlignment);
    n_parts = ceil_div(n, rows_a_part);
    stride = part_stride(v * d);
  }

  int columns() const { return lanes * kWidth; }
  int n_groups() const { return kSortThreads / lanes; }

  // Shared memory: the table, the first sums of the groups, counts, positions and keys, and staged rows.
  int64_t stage_begin(int64_t v) const {
    return table_numbers(v, n_groups(), columns()) * sizeof(Compute<T>) + kSortWarps * kDigits * sizeof(uint16_t) +
           kSortRows * (sizeof(uint16_t) + sizeof(uint8_t));
  }
  int64_t shared_bytes(int64_t v, int64_t d) const {
    return stage_begin(v) + (kStaged ? batch_rows * d * static_cast<int64_t>(sizeof(T)) : 0);
  }
};

// A block sorts rows [begin, begin + n) of its part: keys and positions in order, -1 and padding left out. Returns how
// many there are. All threads of the block call it.
struct BlockSort {
  uint16_t* counts;     // [kSortWarps, kDigits]
  uint16_t* positions;  // [kSortRows]
  uint8_t* keys;        // [kSortRows]
  int* warp_sums;       // [kDigits / kWarp]
  int* n_sorted;

  __device__ __forceinline__ int operator()(const Indices& indices, int64_t padding_idx, int64_t begin, int n,
                                            BadIndex& bad) const {
    constexpr int kWarpRows = kSortRows / kSortWarps;
    const int thread = threadIdx.x, warp = thread / kWarp, first = warp * kWarpRows + thread % kWarp;
    int64_t key[kSortKeys];
    load_keys(indices, padding_idx, begin + first, kWarp, begin + n, key, bad);
    for (int i = thread; i < kSortWarps * kDigits; i += kSortThreads) counts[i] = 0;
    __syncthreads();
    int digit[kSortKeys], rank[kSortKeys];
#pragma unroll
    for (int k = 0; k < kSortKeys; k++) digit[k] = static_cast<int>(key[k]);
    rank_digits(digit, counts + warp * kDigits, rank);
    __syncthreads();
    const int total = thread < kDigits ? sum_counts_of_warps(counts, thread) : 0;
    const int start = sum_before(total, warp_sums);
    if (thread < kDigits) {
#pragma unroll
      for (int w = 0; w < kSortWarps; w++) counts[w * kDigits + thread] += static_cast<uint16_t>(start);
    }
    if (thread == kDigits - 1) *n_sorted = start + total;
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kSortKeys; k++) {
      if (digit[k] < 0) continue;
      const int to = counts[warp * kDigits + digit[k]] + rank[k];
      keys[to] = static_cast<uint8_t>(digit[k]);
      positions[to] = static_cast<uint16_t>(first + k * kWarp);
    }
    __syncthreads();
    return *n_sorted;
  }
};

// Copies n elements to shared memory without a bulk copy.
template <class T>
__device__ __forceinline__ void copy_to_shared(const T* from, int n, T* stage) {
  constexpr int kCount = 8;
  for (int first = threadIdx.x; first < n; first += kCount * kSortThreads) {
    T loaded[kCount] = {};
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      if (first + k * kSortThreads < n) loaded[k] = from[first + k * kSortThreads];
    }
#pragma unroll
    for (int k = 0; k < kCount; k++) {
      if (first + k * kSortThreads < n) stage[first + k * kSortThreads] = loaded[k];
    }
  }
}

// Grid [n_tiles, n_parts]. kStaged: one tile, rows by way of shared memory. is_sm90: with bulk copies, if grad_output
// begins at a multiple of 16 bytes, and overlapping with the second kernel.
template <class T, int kWidth, bool kStaged>
__global__ void __launch_bounds__(kSortThreads, 1)
    embedding_fill_tables(const __grid_constant__ EmbeddingGradientParams<T> params, int lanes, int batch_rows,
                          int64_t rows_a_part, int64_t stride, bool is_sm90, Compute<T>* parts) {
  using C = Compute<T>;
  CHARLM_DYNAMIC_SHARED(C, table);  // [V, columns]
  CHARLM_SHARED(int, warp_sums, kDigits / kWarp);
  CHARLM_SHARED(int, n_sorted, 1);
  CHARLM_SHARED(int, first_keys, kSortThreads / kMinTableLanes);  // [groups]
  CHARLM_SHARED(uint64_t, barrier, 1);
  const int thread = threadIdx.x, v = static_cast<int>(params.num_embeddings);
  const int group = thread / lanes, n_groups = kSortThreads / lanes, columns = lanes * kWidth;
  const int column = thread % lanes * kWidth;  // in the tile
  C* const firsts = table + v * columns;       // [groups, columns]
  auto* const counts = reinterpret_cast<uint16_t*>(table + table_numbers(v, n_groups, columns));
  uint16_t* const positions = counts + kSortWarps * kDigits;
  auto* const keys = reinterpret_cast<uint8_t*>(positions + kSortRows);
  T* const stage = reinterpret_cast<T*>(keys + kSortRows);  // [batch_rows, D]
  const BlockSort sort{counts, positions, keys, warp_sums, n_sorted};
  const int64_t d = params.embedding_dim, first_column = static_cast<int64_t>(blockIdx.x) * columns;
  const bool mine = group < n_groups && first_column + column < d;
  const bool bulk = kStaged && is_sm90 && reinterpret_cast<uintptr_t>(params.grad_output) % kPackBytes == 0;
  if (is_sm90) let_next_kernel_begin();
  if (bulk && thread == 0) {
    init_barrier(barrier, 1);
    publish_barriers();
  }
  for (int i = thread; i < v * columns; i += kSortThreads) table[i] = 0;
  __syncthreads();

  BadIndex bad;
  unsigned parity = 0;
  const int64_t begin = blockIdx.y * rows_a_part;
  const int64_t end = params.n_indices - begin < rows_a_part ? params.n_indices : begin + rows_a_part;
  for (int64_t batch = begin; batch < end; batch += batch_rows) {
    const int n_rows = static_cast<int>(end - batch < batch_rows ? end - batch : batch_rows);
    const T* const rows = params.grad_output + batch * d;
    if constexpr (kStaged) {
      constexpr int kPack = kPackSize<T>;
      const int n = n_rows * static_cast<int>(d), n_bulk = bulk ? n / kPack * kPack : 0;
      if (n_bulk > 0 && thread == 0) {
        expect_bytes(barrier, n_bulk * sizeof(T));
        load_bulk(stage, rows, n_bulk * sizeof(T), barrier);
      }
      copy_to_shared(rows + n_bulk, n - n_bulk, stage + n_bulk);
    }
    const int n = sort(params.indices, params.padding_idx, batch, n_rows, bad);
    if constexpr (kStaged) {
      if (bulk && n_rows * static_cast<int>(d) >= kPackSize<T>) {
        wait_barrier(barrier, parity);
        parity ^= 1;
      }
    }

    // This group's share of the sorted rows, from whole packs of positions on. Its first segment may have begun in an
    // earlier share.
    const int share = ((n + n_groups - 1) / n_groups + kSumLoads - 1) / kSumLoads * kSumLoads;
    const int share_begin = group * share;
    const int share_end = share_begin + share < n ? share_begin + share : n;
    bool began_before = share_begin > 0 && share_begin < n && keys[share_begin - 1] == keys[share_begin];
    if (column == 0) first_keys[group] = began_before ? keys[share_begin] : -1;
    if (share_begin < share_end) {
      int current = keys[share_begin];
      C sum[kWidth] = {};
      const auto store = [&] {
        if (began_before) {
          store_to_shared(firsts + group * columns + column, sum);
          return;
        }
        C before[kWidth];
        load_numbers(table + current * columns + column, before);
        add_numbers(before, sum);
        store_to_shared(table + current * columns + column, sum);
      };
      for (int first = share_begin; first < share_end; first += kSumLoads) {
        const Pack<uint16_t> next_positions = load_pack(positions + first);
        const uint64_t next_keys = *reinterpret_cast<const uint64_t*>(keys + first);
        static_assert(kSumLoads == kPackSize<uint16_t> && kSumLoads == sizeof(uint64_t));
        LoadedNumbers<T, kWidth> loaded[kSumLoads];
#pragma unroll
        for (int r = 0; r < kSumLoads; r++) {
          if (first + r >= share_end || !mine) continue;
          const int position = next_positions.values[r];
          if constexpr (kStaged) {
            loaded[r].load(stage + position * static_cast<int>(d) + column);
          } else {
            loaded[r].load(rows + position * d + first_column + column);
          }
        }
#pragma unroll
        for (int r = 0; r < kSumLoads; r++) {
          if (first + r >= share_end) break;
          const int key = static_cast<uint8_t>(next_keys >> 8 * r);
          if (key != current) {
            store();
#pragma unroll
            for (int i = 0; i < kWidth; i++) sum[i] = 0;
            began_before = false;
            current = key;
          }
          loaded[r].add_to(sum);
        }
      }
      store();
    }
    __syncthreads();
    // The first group of a run of groups whose first segments have the same index adds their sums to the table.
    const int key = first_keys[group];
    if (key >= 0 && (group == 0 || first_keys[group - 1] != key)) {
      C sum[kWidth];
      load_numbers(table + key * columns + column, sum);
      for (int g = group; g < n_groups && first_keys[g] == key; g++) {
        C values[kWidth];
        load_numbers(firsts + g * columns + column, values);
        add_numbers(values, sum);
      }
      store_to_shared(table + key * columns + column, sum);
    }
  }
  if (blockIdx.x == 0) bad.record(params.indices);
  __syncthreads();
  if (!mine) return;
  C* const part = parts + blockIdx.y * stride + first_column + column;
  for (int i = group; i < v; i += n_groups) {
    C values[kWidth];
    load_numbers(table + i * columns + column, values);
    store_numbers(part + i * d, values);
  }
}

template <class T, int kWidth, bool kStaged>
int backward_by_tables(const EmbeddingGradientParams<T>& params, Workspace& workspace, const Launch* launch) {
  const int64_t n = params.n_indices, v = params.num_embeddings, d = params.embedding_dim;
  const TablesPlan<T, kWidth, kStaged> plan(n, v, d);
  auto* const parts = workspace.take<Compute<T>>(plan.n_parts * plan.stride);
  if (!launch) return 0;
  const int error =
      launch_kernel(&embedding_fill_tables<T, kWidth, kStaged>,
                    dim3(static_cast<unsigned>(plan.n_tiles), static_cast<unsigned>(plan.n_parts)), dim3(kSortThreads),
                    plan.shared_bytes(v, d), launch->stream, params, plan.lanes, plan.batch_rows, plan.rows_a_part,
                    plan.stride, launch->compute_capability >= kSm90, parts);
  if (error != 0) return error;
  return join_parts<T>(*launch, nullptr, nullptr, static_cast<int>(plan.n_parts), 1, v * d, plan.stride, parts,
                       params.grad);
}

}  // namespace
}  // namespace charlm::cuda
