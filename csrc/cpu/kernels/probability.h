// Logarithms of probabilities and back, at the ends of their range too.
#pragma once

#include "functions.h"

namespace charlm::CHARLM_ISA {

// log(x) of any x >= 0: subnormal numbers are scaled to normal ones. NaN below 0.
template <class C>
CHARLM_INLINE Vec<C> log_of_probability(Vec<C> x) {
  constexpr bool kFloat = sizeof(C) == sizeof(float);
  constexpr C kSmallestNormal = kFloat ? C(0x1p-126f) : C(0x1p-1022), kScale = kFloat ? C(0x1p24f) : C(0x1p54);
  constexpr C kLogScale = kFloat ? C(16.635532333438686) : C(37.429947750237048);
  const Mask<C> small = x < kSmallestNormal;
  const Vec<C> y = log<C>(select<C>(small, x * kScale, x)) - select<C>(small, broadcast<C>(kLogScale), Vec<C>{});
  return select<C>(x > 0, y, select<C>(x == 0, broadcast<C>(-INFINITY), broadcast<C>(NAN)));
}

// exp(x) of log-probabilities. x > 0 is none; above 88 (709) the result is infinity, slightly before torch's exp
// overflows.
template <class C, int K>
CHARLM_INLINE void exp_of_log_probabilities(Vec<C> (&x)[K]) {
  constexpr C kLargestExponent = sizeof(C) == sizeof(float) ? C(88) : C(709);
  Mask<C> too_large[K];
  for (int k = 0; k < K; k++) too_large[k] = x[k] > kLargestExponent;
  exp<C, K>(x);
  for (int k = 0; k < K; k++) x[k] = select<C>(too_large[k], broadcast<C>(INFINITY), x[k]);
}

}  // namespace charlm::CHARLM_ISA
