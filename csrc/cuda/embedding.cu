// embedding on a GPU: the lookup, and the registration of the gradient's kernels.
#include <type_traits>

#include "cuda/embedding_tables.cuh"
#include "cuda/load_store.cuh"
#include "ops/embedding.h"

namespace charlm::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------- forward
// The lookup copies rows of the table in words as wide as the sizes and addresses of the rows allow, or element by
// element if the elements of a row are not contiguous. Reads N * D elements and N indices, writes N * D elements.

constexpr int kCopyThreads = 256, kCopyBlocks = 5, kShortCopyBlocks = 4;  // blocks of a multiprocessor
constexpr int kCopiesInFlight = 4;   // words that a thread loads before it stores the first
constexpr int kShortCopies = 8;      // the same for short rows: all that a thread copies
constexpr int kMaxCopyRows = kWarp;  // of a warp
constexpr int64_t kMaxShortWords = int64_t{1} << 31;
// A warp copies at most this many words of a row, and this many long rows one after the other if there are enough for
// every multiprocessor.
constexpr int kLongTile = 2 * kCopiesInFlight * kWarp, kLongRows = 4;
constexpr int64_t kManyRows = 65536;

// A warp copies `warp_rows` rows, of which each lane loads and checks one index, or a tile of these rows. `lanes`
// threads copy a row: so short rows are copied kWarp / lanes at once, kShortCopies times (kShort: n_words <= lanes, and
// the table has at most kMaxShortWords); of a longer row each thread copies kCopiesInFlight words at once.
template <class Word, bool kShort>
__global__ void __launch_bounds__(kCopyThreads, kShort ? kShortCopyBlocks : kCopyBlocks)
    embedding_copy_rows(const __grid_constant__ EmbeddingParams params, int64_t n_words, int lanes, int warp_rows,
                        unsigned n_tiles) {
  const int lane = threadIdx.x % kWarp;
  const int64_t warp = (static_cast<int64_t>(blockIdx.x) * kCopyThreads + threadIdx.x) / kWarp;
  const int64_t first = (n_tiles == 1 ? warp : warp / n_tiles) * warp_rows;
  const int64_t n_left = params.n_indices - first;
  if (n_left <= 0) return;
  const int n_rows = n_left < warp_rows ? static_cast<int>(n_left) : warp_rows;
  using Offset = std::conditional_t<kShort, int32_t, int64_t>;  // one shuffle each, or two
  constexpr int64_t kUnit = kShort ? sizeof(Word) : 1;
  Offset own = -1;  // kUnit bytes each from the table's begin to this lane's row; -1 for an index out of range
  if (lane < n_rows) {
    const int64_t index = load_index(params.indices, first + lane);
    BadIndex bad;
    if (bad.check(params.indices, first + lane, index)) own = static_cast<Offset>(index * (params.row_stride / kUnit));
    bad.record(params.indices);
  }
  Word* const output = reinterpret_cast<Word*>(params.output) + first * n_words;
  if constexpr (kShort) {
    const int word = lane % lanes, row = lane / lanes, rows_at_once = kWarp / lanes;
    const Word* const column = reinterpret_cast<const Word*>(params.weight + word * params.column_stride);
    Word words[kShortCopies];
#pragma unroll
    for (int k = 0; k < kShortCopies; k++) {
      const Offset from = __shfl_sync(~0u, own, (row + k * rows_at_once) % kWarp);
      words[k] = Word{};  // zeros for an index out of range, until its IndexError is raised
      if (from >= 0 && row + k * rows_at_once < n_rows && word < n_words) words[k] = column[from];
    }
#pragma unroll
    for (int k = 0; k < kShortCopies; k++) {
      const int to = row + k * rows_at_once;
      if (to < n_rows && word < n_words) output[to * static_cast<int>(n_words) + word] = words[k];
    }
  } else {
    const int64_t begin = n_tiles == 1 ? 0 : warp % n_tiles * kLongTile;
    const int64_t end = n_words - begin < kLongTile ? n_words : begin + kLongTile;
#pragma unroll 1
    for (int row = 0; row < n_rows; row++) {
      const int64_t from = __shfl_sync(~0u, own, row);
      Word* const to = output + row * n_words;
#pragma unroll 1
      for (int64_t word = begin + lane; word - lane < end; word += kCopiesInFlight * kWarp) {
        const char* const at = params.weight + from + word * params.column_stride;
        Word words[kCopiesInFlight];
#pragma unroll
        for (int k = 0; k < kCopiesInFlight; k++) {
          words[k] = Word{};
          if (from >= 0 && word + k * kWarp < end) {
            words[k] = *reinterpret_cast<const Word*>(at + k * kWarp * params.column_stride);
          }
        }
#pragma unroll
        for (int k = 0; k < kCopiesInFlight; k++) {
          if (word + k * kWarp < end) to[word + k * kWarp] = words[k];
        }
      }
    }
  }
}

