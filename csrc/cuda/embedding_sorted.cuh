// The gradient of a table by sums over sorted rows (cuda/embedding_sort.cuh), in two kernels after those of the sort.
//
// V <= 256: a segment (the rows of one index) is divided into pieces of nearly equal size. A group of threads sums a
// piece into the workspace, a second kernel adds up the pieces of each index.
// Any V: the sorted rows are divided into chunks. A group of threads sums the segments that begin in its chunk and
// writes them to the gradient. Only a segment that covers the whole of the next chunk goes on there: its parts go to
// the workspace, and a second kernel adds them up. Blocks of the first kernel write zeros to the rows of absent
// indices.
//
// Reads N * D elements and the sorted rows, writes V * D elements. The workspace has 8 bytes a row for a sort by one
// digit, otherwise 16 (twice that from 2^31 rows on), and D numbers for each piece, or 2 * D for each chunk.
#pragma once

#include "cuda/embedding_sort.cuh"

namespace charlm::cuda {
namespace {

constexpr int kSumThreads = 256, kSumBlocks = 3;  // blocks of a multiprocessor
constexpr int kSumLoads = 8;                      // rows that a thread loads before it adds them
// Threads that share the columns of a piece or chunk. They exchange positions in shuffles, so they are of one warp.
constexpr int kMinSumLanes = 8, kMaxSumLanes = kWarp;

// Rows of a piece and of a chunk. At most this many for long rows and for short ones, where sums last longer than
// joins; fewer for few rows, which would leave multiprocessors idle; and more for very many, since one index may have
// them all.
constexpr int kLongPiece = 128, kShortPiece = 64, kLongChunk = 256, kShortChunk = 64;
constexpr int64_t kFewestParts = 1024, kMostParts = 8192;

inline int64_t rows_a_part(int64_t n_rows, int most) {
  int64_t rows = n_rows / kFewestParts;
  rows = rows < kWarp ? kWarp : rows > most ? most : rows;
  const int64_t fewest = ceil_div(n_rows, kMostParts);
  return rows < fewest ? fewest : rows;
}

inline int sum_lanes(int64_t embedding_dim, int width) {
  const int lanes = power_of_two(ceil_div(embedding_dim, width));
  return lanes < kMinSumLanes ? kMinSumLanes : lanes > kMaxSumLanes ? kMaxSumLanes : lanes;
}

// A group of threads, one for each tile of columns of each part of the rows. blockDim: [lanes, groups].
struct SumGroup {
  int lane, n_lanes;
  unsigned mask;  // of the group in its warp
  unsigned part, tile;
  int64_t column;

  __device__ __forceinline__ SumGroup(unsigned block, int n_tiles, int width) : lane(threadIdx.x), n_lanes(blockDim.x) {
    const unsigned first_lane = threadIdx.y * blockDim.x % kWarp;
    mask = (~0u >> (kWarp - n_lanes)) << first_lane;
    const unsigned group = block * blockDim.y + threadIdx.y;
    part = group / n_tiles;
    tile = group % n_tiles;
    column = (static_cast<int64_t>(tile) * n_lanes + lane) * width;
  }

  template <class X>
  __device__ __forceinline__ X from_lane(X x, int source) const {
    return __shfl_sync(mask, x, source, n_lanes);
  }
};

template <class C, int kWidth>
__device__ __forceinline__ void add_numbers(const C (&x)[kWidth], C (&sum)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; i++) sum[i] += x[i];
}

// A number or a pack, as it lies in memory, or zero. Numbers of a half type would take a register each.
template <class T, int kWidth>
struct LoadedNumbers {
  uint4 bits = {};

  __device__ __forceinline__ void load(const T* p) { bits = *reinterpret_cast<const uint4*>(p); }
  __device__ __forceinline__ void add_to(Compute<T> (&sum)[kWidth]) const {
    if constexpr (sizeof(T) == 2) {
      const unsigned words[4] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
      for (int i = 0; i < kWidth; i++) {
        sum[i] += to_compute(T{static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2))});
      }
    } else {
      add_numbers(__builtin_bit_cast(Pack<T>, bits).values, sum);
    }
  }
};

