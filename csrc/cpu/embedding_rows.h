// embedding on the CPU: rows gathered by index, and the sums of its gradient.
#pragma once

#include "cpu/vec.h"
#include "ops/embedding.h"

namespace charlm::CHARLM_ISA {

// Whether every index in [begin, end) is in [0, n). Written without a branch per index, so that the compiler vectorizes
// it.
template <class Index>
bool all_in_range(const Index* index, int64_t begin, int64_t end, int64_t n) {
  if constexpr (sizeof(Index) < sizeof(int64_t)) {
    Index smallest = 0, largest = 0;
    for (int64_t i = begin; i < end; i++) {
      smallest = index[i] < smallest ? index[i] : smallest;
      largest = index[i] > largest ? index[i] : largest;
    }
    return smallest >= 0 && static_cast<int64_t>(largest) < n;
  } else {  // i is in range if neither i nor n - 1 - i has its sign bit set; 2^63 and more is negative as int64_t
    uint64_t signs = 0;
    for (int64_t i = begin; i < end; i++) {
      const auto value = static_cast<uint64_t>(index[i]);
      signs |= value | (static_cast<uint64_t>(n) - 1 - value);
    }
    return signs >> 63 == 0;
  }
}

// The position of the first index in [begin, end) outside [0, n), or -1.
template <class Index>
int64_t first_out_of_range(const Index* index, int64_t begin, int64_t end, int64_t n) {
  if (begin == end || (n > 0 && all_in_range(index, begin, end, n))) return -1;
  int64_t i = begin;
  while (static_cast<uint64_t>(index[i]) < static_cast<uint64_t>(n)) i++;
  return i;
}

// Copies a row of n bytes as kWords words, the last of which may overlap the previous one. For a short row, a call of
// memcpy or a loop of variable length would take longer than the copy.
template <class Word, int kWords>
struct ShortRow {
  static CHARLM_INLINE void copy(char* out, const char* in, int64_t n) {
    constexpr int64_t kSize = sizeof(Word);
#pragma GCC unroll 8
    for (int w = 0; w < kWords - 1; w++) memcpy(out + w * kSize, in + w * kSize, kSize);
    memcpy(out + n - kSize, in + n - kSize, kSize);
  }
};

struct LongRow {
  static CHARLM_INLINE void copy(char* out, const char* in, int64_t n) { memcpy(out, in, n); }
};

// Calls f.template operator()<Row>() for rows of n bytes that take from kWords to kMaxWords words; returns false if
// they take more.
template <class Word, int kMaxWords, int kWords = 1, class F>
bool with_words(int64_t n, F f) {
  if constexpr (kWords > kMaxWords) {
    return false;
  } else {
    if (n > kWords * static_cast<int64_t>(sizeof(Word))) return with_words<Word, kMaxWords, kWords + 1>(n, f);
    f.template operator()<ShortRow<Word, kWords>>();
    return true;
  }
}

template <class F>
void with_row_copy(int64_t n, F f) {
  typedef char Bytes16 __attribute__((vector_size(16)));
  const bool is_short = n >= kVectorBytes ? with_words<Vec<float>, 8>(n, f)
                        : n >= 16         ? with_words<Bytes16, 4>(n, f)
                        : n >= 8          ? with_words<uint64_t, 2>(n, f)
                        : n >= 4          ? with_words<uint32_t, 2>(n, f)
                        : n >= 2          ? with_words<uint16_t, 2>(n, f)
                                          : false;
  if (!is_short) f.template operator()<LongRow>();
}

// A long row of a large table is not in cache: it is prefetched while the two rows before it are copied.
constexpr int64_t kLongRowBytes = 512, kLargeTableBytes = 1 << 20;

CHARLM_INLINE void prefetch_row(const char* row, int64_t n) {
  for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(row + i);
}

// Copies the rows of index[begin, end) and returns -1, or returns the position of the first index out of range.
template <class Index>
int64_t gather_rows(const EmbeddingParams& params, const Index* index, int64_t begin, int64_t end) {
  const int64_t bad = first_out_of_range(index, begin, end, params.num_embeddings);
  if (bad >= 0) return bad;
  const int64_t row_bytes = params.embedding_dim * params.element_size, stride = params.row_stride;
  const char* const weight = params.weight;
  char* const output = params.output;
  if (params.column_stride == params.element_size) {
    const bool from_memory = row_bytes > kLongRowBytes && params.num_embeddings * stride > kLargeTableBytes;
    // Captured by value, since stores of bytes may alias anything with an address.
    with_row_copy(row_bytes, [=]<class Row>() {
      for (int64_t n = begin; n < end; n++) {
        if (from_memory && n + 2 < end) prefetch_row(weight + static_cast<int64_t>(index[n + 2]) * stride, row_bytes);
        Row::copy(output + n * row_bytes, weight + static_cast<int64_t>(index[n]) * stride, row_bytes);
      }
    });
    return -1;
  }
  for (int64_t n = begin; n < end; n++) {
    const char* row = weight + static_cast<int64_t>(index[n]) * stride;
    char* out = output + n * row_bytes;
    for (int64_t d = 0; d < params.embedding_dim; d++) {
      memcpy(out + d * params.element_size, row + d * params.column_stride, params.element_size);
    }
  }
  return -1;
}

inline int embedding_forward(const EmbeddingParams& params, Launch& launch) {
  const auto gather = [&]<class Index>(Index) {
    return gather_rows(params, static_cast<const Index*>(params.indices.data), launch.begin, launch.end);
  };
  switch (params.indices.against.type) {
    case IndexType::kInt8:
      launch.first_bad = gather(int8_t{});
      break;
    case IndexType::kInt16:
      launch.first_bad = gather(int16_t{});
      break;
    case IndexType::kInt32:
      launch.first_bad = gather(int32_t{});
      break;
    case IndexType::kInt64:
      launch.first_bad = gather(int64_t{});
      break;
    case IndexType::kUInt8:
      launch.first_bad = gather(uint8_t{});
      break;
    case IndexType::kUInt16:
      launch.first_bad = gather(uint16_t{});
      break;
    case IndexType::kUInt32:
      launch.first_bad = gather(uint32_t{});
      break;
    case IndexType::kUInt64:
      launch.first_bad = gather(uint64_t{});
      break;
  }
  return 0;
}

// Adds kVectors whole vectors for each row. The rows of the table are padded. The vectors of a row of grad_output may
// reach into the next row, but not past the end of grad_output.
template <class T, int kVectors>
void accumulate_padded(Compute<T>* table, int64_t table_stride, const int64_t* index, const T* grad_output,
                       int64_t embedding_dim, int64_t padding_idx, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t n = begin; n < end; n++) {
    if (index[n] == padding_idx) continue;
    C* row = table + index[n] * table_stride;
    const T* grad = grad_output + n * embedding_dim;
#pragma GCC unroll 8
    for (int i = 0; i < kVectors; i++) {
      const int64_t d = i * kLanes<C>;
      store(row + d, Vec<C>(load(row + d, Whole{}) + load(grad + d, Whole{})), Whole{});
    }
  }
}

