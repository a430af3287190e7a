// embedding on a GPU.
#include "cuda/embedding_sorted.cuh"
#include "cuda/embedding_tables.cuh"
#include "cuda/index.cuh"
#include "ops/embedding.h"

namespace charlm::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------- forward
// The lookup: rows of the table copied as words, the widest that the rows' sizes and addresses allow; elements where
// they do not lie side by side. Moves N * D elements and N indices in, N * D elements out.

constexpr int kCopyThreads = 256;
constexpr int kCopiesInFlight = 4;  // words that a thread loads before it stores the first

// blockDim.x threads copy a row, blockDim.y * kRows rows at a time. Short rows: several at once; long ones: several
// words of one.
template <class Word, int kRows>
__global__ void __launch_bounds__(kCopyThreads, kMinBlocks)
    embedding_copy_rows(const __grid_constant__ EmbeddingParams table, int64_t n_words) {
  const Indices& indices = table.indices;
  const int64_t n_indices = table.n_indices;
  Word* const output = reinterpret_cast<Word*>(table.output);
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
      row[k] = valid ? table.weight + index[k] * table.row_stride : nullptr;
    }
    if (threadIdx.x == 0) bad.record(indices);
#pragma unroll 1
    for (int64_t w = threadIdx.x; w < n_words; w += kWords * blockDim.x) {
      Word words[kRows][kWords];
#pragma unroll
      for (int k = 0; k < kRows; k++) {
#pragma unroll
        for (int j = 0; j < kWords; j++) {
          const int64_t at = w + j * blockDim.x;
          words[k][j] = Word{};  // what a bad index gets, until its IndexError is raised
          if (row[k] && at < n_words) {
            words[k][j] = *reinterpret_cast<const Word*>(row[k] + at * table.column_stride);
          }
        }
      }
#pragma unroll
      for (int k = 0; k < kRows; k++) {
#pragma unroll
        for (int j = 0; j < kWords; j++) {
          const int64_t at = w + j * blockDim.x, n = first + k * blockDim.y;
          if (n < n_indices && at < n_words) output[n * n_words + at] = words[k][j];
        }
      }
    }
  }
}

template <class Word>
int copy_rows(const EmbeddingParams& table, int64_t n_words, Stream stream) {
  constexpr int kWarp = 32;
  const bool short_rows = n_words <= kWarp;
  int lanes = power_of_two(short_rows ? n_words : ceil_div(n_words, kCopiesInFlight));
  if (!short_rows && lanes < kWarp) lanes = kWarp;
  if (lanes > kCopyThreads) lanes = kCopyThreads;
  const int rows = kCopyThreads / lanes;
  int64_t blocks = ceil_div(table.n_indices, short_rows ? rows * kCopiesInFlight : rows);
  if (blocks > kMaxBlocks) blocks = kMaxBlocks;
  const auto kernel = short_rows ? &embedding_copy_rows<Word, kCopiesInFlight> : &embedding_copy_rows<Word, 1>;
  return launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(lanes, rows), 0, stream, table, n_words);
}

int embedding_forward(const EmbeddingParams& table, Launch& at) {
  if (table.n_indices == 0) return 0;
  EmbeddingParams words = table;
  int64_t word = table.element_size, n_words = table.embedding_dim;
  if (table.column_stride == table.element_size || table.embedding_dim <= 1) {
    const int64_t row_bytes = table.embedding_dim * table.element_size;
    // The lowest bit that is set in any of them: the largest power of two that divides them all.
    const int64_t all = row_bytes | table.row_stride | reinterpret_cast<intptr_t>(table.weight) |
                        reinterpret_cast<intptr_t>(table.output) | 16;
    word = all & -all;
    n_words = row_bytes / word;
    words.column_stride = word;
  }
  switch (word) {
    case 16:
      return copy_rows<uint4>(words, n_words, at.stream);
    case 8:
      return copy_rows<uint64_t>(words, n_words, at.stream);
    case 4:
      return copy_rows<uint32_t>(words, n_words, at.stream);
    case 2:
      return copy_rows<uint16_t>(words, n_words, at.stream);
    default:
      return copy_rows<uint8_t>(words, n_words, at.stream);
  }
}

// ------------------------------------------------------------------------------------------------------ launches

const bool forward_is_registered = (kernels().embedding_forward = &embedding_forward, true);

CHARLM_REGISTER_KERNELS(embedding, {nullptr, nullptr, nullptr, &uses_tables<T>, &tables_workspace<T>,
                                    &backward_by_tables<T>, &sorted_workspace<T>, &backward_by_sort<T>});

}  // namespace
}  // namespace charlm::cuda
