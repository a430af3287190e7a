// Embedding: rows gathered by index, and their gradients summed by index. What the adapter fills in, and the functions
// that each instruction set provides.
#pragma once

#include "../../types.h"

namespace charlm {

// A table of V rows of D elements of any type, seen as bytes.
struct EmbeddingTable {
  const char* weight = nullptr;  // [V, D]
  int64_t row_stride = 0;        // bytes from row to row
  int64_t column_stride = 0;     // bytes from element to element
  int64_t element_size = 0;
  int64_t embedding_dim = 0;   // D
  int64_t num_embeddings = 0;  // V
};

// Copies the rows of index[begin, end) to `output`, [N, D] and contiguous, and returns -1; or returns the position of
// the first index outside [0, V), and writes nothing.
template <class Index>
using EmbeddingForward = int64_t (*)(const EmbeddingTable&, const Index* index, char* output, int64_t begin,
                                     int64_t end);

// The position of the first index in [begin, end) outside [0, num_embeddings), or -1.
using FirstOutOfRange = int64_t (*)(const int64_t* index, int64_t begin, int64_t end, int64_t num_embeddings);

template <class T>
struct EmbeddingKernels {
  // table[index[n], :] += grad_output[n, :] for n in [begin, end), except where index[n] == padding_idx. Rows of the
  // table lie `table_stride` numbers apart; what it has beyond D may be written. grad_output has `n_rows` rows.
  void (*accumulate)(Compute<T>* table, int64_t table_stride, const int64_t* index, const T* grad_output,
                     int64_t embedding_dim, int64_t padding_idx, int64_t begin, int64_t end, int64_t n_rows);
  // out[:] = T(scale * sum_k grad_output[positions[k], :]), k in [0, n), n > 0: `sum` is room for D numbers.
  void (*sum_rows)(T* out, Compute<T>* sum, const T* grad_output, const int64_t* positions, int64_t n,
                   int64_t embedding_dim, Compute<T> scale);
  // out[v, :] = T(sum_k tables[k, v, :D]) for v in [begin, end); tables lie `table_size` numbers apart.
  void (*sum_tables)(T* out, const Compute<T>* tables, int64_t n_tables, int64_t table_size, int64_t table_stride,
                     int64_t embedding_dim, int64_t begin, int64_t end);
};

}  // namespace charlm