template <class Word>
int copy_rows(const EmbeddingParams& params, int64_t n_words, Stream stream) {
  const int64_t table_words = params.num_embeddings * (params.row_stride / static_cast<int64_t>(sizeof(Word)));
  const bool is_short = n_words <= kWarp && table_words <= kMaxShortWords;
  const int lanes = is_short ? power_of_two(n_words) : kWarp;
  int warp_rows = params.n_indices < kManyRows ? 1 : kLongRows;
  if (is_short) {
    warp_rows = kShortCopies * kWarp / lanes;
    if (warp_rows > kMaxCopyRows) warp_rows = kMaxCopyRows;
  }
  const int64_t n_tiles = is_short ? 1 : ceil_div(n_words, kLongTile);
  const int64_t warps = ceil_div(params.n_indices, warp_rows) * n_tiles;
  const auto kernel = is_short ? &embedding_copy_rows<Word, true> : &embedding_copy_rows<Word, false>;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(ceil_div(warps, kCopyThreads / kWarp))), dim3(kCopyThreads),
                       0, stream, params, n_words, lanes, warp_rows, n_tiles);
}

int embedding_forward(const EmbeddingParams& params, Launch& launch) {
  if (params.n_indices == 0) return 0;
  EmbeddingParams words = params;
  int64_t word = params.element_size, n_words = params.embedding_dim;
  if (params.column_stride == params.element_size || params.embedding_dim <= 1) {
    const int64_t row_bytes = params.embedding_dim * params.element_size;
    // The lowest set bit is the largest power of two that divides all of these.
    const int64_t all = row_bytes | params.row_stride | reinterpret_cast<intptr_t>(params.weight) |
                        reinterpret_cast<intptr_t>(params.output) | 16;
    word = all & -all;
    n_words = row_bytes / word;
    words.column_stride = word;
  }
  switch (word) {
    case 16:
      return copy_rows<uint4>(words, n_words, launch.stream);
    case 8:
      return copy_rows<uint64_t>(words, n_words, launch.stream);
    case 4:
      return copy_rows<uint32_t>(words, n_words, launch.stream);
    case 2:
      return copy_rows<uint16_t>(words, n_words, launch.stream);
    default:
      return copy_rows<uint8_t>(words, n_words, launch.stream);
  }
}

// ----------------------------------------------------------------------------------------------------------- gradient

// Up to here, V and N plus a block's rows fit in 32 bits.
constexpr int64_t kMax32Bits = 1 << 30;

// Chooses how to sum. Times of an H200 for N = 262144, in microseconds.
template <class T>
int run_gradient(const EmbeddingGradientParams<T>& params, Workspace& workspace, const Launch* launch) {
  constexpr int kPack = kPackSize<T>;
  const int64_t n = params.n_indices, v = params.num_embeddings, d = params.embedding_dim;
  const bool packs = d % kPack == 0 && reinterpret_cast<uintptr_t>(params.grad_output) % kPackBytes == 0;
  if (v <= kDigits && !params.scale_grad_by_freq) {
    // No sort before the sums: 34 where pieces take 43 (256 x 64, float32). But each tile of columns sorts the indices
    // again, and nothing is loaded meanwhile, so that for more than two batches a block (see TablesPlan), pieces are
    // faster: 227 at 256 x 768. Narrow rows are always summed from shared memory.
    if (d * static_cast<int64_t>(sizeof(T)) < kStagedRowBytes) {
      return backward_by_tables<T, 1, true>(params, workspace, launch);
    }
    const int64_t n_tiles =
        packs ? TablesPlan<T, kPack, false>(n, v, d).n_tiles : TablesPlan<T, 1, false>(n, v, d).n_tiles;
    if (n * n_tiles <= 2 * kTableBlocks * kSortRows) {
      return packs ? backward_by_tables<T, kPack, false>(params, workspace, launch)
                   : backward_by_tables<T, 1, false>(params, workspace, launch);
    }
  }
  if (n > kMax32Bits || v > kMax32Bits) return backward_by_chunks<T, 1, int64_t>(params, workspace, launch);
  // Pieces need a sort by one digit only.
  if (v <= kDigits) {
    return packs ? backward_by_pieces<T, kPack>(params, workspace, launch)
                 : backward_by_pieces<T, 1>(params, workspace, launch);
  }
  return packs ? backward_by_chunks<T, kPack, int32_t>(params, workspace, launch)
               : backward_by_chunks<T, 1, int32_t>(params, workspace, launch);
}

template <class T>
int64_t gradient_workspace(const EmbeddingGradientParams<T>& params) {
  Workspace workspace(nullptr);
  run_gradient(params, workspace, nullptr);
  return workspace.bytes();
}

template <class T>
int embedding_backward(const EmbeddingGradientParams<T>& params, Launch& launch) {
  Workspace workspace(launch.workspace);
  return run_gradient(params, workspace, &launch);
}

// ------------------------------------------------------------------------------------------------------ registration

[[maybe_unused]] const bool forward_is_registered = (kernels().embedding_forward = &embedding_forward, true);

CHARLM_REGISTER_KERNELS(embedding, {nullptr, nullptr, nullptr, &gradient_workspace<T>, &embedding_backward<T>});

}  // namespace
}  // namespace charlm::cuda
