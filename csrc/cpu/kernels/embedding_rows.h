// Embedding: out[n, :] = weight[index[n], :], and the sums that its gradient is made of.
#pragma once

#include "embedding.h"
#include "vec.h"

namespace charlm::CHARLM_ISA {

// The position of the first index in [begin, end) outside [0, n), or -1. Written without a branch per index, so that
// it becomes vector code; an index of 2^63 or more is negative as int64_t and so outside as well.
template <class Index>
int64_t first_out_of_range(const Index* index, int64_t begin, int64_t end, int64_t n) {
  bool bad = false;
  for (int64_t i = begin; i < end; i++) bad |= static_cast<uint64_t>(index[i]) >= static_cast<uint64_t>(n);
  if (!bad) return -1;
  int64_t i = begin;
  while (static_cast<uint64_t>(index[i]) < static_cast<uint64_t>(n)) i++;
  return i;
}

// memcpy for the short rows of a small embedding, where the call would cost more than the copy: whole words, and a last
// one that overlaps.
template <class Word>
CHARLM_INLINE void copy_words(char* out, const char* in, int64_t n) {
  for (int64_t i = 0; i < n - static_cast<int64_t>(sizeof(Word)); i += sizeof(Word))
    memcpy(out + i, in + i, sizeof(Word));
  memcpy(out + n - sizeof(Word), in + n - sizeof(Word), sizeof(Word));
}

CHARLM_INLINE void copy_row(char* out, const char* in, int64_t n) {
  if (n > 512) {
    memcpy(out, in, n);
  } else if (n >= kVectorBytes) {
    copy_words<Vec<float>>(out, in, n);
  } else if (n >= 8) {
    copy_words<uint64_t>(out, in, n);
  } else {
    for (int64_t i = 0; i < n; i++) out[i] = in[i];
  }
}

template <class Index>
int64_t embedding_forward(const EmbeddingTable& table, const Index* index, char* output, int64_t begin, int64_t end) {
  constexpr int64_t kChunk = 1024;  // indices that stay in cache between the check and the gather
  const int64_t row_bytes = table.embedding_dim * table.element_size;
  const bool contiguous = table.column_stride == table.element_size;
  for (int64_t chunk = begin; chunk < end; chunk += kChunk) {
    const int64_t chunk_end = chunk + kChunk < end ? chunk + kChunk : end;
    const int64_t bad = first_out_of_range(index, chunk, chunk_end, table.num_embeddings);
    if (bad >= 0) return bad;
    for (int64_t n = chunk; n < chunk_end; n++) {
      const char* row = table.weight + static_cast<int64_t>(index[n]) * table.row_stride;
      char* out = output + n * row_bytes;
      if (contiguous) {
        copy_row(out, row, row_bytes);
      } else {
        for (int64_t d = 0; d < table.embedding_dim; d++) {
          memcpy(out + d * table.element_size, row + d * table.column_stride, table.element_size);
        }
      }
    }
  }
  return -1;
}

template <class T>
void embedding_accumulate(Compute<T>* table, const int64_t* index, const T* grad_output, int64_t embedding_dim,
                          int64_t padding_idx, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t n = begin; n < end; n++) {
    if (index[n] == padding_idx) continue;
    C* row = table + index[n] * embedding_dim;
    const T* grad = grad_output + n * embedding_dim;
    for_each_vector<C>(embedding_dim, [&](int64_t d, auto width) {
      store(row + d, Vec<C>(load(row + d, width, C(0)) + load(grad + d, width, C(0))), width);
    });
  }
}

template <class T>
void embedding_sum_rows(T* out, Compute<T>* sum, const T* grad_output, const int64_t* positions, int64_t n,
                        int64_t embedding_dim, Compute<T> scale) {
  using C = Compute<T>;
  memset(sum, 0, embedding_dim * sizeof(C));
  for (int64_t k = 0; k < n; k++) {
    const T* grad = grad_output + positions[k] * embedding_dim;
    for_each_vector<C>(embedding_dim, [&](int64_t d, auto width) {
      store(sum + d, Vec<C>(load(sum + d, width, C(0)) + load(grad + d, width, C(0))), width);
    });
  }
  for_each_vector<C>(embedding_dim,
                     [&](int64_t d, auto width) { store(out + d, Vec<C>(scale * load(sum + d, width, C(0))), width); });
}

template <class T>
void embedding_sum_tables(T* out, const Compute<T>* tables, int64_t n_tables, int64_t table_stride, int64_t begin,
                          int64_t end) {
  using C = Compute<T>;
  for_each_vector<C>(end - begin, [&](int64_t e, auto width) {
    Vec<C> sum{};
    for (int64_t k = 0; k < n_tables; k++) sum += load(tables + k * table_stride + begin + e, width, C(0));
    store(out + begin + e, sum, width);
  });
}

}  // namespace charlm::CHARLM_ISA
