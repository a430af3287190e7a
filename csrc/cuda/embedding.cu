// embedding on a GPU: the lookup, and the registration of the gradient's kernels.
#include "cuda/embedding_sorted.cuh"
#include "cuda/embedding_tables.cuh"
#include "cuda/load_store.cuh"
#include "ops/embedding.h"

namespace charlm::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------- forward
// The lookup copies rows of the table in words as wide as the sizes and addresses of the rows allow, or element by
// element if the elements of a row are not contiguous. Reads N * D elements and N indices, writes N * D elements.

constexpr int kCopyThreads = 256;
constexpr int kCopiesInFlight = 4;  // words that a thread loads before it stores the first

// blockDim.x threads copy a row, and a block copies blockDim.y * kRows rows at a time. A thread copies several short
// rows (kRows > 1) or several words of one long row at once.
template <class Word, int kRows>
__global__ void __launch_bounds__(kCopyThreads, kMinResidentBlocks)
    embedding_copy_rows(const __grid_constant__ EmbeddingParams params, int64_t n_words) {
  const Indices& indices = params.indices;
  const int64_t n_indices = params.n_indices;
  Word* const output = reinterpret_cast<Word*>(params.output);
  constexpr int kWords = kCopiesInFlight / kRows;
  const int64_t rows_at_once = blockDim.y * kRows;
  for (int64_t first = blockIdx.x * rows_at_once + threadIdx.y; first < n_indices; first += gridDim.x * rows_at_once) {
    int64_t index[kRows];
    load_indices(indices, first, blockDim.y, n_indices, index);
    const char* row[kRows];
    BadIndex bad;
#pragma unroll
    for (int k = 0; k < kRows; k++) {
      const int64_t n = first + k * blockDim.y;
      const bool valid = n < n_indices && bad.check(indices, n, index[k]);
      row[k] = valid ? params.weight + index[k] * params.row_stride : nullptr;
    }
    if (threadIdx.x == 0) bad.record(indices);
#pragma unroll 1
    for (int64_t w = threadIdx.x; w < n_words; w += kWords * blockDim.x) {
      Word words[kRows][kWords];
#pragma unroll
      for (int k = 0; k < kRows; k++) {
#pragma unroll
        for (int j = 0; j < kWords; j++) {
          const int64_t word = w + j * blockDim.x;
          words[k][j] = Word{};  // zeros for an index out of range, until its IndexError is raised
          if (row[k] && word < n_words) {
            words[k][j] = *reinterpret_cast<const Word*>(row[k] + word * params.column_stride);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; k++) {
#pragma unroll
        for (int j = 0; j < kWords; j++) {
          const int64_t word = w + j * blockDim.x, n = first + k * blockDim.y;
          if (n < n_indices && word < n_words) output[n * n_words + word] = words[k][j];
        }
      }
    }
  }
}

template <class Word>
int copy_rows(const EmbeddingParams& params, int64_t n_words, Stream stream) {
  constexpr int kWarp = 32;
  const bool short_rows = n_words <= kWarp;
  int lanes = power_of_two(short_rows ? n_words : ceil_div(n_words, kCopiesInFlight));
  if (!short_rows && lanes < kWarp) lanes = kWarp;
  if (lanes > kCopyThreads) lanes = kCopyThreads;
  const int rows = kCopyThreads / lanes;
  int64_t blocks = ceil_div(params.n_indices, short_rows ? rows * kCopiesInFlight : rows);
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  const auto kernel = short_rows ? &embedding_copy_rows<Word, kCopiesInFlight> : &embedding_copy_rows<Word, 1>;
  return launch_kernel(kernel, dim3(static_cast<unsigned>(blocks)), dim3(lanes, rows), 0, stream, params, n_words);
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

// ------------------------------------------------------------------------------------------------------ launches

[[maybe_unused]] const bool forward_is_registered = (kernels().embedding_forward = &embedding_forward, true);

CHARLM_REGISTER_KERNELS(embedding, {nullptr, nullptr, nullptr, &uses_tables<T>, &tables_workspace<T>,
                                    &backward_by_tables<T>, &sorted_workspace<T>, &backward_by_sort<T>});

}  // namespace
}  // namespace charlm::cuda
