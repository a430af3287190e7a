// Embedding: out[n, :] = weight[index[n], :], and the sums that its gradient is made of. What the adapter fills in, and
// the functions that launch the kernels; each returns CUDA's error code, 0 for success.
#pragma once

#include "index_error.h"
#include "stream.h"

namespace charlm::cuda {

// A table as bytes: rows are copied, whatever their dtype.
struct EmbeddingTable {
  const void* weight = nullptr;  // [V, D]
  int64_t row_stride = 0;        // bytes from a row to the next
  int64_t column_stride = 0;     // bytes from an element to the next
  int64_t element_size = 0;      // bytes: 1, 2, 4, 8 or 16
  int64_t embedding_dim = 0;     // D
};

// Rows of `output` [N, D], contiguous; the row of an index out of range is not written.
int embedding_forward(const EmbeddingTable& table, const Indices& indices, int64_t n_indices, void* output,
                      Stream stream);

// One call's gradient: grad[v, :] = sum over n with index[n] = v of grad_output[n, :], for N, V and D of at least 1.
// The order of the sums is fixed by the sizes and the indices; they are made in Compute<T> and rounded once.
template <class T>
struct EmbeddingGradient {
  Indices indices;                 // [N]
  int64_t n_indices = 0;           // N
  const T* grad_output = nullptr;  // [N, D], contiguous
  int64_t num_embeddings = 0;      // V
  int64_t embedding_dim = 0;       // D
  int64_t padding_idx = -1;        // the row whose gradient is zero; -1: none
  T* grad = nullptr;               // [V, D], contiguous, from a multiple of 16 bytes on
};

// For a small table (embedding_tables.cuh). Whether V is small enough; how many numbers of workspace it needs, which
// begins at a multiple of 16 bytes.
template <class T>
bool embedding_backward_uses_tables(int64_t num_embeddings);
template <class T>
int64_t embedding_backward_tables_size(int64_t n_indices, int64_t num_embeddings, int64_t embedding_dim);
template <class T>
int embedding_backward_tables(const EmbeddingGradient<T>& gradient, Compute<T>* workspace, Stream stream);

// For a table of any size (embedding_sorted.cuh): `gradient.indices` are sorted, `positions` [N] says where each of
// them stood, and `grad` is all zero.
template <class T>
int64_t embedding_backward_sorted_size(int64_t n_indices, int64_t embedding_dim);
template <class T>
int embedding_backward_sorted(const EmbeddingGradient<T>& gradient, const int64_t* positions, bool scale_grad_by_freq,
                              Compute<T>* workspace, Stream stream);

}  // namespace charlm::cuda