template <class T>
struct LoadedNumbers<T, 1> {
  T number = {};

  __device__ __forceinline__ void load(const T* p) { number = *p; }
  __device__ __forceinline__ void add_to(Compute<T> (&sum)[1]) const { sum[0] += to_compute(number); }
};

// Stores numbers to shared memory: one, or whole packs.
template <int kCount, class C>
__device__ __forceinline__ void store_to_shared(C* p, const C (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *p = values[0];
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += kPackSize<C>) {
      Pack<C> pack;
#pragma unroll
      for (int j = 0; j < kPackSize<C>; j++) pack.values[j] = values[i + j];
      *reinterpret_cast<uint4*>(p + i) = __builtin_bit_cast(uint4, pack);
    }
  }
}

// -------------------------------------------------------------------------------------------------------------- pieces

// parts[piece, :D] = the sum of the rows of a piece; pieces lie `stride` numbers apart.
template <class T, int kWidth>
__global__ void __launch_bounds__(kSumThreads, kSumBlocks)
    embedding_sum_pieces(SortedRows<int32_t> sorted, const T* grad_output, int64_t embedding_dim, int n_tiles,
                         int64_t stride, bool overlaps, Compute<T>* parts) {
  CHARLM_SHARED(int32_t, piece_starts, kDigits + 1);
  if (overlaps) {
    let_next_kernel_begin();
    wait_for_previous_kernel();
  }
  for (int i = threadIdx.y * blockDim.x + threadIdx.x; i <= kDigits; i += kSumThreads) {
    piece_starts[i] = sorted.piece_starts[i];
  }
  __syncthreads();
  const SumGroup group(blockIdx.x, n_tiles, kWidth);
  const int piece = static_cast<int>(group.part);
  if (piece >= piece_starts[kDigits]) return;
  int index = 0;  // the last whose pieces begin here or before
#pragma unroll
  for (int step = kDigits / 2; step > 0; step /= 2) {
    if (piece_starts[index + step] <= piece) index += step;
  }
  const int start = sorted.starts[index], n = sorted.starts[index + 1] - start;
  const int n_pieces = piece_starts[index + 1] - piece_starts[index], k = piece - piece_starts[index];
  const int each = n / n_pieces, longer = n % n_pieces;  // so many pieces have a row more
  const int begin = start + k * each + (k < longer ? k : longer), end = begin + each + (k < longer ? 1 : 0);

  const bool mine = group.column < embedding_dim;
  const T* const columns = grad_output + group.column;
  Compute<T> sum[kWidth] = {};
  int next = sorted.positions[begin + group.lane < end ? begin + group.lane : begin];
  for (int first = begin; first < end; first += group.n_lanes) {
    const int position = next;
    const int ahead = first + group.n_lanes;
    if (ahead < end) next = sorted.positions[ahead + group.lane < end ? ahead + group.lane : ahead];
#pragma unroll 1
    for (int lane = 0; lane < group.n_lanes && first + lane < end; lane += kSumLoads) {
      LoadedNumbers<T, kWidth> loaded[kSumLoads];
#pragma unroll
      for (int r = 0; r < kSumLoads; r++) {
        const unsigned row = group.from_lane(position, lane + r);
        if (mine && first + lane + r < end) loaded[r].load(columns + row * embedding_dim);
      }
#pragma unroll
      for (int r = 0; r < kSumLoads; r++) loaded[r].add_to(sum);
    }
  }
  if (mine) store_numbers(parts + piece * stride + group.column, sum);
}

// ----------------------------------------------------------------------------------------------------- joins of pieces

constexpr int kJoinLanes = 16;
constexpr int kJoinLoads = 9;  // parts that a thread loads at a time: 132 blocks' (cuda/embedding_tables.cuh) among 16

