// Rows of few classes turned around: as many rows as a vector has lanes, vector c holding class c of each. Maxima and
// sums then go from vector to vector and not across lanes, and every lane holds a row. Row by row (entropy_rows.h,
// kl_div_rows.h, which this is tested against) 27 classes are one vector and a part of another, and each row waits for
// its maximum before its first exponential.
#pragma once

#include "functions.h"

namespace charlm::CHARLM_ISA {

constexpr int64_t kFewClasses = 128;  // both sides of a divergence, 16 KiB at most, stay in a first-level cache

// Four numbers of so many bytes, as bits.
template <int kBytes>
struct FourOf;
template <>
struct FourOf<2> {
  typedef uint16_t type __attribute__((vector_size(8)));
};
template <>
struct FourOf<4> {
  typedef uint32_t type __attribute__((vector_size(16)));
};
template <>
struct FourOf<8> {
  typedef uint64_t type __attribute__((vector_size(32)));
};

#if defined(__clang__)
#define CHARLM_FOUR(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define CHARLM_FOUR(a, b, ...) __builtin_shuffle(a, b, Four{__VA_ARGS__})
#endif

// to[j, i] = from[i, j] for i, j < 4: four loads and four stores in place of sixteen.
template <class T>
CHARLM_INLINE void transpose_four(const T* from, int64_t from_stride, T* to, int64_t to_stride) {
  using Four = typename FourOf<sizeof(T)>::type;
  Four rows[4];
  for (int i = 0; i < 4; i++) memcpy(&rows[i], from + i * from_stride, sizeof(Four));
  const Four low = CHARLM_FOUR(rows[0], rows[1], 0, 4, 1, 5), low_2 = CHARLM_FOUR(rows[2], rows[3], 0, 4, 1, 5);
  const Four high = CHARLM_FOUR(rows[0], rows[1], 2, 6, 3, 7), high_2 = CHARLM_FOUR(rows[2], rows[3], 2, 6, 3, 7);
  const Four columns[4] = {CHARLM_FOUR(low, low_2, 0, 1, 4, 5), CHARLM_FOUR(low, low_2, 2, 3, 6, 7),
                           CHARLM_FOUR(high, high_2, 0, 1, 4, 5), CHARLM_FOUR(high, high_2, 2, 3, 6, 7)};
  for (int j = 0; j < 4; j++) memcpy(to + j * to_stride, &columns[j], sizeof(Four));
}

#undef CHARLM_FOUR

// to[j, i] = from[i, j] for i < n_rows, j < n_columns.
template <class T>
CHARLM_INLINE void transpose(const T* from, int64_t from_stride, int64_t n_rows, int64_t n_columns, T* to,
                             int64_t to_stride) {
  int64_t i = 0;
  for (; i + 4 <= n_rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= n_columns; j += 4) {
      transpose_four(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
    }
    for (; j < n_columns; j++) {
      for (int64_t k = i; k < i + 4; k++) to[j * to_stride + k] = from[k * from_stride + j];
    }
  }
  for (; i < n_rows; i++) {
    for (int64_t j = 0; j < n_columns; j++) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

template <class T>
class Columns {
  using C = Compute<T>;
  using V = Vec<C>;

 public:
  static constexpr int64_t kRows = kLanes<C>;

  explicit Columns(int64_t n_classes) : n_classes_(n_classes) {}

  void read(const T* rows, int64_t stride) { transpose(rows, stride, kRows, n_classes_, x_, kRows); }
  void write(T* rows, int64_t stride) const { transpose(x_, kRows, n_classes_, kRows, rows, stride); }

  // Class c is the vector at c * kRows.
  const T* data() const { return x_; }

  V operator[](int64_t c) const { return load(x_ + c * kRows, Whole{}); }
  void set(int64_t c, V v) { store(x_ + c * kRows, v, Whole{}); }

  V max() const {
    V largest = broadcast<C>(-INFINITY);
    for (int64_t c = 0; c < n_classes_; c++) largest = CHARLM_ISA::max<C>(largest, (*this)[c]);
    return largest;
  }

 private:
  const int64_t n_classes_;
  alignas(64) T x_[kFewClasses * kRows];
};

// Calls f(c, Count<K>) for classes c, …, c + K - 1, K of them at once and one at a time for the rest: two exponentials
// at once fill each other's latencies.
template <int K, class F>
CHARLM_INLINE void for_each_classes(int64_t n_classes, F&& f) {
  int64_t c = 0;
  for (; c + K <= n_classes; c += K) f(c, Count<K>{});
  for (; c < n_classes; c++) f(c, Count<1>{});
}

// Calls by_columns(n) for as many rows n, …, n + kLanes - 1 of [begin, end) as fill vectors, if classes are few, and
// by_row(n) for the others.
template <class C, class ByColumns, class ByRow>
CHARLM_INLINE void for_rows(int64_t begin, int64_t end, int64_t n_classes, ByColumns&& by_columns, ByRow&& by_row) {
  int64_t n = begin;
  for (; n_classes <= kFewClasses && n + kLanes<C> <= end; n += kLanes<C>) by_columns(n);
  for (; n < end; n++) by_row(n);
}

}  // namespace charlm::CHARLM_ISA
