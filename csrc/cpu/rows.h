// Loops over rows of classes. Long rows are processed in chunks that stay in a first-level cache for a second pass.
// Sums are taken over each chunk and then over the chunks, since the rounding error of a sum grows with its length.
#pragma once

#include "cpu/functions.h"

namespace charlm::CHARLM_ISA {

// Calls f(begin, size) for each chunk of n elements of C.
template <class C, class F>
CHARLM_INLINE void for_each_chunk(int64_t n, F&& f) {
  constexpr int64_t kChunkElements = 8192 / sizeof(C);
  for (int64_t begin = 0; begin < n; begin += kChunkElements)
    f(begin, n - begin < kChunkElements ? n - begin : kChunkElements);
}

// Prefetch distance in elements. The hardware prefetcher stops at each page.
template <class T>
constexpr int64_t kPrefetchDistance = 4096 / sizeof(T);

// The largest of x[0 .. n), or -inf if n is 0. NaN may be ignored.
template <class T, class C = Compute<T>>
CHARLM_INLINE C max_of(const T* x, int64_t n) {
  Vec<C> largest[4];
  for (Vec<C>& v : largest) v = broadcast<C>(-INFINITY);
  for_each_vector_group<C, 4>(n, [&]<int K>(int64_t c, auto width, Count<K>) {
    prefetch<K * kLanes<C> * sizeof(T)>(x + c + kPrefetchDistance<T>);
    for (int k = 0; k < K; k++) largest[k] = max<C>(largest[k], load(x + c + k * kLanes<C>, width, C(-INFINITY)));
  });
  return reduce_max<C>(max<C>(max<C>(largest[0], largest[1]), max<C>(largest[2], largest[3])));
}

// The largest value and the first index at which it occurs.
template <class T>
struct Largest {
  Compute<T> value = -INFINITY;
  int64_t index = 0;
};

template <class T, class C = Compute<T>>
CHARLM_INLINE Largest<T> largest_of(const T* x, int64_t n) {
  Largest<T> largest;
  for_each_chunk<C>(n, [&](int64_t begin, int64_t size) {
    const C of_chunk = max_of(x + begin, size);
    if (of_chunk > largest.value) largest = {of_chunk, begin};
  });
  if (largest.value == -INFINITY) return largest;
  int64_t& c = largest.index;  // the beginning of its chunk, which is in cache
  while (c + kLanes<C> <= n && !any<C>(load(x + c, Whole{}) == largest.value)) c += kLanes<C>;
  while (load_one(x + c) != largest.value) c++;
  return largest;
}

template <class C>
CHARLM_INLINE C exp_of(C x) {
  return exp(broadcast<C>(x))[0];
}

// -kHuge replaces -inf where it is multiplied by a probability of 0, so that the product is 0 and not NaN. The
// logarithm of no positive number is as small.
template <class C>
constexpr C kHuge = sizeof(C) == sizeof(float) ? C(0x1p126f) : C(0x1p1022);

// ---------------------------------------------------------------------------------------------------- transposed
// Transposed layout for rows with few classes: vector c holds class c of kLanes rows. Maxima and sums need no operation
// across lanes, and no lane is idle. Row by row, the reference in the tests, 27 classes take one full vector and part
// of another, and each row waits for its maximum before its first exponential.

constexpr int64_t kMaxTransposedClasses = 128;  // both rows of a divergence, at most 16 KiB, fit in L1

// Four numbers of kBytes bytes, as bits.
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

// to[j, i] = from[i, j] for i, j < 4, with four loads and four stores instead of sixteen each.
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
  if (n_rows % 4 == 0) return;  // known to the compiler, which would warn of the loop below
  for (; i < n_rows; i++) {
    for (int64_t j = 0; j < n_columns; j++) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

// kLanes rows with few classes in transposed layout.
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
  alignas(64) T x_[kMaxTransposedClasses * kRows];
};

// Calls f(c, Count<K>) for K classes c, …, c + K - 1 at a time, and f(c, Count<1>) for each remaining class. Two
// exponentials at once hide each other's latency.
template <int K, class F>
CHARLM_INLINE void for_each_classes(int64_t n_classes, F&& f) {
  int64_t c = 0;
  for (; c + K <= n_classes; c += K) f(c, Count<K>{});
  for (; c < n_classes; c++) f(c, Count<1>{});
}

// If there are few classes, calls by_columns(n) for each group of rows n, …, n + kLanes - 1 in [begin, end). Calls
// by_row(n) for all other rows.
template <class C, class ByColumns, class ByRow>
CHARLM_INLINE void for_rows(int64_t begin, int64_t end, int64_t n_classes, ByColumns&& by_columns, ByRow&& by_row) {
  int64_t n = begin;
  for (; n_classes <= kMaxTransposedClasses && n + kLanes<C> <= end; n += kLanes<C>) by_columns(n);
  for (; n < end; n++) by_row(n);
}

}  // namespace charlm::CHARLM_ISA
