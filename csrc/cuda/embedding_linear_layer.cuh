// embedding_linear for few tokens, with its products. A block handles 32 columns of H, a warp for them at a time.
//
// Forward, one launch: each block computes its columns of the table C @ W[:, t]^T in shared memory, and adds up rows of
// it for a part of the contexts. It reads N * T indices for each tile of columns and writes N * H elements.
//
// Backward, three launches:
// 1. embedding_linear_fill_tables: the gradient of the table. A block handles a part of the contexts, at 8 places or
//    fewer; each of its threads handles a column of every S-th context, which it adds into its own table in shared
//    memory, at all places, without atomics. The block adds up the tables of its threads in order, and writes the sum,
//    with that of the bias, to the workspace. It reads the gradient and what the activation's derivative is made of
//    once for each group of places.
// 2. embedding_linear_multiply_table: a block for each place and tile adds up the sums of the parts in order, and
//    computes its part of the gradient of W, and its share of that of C.
// 3. embedding_linear_join_shares: adds up the shares in order.
//
// The order of all sums depends on the sizes only.
#pragma once

#include "cuda/async.cuh"
#include "cuda/embedding_linear_activation.cuh"
#include "cuda/load_store.cuh"

namespace charlm::cuda {
namespace {

constexpr int kTile = static_cast<int>(kLayerColumns);
constexpr int kTileThreads = 32;  // a warp
constexpr unsigned kAllLanes = 0xffffffffu;
// Blocks of a launch: one for each of the 132 multiprocessors of an H100. The same for every GPU, so that results do
// not depend on the GPU.
constexpr int64_t kLayerBlocks = 132;

inline int64_t column_tiles(int64_t hidden) { return ceil_div(hidden, kTile); }

// ------------------------------------------------------------------------------------------------------------- forward

// One block a multiprocessor, because each computes a table. Double needs more registers.
template <class T>
constexpr int kForwardThreads = sizeof(Compute<T>) == 8 ? 512 : 1024;

// Stores kWidth numbers of 8 or 16 bytes at once, from a multiple of these on.
template <class T, int kWidth>
__device__ __forceinline__ void store_at_once(T* p, const Compute<T> (&values)[kWidth]) {
  if constexpr (kWidth == kPackSize<T>) {
    store_numbers(p, values);
  } else {
    struct alignas(8) Half {
      T values[kWidth];
    } half;
    static_assert(sizeof(half) == sizeof(uint64_t));
#pragma unroll
    for (int i = 0; i < kWidth; i++) half.values[i] = from_compute<T>(values[i]);
    *reinterpret_cast<uint64_t*>(p) = __builtin_bit_cast(uint64_t, half);
  }
}

// table[t * V + v, :] = C[v] @ W[:, t]^T for the columns from `first_column` on, [T * V, kTile]. The rest of the
// block's memory: see forward_numbers().
template <class T>
__device__ __forceinline__ void compute_table(const EmbeddingLinearParams<T>& params, int64_t first_column,
                                              Compute<T>* table) {
  using C = Compute<T>;
  constexpr int kTokens = static_cast<int>(kTokensAtATime), kThreads = kForwardThreads<T>;
  constexpr int kWarps = kThreads / kTileThreads;
  const int places = static_cast<int>(params.n_places), v_end = static_cast<int>(params.vocabulary);
  const int dim = static_cast<int>(params.embedding_dim), lane = threadIdx.x % kTileThreads;
  const int warp = threadIdx.x / kTileThreads, n_chunks = (v_end + kTokens - 1) / kTokens;
  const int n_inner = places * dim, inner_stride = n_inner | 1, token_stride = n_chunks * kTokens;
  C* const embedding = table + (places * v_end + 1) * kTile;  // [D, V], C transposed
  C* const weight = embedding + dim * token_stride;           // [kTile, T * D]

  for (int i = threadIdx.x; i < v_end * dim; i += kThreads) {
    const int v = i / dim, d = i % dim;
    embedding[d * token_stride + v] =
        to_compute(params.embedding[v * params.embedding_row_stride + d * params.embedding_column_stride]);
  }
  for (int h = warp; h < kTile; h += kWarps) {
    const T* const row = params.linear + (first_column + h) * params.linear_row_stride;
    const int end = first_column + h < params.hidden ? n_inner : 0;
#pragma unroll 4
    for (int k = lane; k < end; k += kTileThreads) {
      weight[h * inner_stride + k] = to_compute(row[k * params.linear_column_stride]);
    }
    for (int k = end + lane; k < n_inner; k += kTileThreads) weight[h * inner_stride + k] = 0;
  }
  if (threadIdx.x < kTile) table[places * v_end * kTile + threadIdx.x] = 0;
  __syncthreads();

  for (int unit = warp; unit < places * n_chunks; unit += kWarps) {  // a lane computes a column of kTokens rows
    const int t = unit / n_chunks, first = unit % n_chunks * kTokens;
    C sum[kTokens] = {};
    for (int d = 0; d < dim; d++) {
      const C factor = weight[lane * inner_stride + t * dim + d];
      C tokens[kTokens];
      load_numbers(embedding + d * token_stride + first, tokens);
#pragma unroll
      for (int i = 0; i < kTokens; i++) sum[i] += tokens[i] * factor;
    }
#pragma unroll
    for (int i = 0; i < kTokens; i++) {
      if (first + i < v_end) table[(t * v_end + first + i) * kTile + lane] = sum[i];
    }
  }
  __syncthreads();
}

// The index of a context at a place; 0 where there is none.
template <class T>
__device__ __forceinline__ int64_t index_or_zero(const EmbeddingLinearParams<T>& params, int64_t row, int place) {
  return row < params.n_rows && place < params.n_places ? load_index(params.indices, row * params.n_places + place) : 0;
}

// kLanes lanes handle a row of the tile, kWidth columns each. `at_once`: whether they can store these at once.
template <class T>
__global__ void __launch_bounds__(kForwardThreads<T>, 1)
    embedding_linear_forward(EmbeddingLinearParams<T> params, int n_tiles, bool at_once) {
  using C = Compute<T>;
  constexpr int kWidth = kPackSize<C>, kLanes = kTile / kWidth, kRows = kTileThreads / kLanes;
  constexpr int kWarps = kForwardThreads<T> / kTileThreads, kPlaces = 4;  // places at a time
  CHARLM_DYNAMIC_SHARED(C, table);
  const int tile = static_cast<int>(blockIdx.x) % n_tiles, lane = threadIdx.x % kTileThreads % kLanes;
  const int64_t first_column = static_cast<int64_t>(tile) * kTile, column = first_column + lane * kWidth;
  compute_table(params, first_column, table);

  const int places = static_cast<int>(params.n_places), v_end = static_cast<int>(params.vocabulary);
  const C* const columns = table + lane * kWidth;
  C bias[kWidth] = {};
#pragma unroll
  for (int i = 0; i < kWidth; i++) {
    if (params.bias && column + i < params.hidden) bias[i] = to_compute(params.bias[column + i]);
  }

  BadIndex bad;
  const int64_t step = static_cast<int64_t>(gridDim.x / n_tiles) * kWarps * kRows;
  int64_t row = (static_cast<int64_t>(blockIdx.x / n_tiles) * kWarps * kTileThreads + threadIdx.x) / kLanes;
  int64_t next = index_or_zero(params, row, lane);
  for (int64_t warp_row = row - threadIdx.x % kTileThreads / kLanes; warp_row < params.n_rows; warp_row += step) {
    C sum[kWidth];
#pragma unroll
    for (int i = 0; i < kWidth; i++) sum[i] = bias[i];
    for (int first = 0; first < places; first += kLanes) {  // each lane loads an index
      const int place = first + lane;
      int64_t index = next;
      if (first == 0) {
        next = index_or_zero(params, row + step, lane);
      } else {
        index = index_or_zero(params, row, place);
      }
      int offset = places * v_end * kTile;  // of the row of zeros
      if (row < params.n_rows && place < places && bad.check(params.indices, row * places + place, index)) {
        offset = (place * v_end + static_cast<int>(index)) * kTile;
      }
      for (int from = 0; from < kLanes && first + from < places; from += kPlaces) {
        C numbers[kPlaces][kWidth];
#pragma unroll
        for (int k = 0; k < kPlaces; k++) {
          load_numbers(columns + __shfl_sync(kAllLanes, offset, from + k, kLanes), numbers[k]);
        }
#pragma unroll
        for (int k = 0; k < kPlaces; k++) {
#pragma unroll
          for (int i = 0; i < kWidth; i++) sum[i] += numbers[k][i];
        }
      }
    }
    if (row < params.n_rows) {
      const auto store = [&](T* rows) {
        T* const p = rows + row * params.hidden + column;
        if (at_once) {
          if (column < params.hidden) store_at_once(p, sum);
        } else {
#pragma unroll
          for (int i = 0; i < kWidth; i++) {
            if (column + i < params.hidden) p[i] = from_compute<T>(sum[i]);
          }
        }
      };
      if (params.before) store(params.before);
      activate(params.activation, sum);
      store(params.output);
    }
    row += step;
  }
  if (tile == 0) bad.record(params.indices);
}

template <class T>
int layer_forward(const EmbeddingLinearParams<T>& params, Launch& launch) {
  constexpr int kWidth = kPackSize<Compute<T>>;
  constexpr int64_t kRowsAtATime = kForwardThreads<T> * kWidth / kTile;
  const int64_t n_tiles = column_tiles(params.hidden);
  int64_t n_parts = ceil_div(params.n_rows, kRowsAtATime);
  const int64_t most = n_tiles < kLayerBlocks ? kLayerBlocks / n_tiles : 1;
  if (n_parts > most) n_parts = most;
  const uintptr_t all = reinterpret_cast<uintptr_t>(params.output) | reinterpret_cast<uintptr_t>(params.before);
  const bool at_once = params.hidden % kWidth == 0 && all % (kWidth * sizeof(T)) == 0;
  const int64_t bytes = forward_numbers(params.n_places, params.vocabulary, params.embedding_dim) * sizeof(Compute<T>);
  return launch_kernel(&embedding_linear_forward<T>, dim3(static_cast<unsigned>(n_parts * n_tiles)),
                       dim3(kForwardThreads<T>), bytes, launch.stream, params, static_cast<int>(n_tiles), at_once);
}

// -------------------------------------------------------------------------------------- backward: the table's gradient

// Warps of a block, at most: two blocks then have 168 registers a thread, or 255.
template <class C>
constexpr int kFillWarps = sizeof(C) == 8 ? 4 : 6;
constexpr int64_t kFillBytes = 96'000;  // of a block's tables; with the offsets below kMostLayerBytes' limit of 99 KiB
constexpr int kFillIndices = 8;         // that a thread loads at a time
constexpr int64_t kFewestRowsOfAWarp = 16;
constexpr int64_t kManyRowsOfAWarp = 128;  // so many pay for a second block on each multiprocessor
// A thread adds all rows of a token in one number, so that more would round worse than torch's products.
constexpr int64_t kMostRowsOfAWarp = 4096;
// Rows that a thread loads at a time.
template <class T>
constexpr int kFillLoads = sizeof(T) == 8 ? 4 : 16;

struct FillPlan {
  int64_t n_tiles;       // of columns
  int64_t n_groups;      // of places
  int64_t group_places;  // the last group may have fewer
  int n_warps;           // S
  int64_t n_parts;       // P, of the contexts
  int64_t rows_a_part;
  int64_t row_stride;         // of the workspace [P, T * V + 1, H], whose last row is the bias's: H rounded up to packs
  int64_t part_stride;        // numbers
  bool is_dependent = false;  // launches 2 and 3 may begin early, to hide what a launch costs: sm_90

