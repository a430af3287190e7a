// The activations of a linear layer, of vectors of numbers, and their derivatives.
#pragma once

#include "../../activation.h"
#include "functions.h"

namespace charlm::CHARLM_ISA {

// erf(x): an odd rational function, minimax on [-3.95, 3.95] with relative error 2.1e-8; beyond, it is 1 in float.
CHARLM_INLINE Vec<float> erf(Vec<float> x) {
  constexpr float kBound = 3.95f;
  x = x > kBound ? broadcast<float>(kBound) : x < -kBound ? broadcast<float>(-kBound) : x;
  const Vec<float> z = x * x;
  Vec<float> p = z * 2.0259202982e-6f + 2.84628550879e-4f;
  p = p * z + 3.80645201352e-3f;
  p = p * z + 5.28701051655e-2f;
  p = p * z + 1.91513357421e-1f;
  p = p * z + 1.12837914435f;
  Vec<float> q = z * 3.7828833884e-5f + 1.17027253924e-3f;
  q = q * z + 1.50516834901e-2f;
  q = q * z + 1.14543937044e-1f;
  q = q * z + 5.03056979773e-1f;
  q = q * z + 1;
  const Vec<float> result = p * x / q;
  return result > 1 ? broadcast<float>(1) : result < -1 ? broadcast<float>(-1) : result;
}

// In double, which is for checking others, the C library's, one number after the other.
CHARLM_INLINE Vec<double> erf(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; i++) x[i] = ::erf(x[i]);
  return x;
}

constexpr double kSqrtHalf = 0.70710678118654752440, kInverseSqrtTwoPi = 0.39894228040143267794;

// x = activation(x), of K vectors at once.
template <Activation kActivation, class C, int K>
CHARLM_INLINE void activate(Vec<C> (&x)[K]) {
  if constexpr (kActivation == Activation::kTanh) tanh<C, K>(x);
  for (int i = 0; i < K; i++) {
    if constexpr (kActivation == Activation::kRelu) x[i] = x[i] < 0 ? Vec<C>{} : x[i];  // NaN stays
    if constexpr (kActivation == Activation::kGelu) x[i] = x[i] * C(0.5) * (1 + erf(x[i] * C(kSqrtHalf)));
  }
}

// The derivative of the activation, from what is kept of the forward: its output, for gelu its input.
template <Activation kActivation, class C>
CHARLM_INLINE Vec<C> activation_derivative(Vec<C> kept) {
  if constexpr (kActivation == Activation::kTanh) return 1 - kept * kept;
  if constexpr (kActivation == Activation::kRelu) return kept <= 0 ? Vec<C>{} : broadcast<C>(1);
  if constexpr (kActivation == Activation::kGelu) {
    const Vec<C> cdf = C(0.5) * (1 + erf(kept * C(kSqrtHalf)));
    return cdf + kept * C(kInverseSqrtTwoPi) * exp(kept * kept * C(-0.5));
  }
  return broadcast<C>(1);
}

}  // namespace charlm::CHARLM_ISA
