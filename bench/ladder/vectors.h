// What the rungs from cpu3 on share: 16 floats at a time, in the vector types of GCC and Clang. The compiler makes of
// one operator one instruction with AVX-512, two with AVX2, four with SSE2 or NEON.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>

constexpr int64_t kLanes = 16;
typedef float Vec __attribute__((vector_size(4 * kLanes)));
typedef int32_t Bits __attribute__((vector_size(4 * kLanes)));

// The first n numbers at p; the other lanes are -inf, which change neither a maximum nor, by more than 1e-37, a sum.
inline Vec load(const float* p, int64_t n) {
  Vec v = Vec{} - INFINITY;
  memcpy(&v, p, n * sizeof(float));
  return v;
}

inline void store(float* p, Vec v, int64_t n) { memcpy(p, &v, n * sizeof(float)); }

// Calls f(c, n) for the classes c, ..., c + n - 1: n is a constant, 16, but at the end of a row.
template <class F>
inline __attribute__((always_inline)) void for_each_vector(int64_t n_classes, F&& f) {
  int64_t c = 0;
  for (; c + kLanes <= n_classes; c += kLanes) f(c, kLanes);
  if (c < n_classes) f(c, n_classes - c);
}

inline Vec max(Vec a, Vec b) { return a > b ? a : b; }

inline float max_of_lanes(Vec v) {
  float largest = v[0];
  for (int i = 1; i < kLanes; i++) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

inline float sum_of_lanes(Vec v) {
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += v[i];
  return sum;
}

// e^x for x <= 0 is 2^n e^r, with n the integer nearest to x / log 2. Then |r| <= log(2) / 2, where seven terms of the
// Taylor series err by less than float can show. n log 2 is subtracted in two parts, of which the first is exact.
inline Vec exp(Vec x) {
  constexpr float kRound = 12582912;  // 1.5 * 2^23: a float of that size has no fraction, and n is in its last bits
  x = x < -87.0f ? Vec{} - 87.0f : x;
  const Vec shifted = x * 1.44269504f + kRound, n = shifted - kRound;
  const Vec r = (x - n * 0.693145752f) - n * 1.42860677e-6f;
  Vec p = Vec{} + 1.0f / 5040;
  for (const float inverse_factorial : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) {
    p = p * r + inverse_factorial;
  }
  return (Vec)((Bits)p + ((Bits)shifted << 23));  // adds n to the exponent
}
