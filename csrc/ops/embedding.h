// embedding: parameters of its kernels, for every device. out[n, :] = weight[index[n], :]; a row of the weight's
// gradient is the sum of the rows of grad_output with its index.
#pragma once

#include "core/kernel.h"

namespace charlm {

// Rows are copied as bytes, whatever their dtype. On the CPU the row of an index out of range is not written, on a GPU
// it is 0.
struct EmbeddingParams {
  const char* weight = nullptr;  // [V, D]
  int64_t row_stride = 0;        // bytes from a row to the next
  int64_t column_stride = 0;     // bytes from an element to the next
  int64_t element_size = 0;      // bytes: 1, 2, 4, 8 or 16
  int64_t embedding_dim = 0;     // D
  int64_t num_embeddings = 0;    // V
  Indices indices;               // [N]
  int64_t n_indices = 0;         // N
  char* output = nullptr;        // [N, D], contiguous
};

// On the CPU `Launch::first_bad` reports the first index out of range, and nothing is written if there is one.
using EmbeddingForward = Kernel<EmbeddingParams>;

// GPU: grad[v, :] = sum of grad_output[n, :] over n with index[n] = v, for N, V and D of at least 1. The order of the
// sums depends on the sizes and the indices only. Sums are in Compute<T>, and rounded once. The workspace begins at a
// multiple of 16 bytes.
template <class T>
struct EmbeddingGradientParams {
  Indices indices;                 // [N]
  int64_t n_indices = 0;           // N
  const T* grad_output = nullptr;  // [N, D], contiguous
  int64_t num_embeddings = 0;      // V
  int64_t embedding_dim = 0;       // D
  int64_t padding_idx = -1;        // the row whose gradient is zero; -1: none
  bool scale_grad_by_freq = false;
  T* grad = nullptr;  // [V, D], contiguous, from a multiple of 16 bytes on
};

template <class T>
struct EmbeddingKernels {
  using C = Compute<T>;

  // CPU. table[index[n], :] += grad_output[n, :] for n in [begin, end), except where index[n] == padding_idx. Rows of
  // the table lie `table_stride` numbers apart; the numbers beyond D may be written. grad_output has `n_rows` rows.
  void (*accumulate)(C* table, int64_t table_stride, const int64_t* index, const T* grad_output, int64_t embedding_dim,
                     int64_t padding_idx, int64_t begin, int64_t end, int64_t n_rows);
  // CPU. out[:] = T(scale * sum_k grad_output[positions[k], :]), k in [0, n), n > 0; `sum` is scratch for D numbers.
  void (*sum_rows)(T* out, C* sum, const T* grad_output, const int64_t* positions, int64_t n, int64_t embedding_dim,
                   C scale);
  // CPU. out[v, :] = T(sum_k tables[k, v, :D]) for v in [begin, end); tables lie `table_size` numbers apart.
  void (*sum_tables)(T* out, const C* tables, int64_t n_tables, int64_t table_size, int64_t table_stride,
                     int64_t embedding_dim, int64_t begin, int64_t end);

  // GPU: bytes of workspace for a gradient with these parameters, and the gradient.
  int64_t (*gradient_workspace)(const EmbeddingGradientParams<T>&);
  Kernel<EmbeddingGradientParams<T>> backward;
};

// CPU: the position of the first index in [begin, end) outside [0, num_embeddings), or -1.
using FirstOutOfRange = int64_t (*)(const int64_t* index, int64_t begin, int64_t end, int64_t num_embeddings);

}  // namespace charlm