template <class C>
constexpr int kJoinColumns = kJoinLanes * kPackSize<C>;  // of a block

// Adds up parts first, first + step, ... < end of the thread's columns.
template <class C>
__device__ __forceinline__ void sum_parts(const C* parts, int64_t stride, int64_t first, int64_t step, int64_t end,
                                          C (&sum)[kPackSize<C>]) {
  for (; first < end; first += kJoinLoads * step) {
    C values[kJoinLoads][kPackSize<C>] = {};
#pragma unroll
    for (int k = 0; k < kJoinLoads; k++) {
      if (first + k * step < end) load_numbers(parts + (first + k * step) * stride, values[k]);
    }
#pragma unroll
    for (int k = 0; k < kJoinLoads; k++) add_numbers(values[k], sum);
  }
}

// Adds up the sums of groups in the first, in their order. `shared`: [n_groups, kJoinLanes]. All threads of the block
// call it.
template <class C>
__device__ __forceinline__ void sum_groups(Pack<C>* shared, int group, int n_groups, C (&sum)[kPackSize<C>]) {
  store_to_shared(shared[group * kJoinLanes + threadIdx.x].values, sum);
  __syncthreads();
  if (group == 0) {
    for (int g = 1; g < n_groups; g++) {
      C values[kPackSize<C>];
      load_numbers(shared[g * kJoinLanes + threadIdx.x].values, values);
      add_numbers(values, sum);
    }
  }
  __syncthreads();
}

// Stores the columns of a thread below `end`, each rounded once.
template <class T>
__device__ __forceinline__ void store_columns(T* row, int64_t column, int64_t end,
                                              const Compute<T> (&sum)[kPackSize<Compute<T>>], Compute<T> factor) {
#pragma unroll
  for (int i = 0; i < kPackSize<Compute<T>>; i++) {
    if (column + i < end) row[column + i] = from_compute<T>(sum[i] * factor);
  }
}

constexpr int kMaxJoinGroups = 32;
// Where one for each index would be several waves, blocks join the parts of kJoinTeams indices.
constexpr int kJoinTeams = 8;
constexpr int64_t kManyJoinBlocks = 1024;

// grad[v, :n_columns] = the sum of the parts [piece_starts[v], piece_starts[v + 1]), or of `n_parts` if there are no
// pieces. Grid [tiles of columns, V / n_teams], block [kJoinLanes, groups]. Each team of groups joins an index, or the
// whole block one after the other if one of them has many parts.
template <class T>
__global__ void __launch_bounds__(kJoinLanes* kMaxJoinGroups, kMinResidentBlocks)
    embedding_join_parts(const int32_t* piece_starts, const int32_t* counts_before, int n_parts, int n_indices,
                         int n_teams, int64_t n_columns, int64_t stride, bool overlaps, const Compute<T>* parts,
                         T* grad) {
  using C = Compute<T>;
  CHARLM_SHARED(Pack<C>, shared, kMaxJoinGroups * kJoinLanes);
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kJoinColumns<C> + threadIdx.x * kPackSize<C>;
  const int first = static_cast<int>(blockIdx.y) * n_teams;
  int n_groups = static_cast<int>(blockDim.y) / n_teams, group = threadIdx.y % n_groups, team = threadIdx.y / n_groups;
  if (overlaps) wait_for_previous_kernel();
  bool one_by_one = false;
  if (n_teams > 1) {
    const int v = first + team;
    one_by_one = __syncthreads_or(v < n_indices && piece_starts[v + 1] - piece_starts[v] > n_groups * kJoinLoads);
    if (one_by_one) {
      n_groups = blockDim.y;
      group = threadIdx.y;
      team = 0;
    }
  }
  for (int i = team; i < n_teams; i += one_by_one ? 1 : n_teams) {
    const int v = first + i;
    const bool exists = v < n_indices && column < n_columns;
    int begin = 0, end = n_parts;
    if (exists && piece_starts) {
      begin = piece_starts[v];
      end = piece_starts[v + 1];
    }
    C sum[kPackSize<C>] = {};
    if (exists) sum_parts(parts + column, stride, begin + group, n_groups, end, sum);
    sum_groups(shared + team * n_groups * kJoinLanes, group, n_groups, sum);
    if (group != 0 || !exists) continue;
    const C factor =
        counts_before && end > begin ? C(1) / static_cast<C>(counts_before[v + 1] - counts_before[v]) : C(1);
    store_columns(grad + v * n_columns, column, n_columns, sum, factor);
  }
}