  FillPlan(int64_t n, int64_t places, int64_t v, int64_t hidden, int64_t number_size, int most_warps) {
    constexpr int64_t kMostPlaces = 8;
    n_tiles = column_tiles(hidden);
    const int64_t fitting = kMostLayerTokens / v, most = fitting < kMostPlaces ? fitting : kMostPlaces;
    n_groups = ceil_div(places, most);
    group_places = ceil_div(places, n_groups);
    const int64_t tables = kFillBytes / ((group_places * v + 1) * kTile * number_size);
    n_warps = static_cast<int>(tables < most_warps ? tables : most_warps);
    const int64_t few = ceil_div(kLayerBlocks, n_tiles * n_groups),
                  many = ceil_div(2 * kLayerBlocks, n_tiles * n_groups);
    const int64_t busy = n / (n_warps * kManyRowsOfAWarp), needed = ceil_div(n, n_warps * kFewestRowsOfAWarp);
    const int64_t exact = ceil_div(n, n_warps * kMostRowsOfAWarp);
    n_parts = busy < few ? few : busy < many ? busy : many;
    if (n_parts < exact) n_parts = exact < kMaxBlocks ? exact : kMaxBlocks;
    if (n_parts > needed) n_parts = needed;
    rows_a_part = ceil_div(n, n_parts);
    n_parts = ceil_div(n, rows_a_part);
    row_stride = round_up(hidden, kPackBytes / number_size);
    part_stride = (places * v + 1) * row_stride;
  }

