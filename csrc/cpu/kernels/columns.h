// Rows of few classes turned around: as many rows as a vector has lanes, vector c holding class c of each. Maxima and
// sums then go from vector to vector and not across lanes, and every lane holds a row. Row by row (entropy_rows.h,
// kl_div_rows.h, which this is tested against) 27 classes are one vector and a part of another, and each row waits for
// its maximum before its first exponential.
#pragma once

#include "functions.h"

namespace charlm::CHARLM_ISA {

constexpr int64_t kFewClasses = 128;  // both sides of a divergence, 16 KiB at most, stay in a first-level cache

template <class T>
class Columns {
  using C = Compute<T>;
  using V = Vec<C>;

 public:
  static constexpr int64_t kRows = kLanes<C>;

  explicit Columns(int64_t n_classes) : n_classes_(n_classes) {}

  void read(const T* rows, int64_t stride) {
    for (int64_t r = 0; r < kRows; r++, rows += stride) {
      for (int64_t c = 0; c < n_classes_; c++) x_[c * kRows + r] = rows[c];
    }
  }

  void write(T* rows, int64_t stride) const {
    for (int64_t r = 0; r < kRows; r++, rows += stride) {
      for (int64_t c = 0; c < n_classes_; c++) rows[c] = x_[c * kRows + r];
    }
  }

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