template <class T>
int join_parts(const Launch& launch, const int32_t* piece_starts, const int32_t* counts_before, int n_parts, int64_t v,
               int64_t n_columns, int64_t stride, const Compute<T>* parts, T* grad) {
  const int64_t n_tiles = ceil_div(n_columns, kJoinColumns<Compute<T>>);
  // Few blocks get many threads each.
  const int n_groups = n_tiles * v <= kDigits ? kMaxJoinGroups : kMaxJoinGroups / 2;
  const int n_teams = piece_starts && n_tiles * v > kManyJoinBlocks ? kJoinTeams : 1;
  LaunchOptions options;
  options.is_dependent = launch.compute_capability >= kSm90;
  return launch_kernel(options, &embedding_join_parts<T>,
                       dim3(static_cast<unsigned>(n_tiles), static_cast<unsigned>(ceil_div(v, n_teams))),
                       dim3(kJoinLanes, n_groups), 0, launch.stream, piece_starts, counts_before, n_parts,
                       static_cast<int>(v), n_teams, n_columns, stride, options.is_dependent, parts, grad);
}

// ------------------------------------------------------------------------------------------------------------- chunks

template <class T, class Int>
struct ChunkParams {
  SortedRows<Int> sorted;
  EmbeddingGradientParams<T> gradient;
  int64_t chunk_rows;
  int64_t n_chunks;
  int n_tiles;
  int n_zero_blocks;        // the first blocks: each clears the absent rows among kSumThreads
  int highest_digit_shift;  // of the sort
  bool overlaps;
  Int* split_keys;    // [n_chunks]: the index of the segment that is split where this chunk begins, or -1
  Compute<T>* parts;  // [n_chunks, 2, stride]: of a segment that began before, and of one that goes on
  int64_t stride;     // D, rounded up to whole packs
};

// The first row >= begin whose key is `key` or more, or `end`.
template <class Int>
__device__ __forceinline__ int64_t lower_bound(const Int* keys, int64_t begin, int64_t end, int64_t key) {
  while (begin < end) {
    const int64_t middle = begin + (end - begin) / 2;
    if (keys[middle] < key) {
      begin = middle + 1;
    } else {
      end = middle;
    }
  }
  return begin;
}

// Zeros in the rows of kSumThreads consecutive indices that do not occur.
template <class T, int kWidth, class Int>
__device__ __forceinline__ void clear_absent_rows(const ChunkParams<T, Int>& params) {
  CHARLM_SHARED(bool, is_absent, kSumThreads);
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kSumThreads, d = params.gradient.embedding_dim;
  const int64_t v = first + thread, digit = v >> params.highest_digit_shift;
  const bool exists = v < params.gradient.num_embeddings;
  const int64_t begin = exists ? params.sorted.starts[digit] : 0, end = exists ? params.sorted.starts[digit + 1] : 0;
  const int64_t row = lower_bound(params.sorted.keys, begin, end, v);
  is_absent[thread] = exists && (row == end || params.sorted.keys[row] != v);
  __syncthreads();
  const Compute<T> zero[kWidth] = {};
  for (int i = thread / kWarp; i < kSumThreads; i += kSumThreads / kWarp) {
    if (!is_absent[i]) continue;
    for (int64_t column = thread % kWarp * kWidth; column < d; column += kWarp * kWidth) {
      store_numbers(params.gradient.grad + (first + i) * d + column, zero);
    }
  }
}