  template <class T>
  explicit FillPlan(const EmbeddingLinearParams<T>& params)
      : FillPlan(params.n_rows, params.n_places, params.vocabulary, params.hidden, sizeof(Compute<T>),
                 kFillWarps<Compute<T>>) {}
};

// The sum of kCount numbers, a power of two: of neighbours, then of neighbouring sums, and so on.
template <int kCount, class C>
__device__ __forceinline__ C sum_of_pairs(const C (&numbers)[kCount]) {
  C sums[kCount];
#pragma unroll
  for (int i = 0; i < kCount; i++) sums[i] = numbers[i];
#pragma unroll
  for (int step = 1; step < kCount; step *= 2) {
#pragma unroll
    for (int i = 0; i + step < kCount; i += 2 * step) sums[i] += sums[i + step];
  }
  return sums[0];
}

// Block [kTileThreads, S], grid [n_tiles * n_groups, P]. kPlaces: of a group, or more.
template <class T, int kPlaces>
__global__ void __launch_bounds__(kTileThreads* kFillWarps<Compute<T>>, kMinResidentBlocks)
    embedding_linear_fill_tables(EmbeddingLinearParams<T> params, FillPlan plan, Compute<T>* workspace) {
  using C = Compute<T>;
  constexpr int kLoads = kFillLoads<T>, kStride = kPlaces == 3 ? 4 : kPlaces;  // of a row's offsets
  constexpr int kChunkLoads = kFillIndices * kTileThreads / kStride;           // rows of a warp in a chunk
  static_assert(kChunkLoads % kLoads == 0);
  struct alignas(kStride * sizeof(uint16_t)) Offsets {
    uint16_t values[kStride];
  };
  CHARLM_DYNAMIC_SHARED(C, tables);  // [T * V + 1, S, kTile]; the last row takes what does not count
  CHARLM_SHARED(Offsets, offsets, 2 * kFillIndices * kFillWarps<C> * kTileThreads / kStride);
  const int n_warps = blockDim.y, n_threads = n_warps * kTileThreads, warp = threadIdx.y, lane = threadIdx.x;
  const int thread = warp * kTileThreads + lane, chunk_rows = n_warps * kChunkLoads;
  const int tile = static_cast<int>(blockIdx.x % plan.n_tiles), group = static_cast<int>(blockIdx.x / plan.n_tiles);
  const int v_end = static_cast<int>(params.vocabulary), first_place = group * static_cast<int>(plan.group_places);
  const int places_left = static_cast<int>(params.n_places) - first_place;
  const int places = places_left < plan.group_places ? places_left : static_cast<int>(plan.group_places);
  const int n_entries = places * v_end;
  const int64_t column = static_cast<int64_t>(tile) * kTile + lane;
  const int64_t begin = blockIdx.y * plan.rows_a_part;
  const int64_t end = begin + plan.rows_a_part < params.n_rows ? begin + plan.rows_a_part : params.n_rows;

  BadIndex bad;
  int64_t index[kFillIndices];
  const auto load_chunk = [&](int64_t first_row) {
    with_index_type(params.indices, [&](const auto* data) {
#pragma unroll
      for (int k = 0; k < kFillIndices; k++) {
        const int i = k * n_threads + thread, place = i % kStride;
        const int64_t row = first_row + i / kStride;
        index[k] = row < end && place < places ? data[row * params.n_places + first_place + place] : 0;
      }
    });
  };
  // The rows that a thread adds are begin + warp, begin + warp + S, ...
  T next[kLoads], next_kept[kLoads];
  const bool differentiates = params.activation != Activation::kNone;
  const auto load_gradients = [&](int64_t first_row) {
#pragma unroll
    for (int k = 0; k < kLoads; k++) {
      const int64_t row = first_row + k * n_warps;
      const bool exists = row < end && column < params.hidden;
      next[k] = {};
      next_kept[k] = {};
      if (exists) next[k] = params.grad_output[row * params.hidden + column];
      if (exists && differentiates) next_kept[k] = params.kept[row * params.hidden + column];
    }
  };

  load_chunk(begin);
  load_gradients(begin + warp);
  C* const table = tables + thread;  // a row starts every n_threads numbers
  for (int entry = 0; entry <= n_entries; entry++) table[entry * n_threads] = 0;
  C bias = 0;                  // the sum of the sums of the chunks: of all rows, unlike those of a token
  Offsets* written = offsets;  // the half that this chunk uses
  for (int64_t chunk = begin; chunk < end; chunk += chunk_rows) {
    uint16_t* const values = written->values;
#pragma unroll
    for (int k = 0; k < kFillIndices; k++) {
      const int i = k * n_threads + thread, place = i % kStride;
      const int64_t row = chunk + i / kStride;
      int entry = n_entries;
      if (row < end && place < places &&
          bad.check(params.indices, row * params.n_places + first_place + place, index[k])) {
        entry = place * v_end + static_cast<int>(index[k]);
      }
      values[i] = static_cast<uint16_t>(entry * n_threads);
    }
    load_chunk(chunk + chunk_rows);
    __syncthreads();
    C chunk_bias = 0;
    for (int row = warp; row < chunk_rows && chunk + row < end; row += kLoads * n_warps) {
      C grad[kLoads], kept[kLoads];
#pragma unroll
      for (int k = 0; k < kLoads; k++) {
        grad[k] = to_compute(next[k]);
        kept[k] = to_compute(next_kept[k]);
      }
      load_gradients(chunk + row + kLoads * n_warps);
      activate_backward(params.activation, kept, grad);
      chunk_bias += sum_of_pairs(grad);
      Offsets next_offset = written[row];
#pragma unroll
      for (int k = 0; k < kLoads; k++) {
        if (chunk + row + k * n_warps >= end) break;
        const Offsets offset = next_offset;
        if (k + 1 < kLoads) next_offset = written[row + (k + 1) * n_warps];  // a chunk's rows are all written
        C sum[kPlaces];
#pragma unroll
        for (int place = 0; place < kPlaces; place++) sum[place] = table[offset.values[place]];
#pragma unroll
        for (int place = 0; place < kPlaces; place++) table[offset.values[place]] = sum[place] + grad[k];
      }
    }
    bias += chunk_bias;
    written = written == offsets ? offsets + chunk_rows : offsets;
  }
  if (tile == 0) bad.record(params.indices);

  if (plan.is_dependent) let_next_kernel_begin();
  table[n_entries * n_threads] = bias;
  __syncthreads();
  if (column >= plan.row_stride) return;
  C* const part = workspace + blockIdx.y * plan.part_stride + column;
  for (int entry = warp; entry < n_entries + (group == 0 ? 1 : 0); entry += n_warps) {
    C sum = 0;
    for (int s = 0; s < n_warps; s++) sum += tables[entry * n_threads + s * kTileThreads + lane];
    const int64_t row =
        entry == n_entries ? params.n_places * v_end : static_cast<int64_t>(first_place) * v_end + entry;
    part[row * plan.row_stride] = sum;
  }
}

// ------------------------------------------------------------------------------- backward: the gradients of C, W and b

constexpr int kProductThreads = 256;
constexpr int kProductWidth = 4;  // rows or columns for which a thread computes a number

// Grid T * n_tiles, a place's tiles in a row. `shares`: [T * n_tiles, V * D].
template <class T>
__global__ void __launch_bounds__(kProductThreads, kMinResidentBlocks)
    embedding_linear_multiply_table(EmbeddingLinearParams<T> params, FillPlan plan, const Compute<T>* workspace,
                                    Compute<T>* shares) {
  using C = Compute<T>;
  constexpr int kWidth = kPackSize<C>, kLanes = kTile / kWidth;
  CHARLM_DYNAMIC_SHARED(C, table);  // [V, kTile]: the gradient of the table
  const int v_end = static_cast<int>(params.vocabulary), dim = static_cast<int>(params.embedding_dim);
  const int tile = static_cast<int>(blockIdx.x % plan.n_tiles), thread = threadIdx.x;
  const int64_t place = blockIdx.x / plan.n_tiles, first_column = static_cast<int64_t>(tile) * kTile;
  C* const embedding = table + v_end * kTile;  // [V, D]: C
  C* const weight = embedding + v_end * dim;   // [kTile, D]: W at this place
  for (int i = thread; i < v_end * dim; i += kProductThreads) {
    const int v = i / dim, d = i % dim;
    embedding[i] = to_compute(params.embedding[v * params.embedding_row_stride + d * params.embedding_column_stride]);
  }
  for (int i = thread; i < kTile * dim; i += kProductThreads) {
    const int h = i / dim, d = i % dim;
    weight[i] = first_column + h < params.hidden
                    ? to_compute(params.linear[(first_column + h) * params.linear_row_stride +
                                               (place * dim + d) * params.linear_column_stride])
                    : C(0);
  }

  if (plan.is_dependent) {
    let_next_kernel_begin();
    wait_for_previous_kernel();
  }
  const int lane = thread % kLanes;
  const int64_t column = first_column + lane * kWidth;
  for (int v = thread / kLanes; v <= v_end; v += kProductThreads / kLanes) {
    const bool is_bias = v == v_end;
    if (is_bias && (place != 0 || !params.grad_bias)) break;
    C sum[kWidth] = {};
    if (column < plan.row_stride) {
      const int64_t row = is_bias ? params.n_places * v_end : place * v_end + v;
      const C* numbers = workspace + row * plan.row_stride + column;
#pragma unroll 8
      for (int64_t part = 0; part < plan.n_parts; part++) {
        C values[kWidth];
        load_numbers(numbers + part * plan.part_stride, values);
#pragma unroll
        for (int i = 0; i < kWidth; i++) sum[i] += values[i];
      }
    }
#pragma unroll
    for (int i = 0; i < kWidth; i++) {
      if (!is_bias) {
        table[v * kTile + lane * kWidth + i] = sum[i];
      } else if (column + i < params.hidden) {
        params.grad_bias[column + i] = from_compute<T>(sum[i]);
      }
    }
  }
  __syncthreads();

  if (params.grad_linear) {  // kProductWidth columns of the tile in one of D
    for (int unit = thread; unit < kTile / kProductWidth * dim; unit += kProductThreads) {
      const int d = unit % dim, first = unit / dim * kProductWidth;
      C sum[kProductWidth] = {};
      for (int v = 0; v < v_end; v++) {
        C rows[kProductWidth];
        load_numbers(table + v * kTile + first, rows);
        const C factor = embedding[v * dim + d];
#pragma unroll
        for (int i = 0; i < kProductWidth; i++) sum[i] += rows[i] * factor;
      }
#pragma unroll
      for (int i = 0; i < kProductWidth; i++) {
        const int64_t h = first_column + first + i;
        if (h < params.hidden) params.grad_linear[(h * params.n_places + place) * dim + d] = from_compute<T>(sum[i]);
      }
    }
  }
  if (!params.grad_embedding) return;
  const int n_fours = (v_end + kProductWidth - 1) / kProductWidth;
  for (int unit = thread; unit < n_fours * dim; unit += kProductThreads) {  // kProductWidth tokens in one of D
    const int d = unit % dim, first = unit / dim * kProductWidth;
    C sum[kProductWidth] = {};
    for (int h = 0; h < kTile; h += kProductWidth) {
      C factors[kProductWidth];
#pragma unroll
      for (int j = 0; j < kProductWidth; j++) factors[j] = weight[(h + j) * dim + d];
#pragma unroll
      for (int i = 0; i < kProductWidth; i++) {
        const int v = first + i < v_end ? first + i : v_end - 1;
        C columns[kProductWidth];
        load_numbers(table + v * kTile + h, columns);
#pragma unroll
        for (int j = 0; j < kProductWidth; j++) sum[i] += columns[j] * factors[j];
      }
    }
    C* const share = shares + static_cast<int64_t>(blockIdx.x) * v_end * dim + d;
#pragma unroll
    for (int i = 0; i < kProductWidth; i++) {
      if (first + i < v_end) share[(first + i) * dim] = sum[i];
    }
  }
}

constexpr int kJoinGroups = 8;

// Block [kTileThreads, kJoinGroups]: each thread sums an element over one of kJoinGroups groups of shares.
template <class T>
__global__ void __launch_bounds__(kTileThreads* kJoinGroups, kMinResidentBlocks)
    embedding_linear_join_shares(const Compute<T>* shares, int64_t n_shares, int64_t embedding_dim, int64_t n_elements,
                                 int64_t padding_idx, bool is_dependent, T* grad) {
  using C = Compute<T>;
  CHARLM_SHARED(C, sums, kJoinGroups * kTileThreads);
  const int lane = threadIdx.x, group = threadIdx.y;
  const int64_t element = static_cast<int64_t>(blockIdx.x) * kTileThreads + lane;
  if (is_dependent) wait_for_previous_kernel();
  C sum = 0;
  if (element < n_elements) {
    const int64_t end = n_shares * (group + 1) / kJoinGroups;
#pragma unroll 8
    for (int64_t share = n_shares * group / kJoinGroups; share < end; share++)
      sum += shares[share * n_elements + element];
  }
  sums[group * kTileThreads + lane] = sum;
  __syncthreads();
  if (group != 0 || element >= n_elements) return;
#pragma unroll
  for (int g = 1; g < kJoinGroups; g++) sum += sums[g * kTileThreads + lane];
  grad[element] = from_compute<T>(element / embedding_dim == padding_idx ? C(0) : sum);
}

// ---------------------------------------------------------------------------------------------------- backward: launch

template <class T>
auto fill_tables_kernel(int64_t group_places) {
  switch (group_places) {
    case 1:
      return &embedding_linear_fill_tables<T, 1>;
    case 2:
      return &embedding_linear_fill_tables<T, 2>;
    case 3:
      return &embedding_linear_fill_tables<T, 3>;
    case 4:
      return &embedding_linear_fill_tables<T, 4>;
    default:
      return &embedding_linear_fill_tables<T, 8>;
  }
}

template <class T>
int64_t layer_workspace(const EmbeddingLinearParams<T>& params) {
  const FillPlan plan(params);
  return plan.n_parts * plan.part_stride + params.n_places * plan.n_tiles * params.vocabulary * params.embedding_dim;
}

template <class T>
int layer_backward(const EmbeddingLinearParams<T>& params, Launch& launch) {
  constexpr int64_t kSize = sizeof(Compute<T>);
  FillPlan plan(params);
  plan.is_dependent = launch.compute_capability >= kSm90;
  const LaunchOptions options{.is_dependent = plan.is_dependent};
  auto* const workspace = static_cast<Compute<T>*>(launch.workspace);
  Compute<T>* const shares = workspace + plan.n_parts * plan.part_stride;
  const int64_t table_bytes = (plan.group_places * params.vocabulary + 1) * plan.n_warps * kTile * kSize;
  const dim3 grid(static_cast<unsigned>(plan.n_tiles * plan.n_groups), static_cast<unsigned>(plan.n_parts));
  int error = launch_kernel(fill_tables_kernel<T>(plan.group_places), grid, dim3(kTileThreads, plan.n_warps),
                            table_bytes, launch.stream, params, plan, workspace);
  if (error != 0 || !(params.grad_embedding || params.grad_linear || params.grad_bias)) return error;
  const int64_t n_shares = params.n_places * plan.n_tiles;
  error = launch_kernel(options, &embedding_linear_multiply_table<T>, dim3(static_cast<unsigned>(n_shares)),
                        dim3(kProductThreads), backward_numbers(params.vocabulary, params.embedding_dim) * kSize,
                        launch.stream, params, plan, workspace, shares);
  if (error != 0 || !params.grad_embedding) return error;
  const int64_t n_elements = params.vocabulary * params.embedding_dim;
  return launch_kernel(options, &embedding_linear_join_shares<T>,
                       dim3(static_cast<unsigned>(ceil_div(n_elements, kTileThreads))), dim3(kTileThreads, kJoinGroups),
                       0, launch.stream, shares, n_shares, params.embedding_dim, n_elements, params.padding_idx,
                       plan.is_dependent, params.grad_embedding);
}

}  // namespace
}  // namespace charlm::cuda