// Prefetch distance in the gradient, which is read in order. The hardware prefetcher stops at each page.
constexpr int kGradientPrefetchBytes = 1024;

template <class T>
void embedding_accumulate(Compute<T>* table, int64_t table_stride, const int64_t* index, const T* grad_output,
                          int64_t embedding_dim, int64_t padding_idx, int64_t begin, int64_t end, int64_t n_rows) {
  using C = Compute<T>;
  const int64_t vectors = (embedding_dim + kLanes<C> - 1) / kLanes<C>, padded = vectors * kLanes<C>;
  if (vectors >= 1 && vectors <= 4 && padded <= table_stride) {
    // Ends at the first row whose last vector would end outside the gradient.
    const int64_t last_start = n_rows * embedding_dim - padded;
    int64_t padded_end = last_start < 0 ? 0 : last_start / embedding_dim + 1;
    padded_end = padded_end < begin ? begin : padded_end > end ? end : padded_end;
    const auto run = [&]<int kVectors>(Count<kVectors>) {
      accumulate_padded<T, kVectors>(table, table_stride, index, grad_output, embedding_dim, padding_idx, begin,
                                     padded_end);
    };
    if (vectors == 1) run(Count<1>{});
    if (vectors == 2) run(Count<2>{});
    if (vectors == 3) run(Count<3>{});
    if (vectors == 4) run(Count<4>{});
    begin = padded_end;
  }
  for (int64_t n = begin; n < end; n++) {
    if (index[n] == padding_idx) continue;
    C* row = table + index[n] * table_stride;
    const T* grad = grad_output + n * embedding_dim;
    for_each_vector_group<C, 2>(embedding_dim, [&]<int K>(int64_t d, auto width, Count<K>) {
      prefetch<K * kLanes<C> * sizeof(T)>(grad + d + kGradientPrefetchBytes / sizeof(T));
      for (int k = 0; k < K; k++, d += kLanes<C>) {
        store(row + d, Vec<C>(load(row + d, width, C(0)) + load(grad + d, width, C(0))), width);
      }
    });
  }
}

template <class T>
void embedding_sum_rows(T* out, Compute<T>* sum, const T* grad_output, const int64_t* positions, int64_t n,
                        int64_t embedding_dim, Compute<T> scale) {
  using C = Compute<T>;
  // The last row is added when the sum is written; a word that occurs once has no other.
  const T* last = grad_output + positions[n - 1] * embedding_dim;
  memset(sum, 0, n > 1 ? embedding_dim * sizeof(C) : 0);
  for (int64_t k = 0; k < n - 1; k++) {
    const T* grad = grad_output + positions[k] * embedding_dim;
    for_each_vector<C>(embedding_dim, [&](int64_t d, auto width) {
      store(sum + d, Vec<C>(load(sum + d, width, C(0)) + load(grad + d, width, C(0))), width);
    });
  }
  for_each_vector<C>(embedding_dim, [&](int64_t d, auto width) {
    Vec<C> total = load(last + d, width, C(0));
    if (n > 1) total += load(sum + d, width, C(0));
    store(out + d, Vec<C>(scale * total), width);
  });
}

template <class T>
void embedding_sum_tables(T* out, const Compute<T>* tables, int64_t n_tables, int64_t table_size, int64_t table_stride,
                          int64_t embedding_dim, int64_t begin, int64_t end) {
  using C = Compute<T>;
  for (int64_t v = begin; v < end; v++) {
    for_each_vector<C>(embedding_dim, [&](int64_t d, auto width) {
      Vec<C> sum{};
      for (int64_t k = 0; k < n_tables; k++) sum += load(tables + k * table_size + v * table_stride + d, width, C(0));
      store(out + v * embedding_dim + d, sum, width);
    });
  }
}

}  // namespace charlm::CHARLM_ISA