// Blocks of a multiprocessor: with three, half types and float64 spill registers on sm_100.
template <class T>
constexpr int kChunkBlocks = sizeof(T) == 4 ? kSumBlocks : kMinResidentBlocks;

// Where a group of threads begins that owns the segments from row `begin` on: after the rows of a segment that began
// before, unless it covers a whole chunk.
template <class Int>
struct ChunkBegin {
  Int row;
  bool is_split;

  __device__ __forceinline__ ChunkBegin(const Int* keys, int64_t begin, Int chunk_rows, Int n, const SumGroup& group)
      : row(begin < n ? static_cast<Int>(begin) : n), is_split(false) {
    if (row == 0 || row == n) return;
    const Int key = keys[row];
    if (keys[row - 1] != key) return;
    is_split = n - row > chunk_rows && keys[row + chunk_rows] == key;
    while (!is_split) {
      const Int i = row + group.lane;
      const unsigned other = __ballot_sync(group.mask, i >= n || keys[i] != key) & group.mask;
      if (other) {
        row += __ffs(other) - __ffs(group.mask);
        return;
      }
      row += group.n_lanes;
    }
  }
};

template <class T, int kWidth, class Int>
__global__ void __launch_bounds__(kSumThreads, kChunkBlocks<T>)
    embedding_sum_chunks(const __grid_constant__ ChunkParams<T, Int> params) {
  using C = Compute<T>;
  if (params.overlaps) {
    let_next_kernel_begin();
    wait_for_previous_kernel();
  }
  if (static_cast<int>(blockIdx.x) < params.n_zero_blocks) return clear_absent_rows<T, kWidth>(params);
  const SumGroup group(blockIdx.x - params.n_zero_blocks, params.n_tiles, kWidth);
  const int64_t chunk = group.part, d = params.gradient.embedding_dim;
  const Int n = *params.sorted.n_sorted, chunk_rows = static_cast<Int>(params.chunk_rows);
  const Int *const keys = params.sorted.keys, *const positions = params.sorted.positions;
  if (chunk >= params.n_chunks) return;
  const ChunkBegin<Int> from(keys, chunk * chunk_rows, chunk_rows, n, group);
  if (group.tile == 0 && group.lane == 0) params.split_keys[chunk] = from.is_split ? keys[from.row] : -1;
  const ChunkBegin<Int> to(keys, (chunk + 1) * chunk_rows, chunk_rows, n, group);
  if (from.row >= to.row) return;

  const bool mine = group.column < d;
  const T* const columns = params.gradient.grad_output + group.column;
  const Int end = to.row;
  bool began_before = from.is_split;
  Int segment_begin = from.row;
  C sum[kWidth] = {};
  Int current = keys[from.row];
  const auto store = [&](Int segment_end, bool goes_on) {
    if (!mine) return;
    if (began_before || goes_on) {
      store_numbers(params.parts + (chunk * 2 + (began_before ? 0 : 1)) * params.stride + group.column, sum);
      return;
    }
    if (params.gradient.scale_grad_by_freq) {
      const C factor = C(1) / static_cast<C>(segment_end - segment_begin);
#pragma unroll
      for (int i = 0; i < kWidth; i++) sum[i] *= factor;
    }
    store_numbers(params.gradient.grad + current * d + group.column, sum);
  };

  const Int at = from.row + group.lane < end ? from.row + group.lane : from.row;
  Int next = positions[at], next_key = keys[at];
  for (Int first = from.row; first < end; first += group.n_lanes) {
    const Int position = next, key = next_key;
    const Int ahead = first + group.n_lanes;
    if (ahead < end) {
      next = positions[ahead + group.lane < end ? ahead + group.lane : ahead];
      next_key = keys[ahead + group.lane < end ? ahead + group.lane : ahead];
    }
    const int left = static_cast<int>(end - first < group.n_lanes ? end - first : group.n_lanes);
#pragma unroll 1
    for (int lane = 0; lane < left; lane += kSumLoads) {
      LoadedNumbers<T, kWidth> loaded[kSumLoads];
#pragma unroll
      for (int r = 0; r < kSumLoads; r++) {
        const int64_t row = group.from_lane(position, lane + r);
        if (mine && lane + r < left) loaded[r].load(columns + row * d);
      }
#pragma unroll
      for (int r = 0; r < kSumLoads; r++) {
        const Int now = group.from_lane(key, lane + r);
        if (lane + r >= left) break;
        if (now != current) {
          store(first + lane + r, false);
#pragma unroll
          for (int i = 0; i < kWidth; i++) sum[i] = 0;
          began_before = false;
          current = now;
          segment_begin = first + lane + r;
        }
        loaded[r].add_to(sum);
      }
    }
  }
  store(end, to.is_split);
}

