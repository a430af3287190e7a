// A long row in chunks that stay in a first-level cache while they are walked over twice. A chunk's sums are added up
// as one number: the rounding of a sum grows with the length of its chain.
#pragma once

#include "functions.h"

namespace charlm::CHARLM_ISA {

// Calls f(begin, size) for each chunk of n elements of C.
template <class C, class F>
CHARLM_INLINE void for_each_chunk(int64_t n, F&& f) {
  constexpr int64_t kChunk = 8192 / sizeof(C);
  for (int64_t begin = 0; begin < n; begin += kChunk) f(begin, n - begin < kChunk ? n - begin : kChunk);
}

// Elements ahead at which a walk over rows asks for memory: the processor's own prefetch stops at each page.
template <class T>
constexpr int64_t kAhead = 4096 / sizeof(T);

// The largest of x[0 .. n); -inf of nothing. A NaN may be dropped.
template <class T, class C = Compute<T>>
CHARLM_INLINE C max_of(const T* x, int64_t n) {
  Vec<C> largest[4];
  for (Vec<C>& v : largest) v = broadcast<C>(-INFINITY);
  for_each_vectors<C, 4>(n, [&]<int K>(int64_t c, auto width, Count<K>) {
    prefetch<K * kLanes<C> * sizeof(T)>(x + c + kAhead<T>);
    for (int k = 0; k < K; k++) largest[k] = max<C>(largest[k], load(x + c + k * kLanes<C>, width, C(-INFINITY)));
  });
  return reduce_max<C>(max<C>(max<C>(largest[0], largest[1]), max<C>(largest[2], largest[3])));
}

// The largest value, and the first place where it is.
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
  int64_t& c = largest.index;  // in its chunk, which is in cache
  while (c + kLanes<C> <= n && !any<C>(load(x + c, Whole{}) == largest.value)) c += kLanes<C>;
  while (load_one(x + c) != largest.value) c++;
  return largest;
}

template <class C>
CHARLM_INLINE C exp_of(C x) {
  return exp(broadcast<C>(x))[0];
}

// What -inf becomes where it is multiplied by a probability of 0: the product is 0. No logarithm of a number reaches
// it.
template <class C>
constexpr C kFar = sizeof(C) == sizeof(float) ? C(0x1p126f) : C(0x1p1022);

}  // namespace charlm::CHARLM_ISA