constexpr int kJoinChunks = 8;  // of a block
constexpr int kJoinGroups = kSumThreads / kJoinLanes;

// Adds up the parts of the segments whose first split is at the end of one of a block's chunks. Grid [tiles of columns,
// chunks / kJoinChunks], block [kJoinLanes, kJoinGroups].
template <class T, class Int>
__global__ void __launch_bounds__(kSumThreads, kMinResidentBlocks)
    embedding_join_chunks(const __grid_constant__ ChunkParams<T, Int> params) {
  using C = Compute<T>;
  CHARLM_SHARED(Pack<C>, shared, kJoinGroups * kJoinLanes);
  if (params.overlaps) wait_for_previous_kernel();
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kJoinColumns<C> + threadIdx.x * kPackSize<C>;
  const int64_t d = params.gradient.embedding_dim, n_chunks = params.n_chunks, stride = params.stride;
  const int thread = threadIdx.y * blockDim.x + threadIdx.x;
  const int64_t first = static_cast<int64_t>(blockIdx.y) * kJoinChunks;
  Int keys[kJoinChunks + 1];
#pragma unroll
  for (int i = 0; i <= kJoinChunks; i++) keys[i] = first + i < n_chunks ? params.split_keys[first + i] : -1;
#pragma unroll
  for (int i = 0; i < kJoinChunks; i++) {
    const Int key = keys[i + 1];
    if (key < 0 || keys[i] == key) continue;
    // The second part of chunk first + i, then the first parts of the chunks up to `last`.
    const int64_t chunk = first + i;
    int64_t last = chunk + 1;
    for (int found = kSumThreads; found == kSumThreads; last += found) {
      found = __syncthreads_count(last + 1 + thread < n_chunks && params.split_keys[last + 1 + thread] == key);
    }
    C sum[kPackSize<C>] = {};
    if (column < d) {
      if (threadIdx.y == 0) {
        C values[kPackSize<C>];
        load_numbers(params.parts + (chunk * 2 + 1) * stride + column, values);
        add_numbers(values, sum);
      }
      sum_parts(params.parts + column, 2 * stride, chunk + 1 + threadIdx.y, kJoinGroups, last + 1, sum);
    }
    sum_groups(shared, threadIdx.y, kJoinGroups, sum);
    if (threadIdx.y != 0 || column >= d) continue;
    C factor = 1;
    if (params.gradient.scale_grad_by_freq) {
      const int64_t n = *params.sorted.n_sorted, begin = lower_bound(params.sorted.keys, 0, n, key);
      factor = C(1) / static_cast<C>(lower_bound(params.sorted.keys, begin, n, int64_t{key} + 1) - begin);
    }
    store_columns(params.gradient.grad + key * d, column, d, sum, factor);
  }
}

// ----------------------------------------------------------------------------------------------------------- launches

inline int64_t part_stride(int64_t n_columns) { return round_up(n_columns, kPackBytes / sizeof(float)); }

// Sums by pieces, for V <= kDigits. These functions first take what they need of the workspace; without a `launch` that
// is all they do.
template <class T, int kWidth>
int backward_by_pieces(const EmbeddingGradientParams<T>& params, Workspace& workspace, const Launch* launch) {
  const int64_t n = params.n_indices, v = params.num_embeddings, d = params.embedding_dim, stride = part_stride(d);
  const int lanes = sum_lanes(d, kWidth), n_groups = kSumThreads / lanes;
  const int64_t piece_rows = rows_a_part(n, lanes < kMaxSumLanes ? kShortPiece : kLongPiece);
  const int64_t many = n / piece_rows + v, n_pieces = many < n ? many : n, n_tiles = ceil_div(d, lanes * kWidth);
  Sort<int32_t> sort(workspace, n, v, static_cast<int>(piece_rows));
  auto* const parts = workspace.take<Compute<T>>(n_pieces * stride);
  if (!launch) return 0;
  int error = sort.run(params, *launch);
  if (error != 0) return error;
  const SortedRows<int32_t> sorted = sort.result();
  LaunchOptions options;
  options.is_dependent = launch->compute_capability >= kSm90;
  error = launch_kernel(options, &embedding_sum_pieces<T, kWidth>,
                        dim3(static_cast<unsigned>(ceil_div(n_pieces * n_tiles, n_groups))), dim3(lanes, n_groups), 0,
                        launch->stream, sorted, params.grad_output, d, static_cast<int>(n_tiles), stride,
                        options.is_dependent, parts);
  if (error != 0) return error;
  return join_parts<T>(*launch, sorted.piece_starts, params.scale_grad_by_freq ? sorted.starts : nullptr, 0, v, d,
                       stride, parts, params.grad);
}

// Sums by chunks, for any V.
template <class T, int kWidth, class Int>
int backward_by_chunks(const EmbeddingGradientParams<T>& params, Workspace& workspace, const Launch* launch) {
  const int64_t n = params.n_indices, v = params.num_embeddings, d = params.embedding_dim;
  const int lanes = sum_lanes(d, kWidth), n_groups = kSumThreads / lanes;
  Sort<Int> sort(workspace, n, v, 0);
  ChunkParams<T, Int> chunks;
  chunks.gradient = params;
  chunks.chunk_rows = rows_a_part(n, lanes < kMaxSumLanes ? kShortChunk : kLongChunk);
  chunks.n_chunks = ceil_div(n, chunks.chunk_rows);
  chunks.n_tiles = static_cast<int>(ceil_div(d, lanes * kWidth));
  chunks.n_zero_blocks = static_cast<int>(ceil_div(v, kSumThreads));
  chunks.highest_digit_shift = sort.highest_digit_shift();
  chunks.stride = part_stride(d);
  chunks.split_keys = workspace.take<Int>(chunks.n_chunks);
  chunks.parts = workspace.take<Compute<T>>(chunks.n_chunks * 2 * chunks.stride);
  if (!launch) return 0;
  int error = sort.run(params, *launch);
  if (error != 0) return error;
  chunks.sorted = sort.result();
  LaunchOptions options;
  options.is_dependent = chunks.overlaps = launch->compute_capability >= kSm90;
  const int64_t blocks = chunks.n_zero_blocks + ceil_div(chunks.n_chunks * chunks.n_tiles, n_groups);
  error = launch_kernel(options, &embedding_sum_chunks<T, kWidth, Int>, dim3(static_cast<unsigned>(blocks)),
                        dim3(lanes, n_groups), 0, launch->stream, chunks);
  if (error != 0 || chunks.n_chunks == 1) return error;
  return launch_kernel(options, &embedding_join_chunks<T, Int>,
                       dim3(static_cast<unsigned>(ceil_div(d, kJoinColumns<Compute<T>>)),
                            static_cast<unsigned>(ceil_div(chunks.n_chunks, kJoinChunks))),
                       dim3(kJoinLanes, kJoinGroups), 0, launch->stream, chunks);
}

}  // namespace
}  // namespace charlm::cuda
