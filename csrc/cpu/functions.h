// exp, log and tanh of vectors, from published polynomials, with errors of a few units in the last place.
#pragma once

#include <math.h>

#include <type_traits>

#include "cpu/vec.h"

namespace charlm::CHARLM_ISA {

template <class C>
struct Constants;

template <>
struct Constants<float> {
  typedef VecU32 Bits;
  static constexpr int kFractionBits = 23;
  static constexpr uint32_t kOne = 0x3f800000, kSqrtHalf = 0x3f3504f3, kFraction = 0x007fffff, kSign = 0x80000000;
  static constexpr float kRound = 0x1.8p23f;  // adding it rounds to an integer, in the low bits of the sum
  static constexpr float kLog2E = 1.44269504088896341f, kLn2 = 0.693147180559945f;
  static constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;  // integer * kLn2High is exact
  static constexpr float kSmallestExponent = -87.33654f;                      // exp of a smaller number is subnormal
  // exp(r) = 1 + r + r^2 (...) on [-ln(2)/2, ln(2)/2]: minimax, relative error 3.1e-9. Highest power first.
  static constexpr float kExp[] = {1.38146102283e-3f, 8.36870979734e-3f, 4.16683874113e-2f, 1.66665206902e-1f,
                                   4.99999934516e-1f};
  // (log(1+s) - log(1-s) - 2 s) / s in powers of s^2: FreeBSD's e_logf.c.
  static constexpr float kLog[] = {0xf89e26.0p-26f, 0x91e9ee.0p-25f, 0xccce13.0p-25f, 0xaaaaaa.0p-24f};
};

template <>
struct Constants<double> {
  typedef uint64_t Bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int kFractionBits = 52;
  static constexpr uint64_t kOne = 0x3ff0000000000000, kSqrtHalf = 0x3fe6a09e667f3bcd, kFraction = 0x000fffffffffffff;
  static constexpr uint64_t kSign = 0x8000000000000000;
  static constexpr double kRound = 0x1.8p52;
  static constexpr double kLog2E = 1.4426950408889634074;
  static constexpr double kLn2High = 6.93147180369123816490e-01, kLn2Low = 1.90821492927058770002e-10;
  static constexpr double kSmallestExponent = -708.396;
  // Minimax, relative error 3.7e-18.
  static constexpr double kExp[] = {2.5000069055527920611e-8, 2.763023384476737854e-7,  2.7557586275084820514e-6,
                                    2.4801493136433563783e-5, 1.9841269506772164919e-4, 1.3888888943597420045e-3,
                                    8.3333333334943351523e-3, 4.1666666666530267171e-2, 1.6666666666666412775e-1,
                                    5.0000000000000106166e-1};
  // fdlibm's e_log.c (Sun, 1993).
  static constexpr double kLog[] = {1.479819860511658591e-01, 1.531383769920937332e-01, 1.818357216161805012e-01,
                                    2.222219843214978396e-01, 2.857142874366239149e-01, 3.999999999940941908e-01,
                                    6.666666666666735130e-01};
};

#ifdef CHARLM_HAS_LOOKUP
// exp() below for float, with n a multiple of 1/8: a table holds 2^0 … 2^(7/8), and for |r| <= ln(2)/16 two
// coefficients suffice. ln 2 is not split: its rounding adds 2.7e-9 |x| to the relative error, a twentieth of the
// rounding error of x. For x <= -127 ln 2 the number from the table is 0; results between 0 and 2^-126 are inexact.
template <int K>
CHARLM_INLINE void exp_by_table(Vec<float> (&x)[K]) {
  using Constant = Constants<float>;
  constexpr int kTableBits = 3, kTableSize = 1 << kTableBits, kExponent = Constant::kFractionBits - kTableBits;
  constexpr float kRound = Constant::kRound / kTableSize;
  // exp(r) = 1 + r + r^2 (...), minimax, relative error 2.6e-8; highest power first.
  constexpr float kExp[] = {1.66668584084e-1f, 5.00064472013e-1f};
  constexpr float kPowers[] = {1.000000000f, 1.090507733f, 1.189207115f, 1.296839555f,
                               1.414213562f, 1.542210825f, 1.681792831f, 1.834008086f};
  VecU32 table;  // n, with its fraction, is added to the bits of the exponent; the fraction is subtracted here
  for (int i = 0; i < kLanes<float>; i++) {
    table[i] = bit_cast<uint32_t>(kPowers[i % kTableSize]) - (uint32_t(i % kTableSize) << kExponent);
  }
  Vec<float> shifted[K], r[K], power[K], p[K];
  for (int i = 0; i < K; i++) x[i] = max<float>(broadcast<float>(-127 * Constant::kLn2), x[i]);  // NaN stays
  for (int i = 0; i < K; i++) shifted[i] = x[i] * Constant::kLog2E + kRound;
  for (int i = 0; i < K; i++) r[i] = x[i] - (shifted[i] - kRound) * Constant::kLn2;
  for (int i = 0; i < K; i++) {
    const VecU32 n = bit_cast<VecU32>(shifted[i]);
    power[i] = bit_cast<Vec<float>>(lookup(table, n) + (n << kExponent));
  }
  for (int i = 0; i < K; i++) p[i] = r[i] * kExp[0] + kExp[1];
  for (int i = 0; i < K; i++) p[i] = p[i] * r[i] + 1;
  for (int i = 0; i < K; i++) x[i] = power[i] * r[i] * p[i] + power[i];
}
#endif

// exp(x) for x <= 88 (float) or 709 (double): x = n ln 2 + r with an integer n, and exp(x) = 2^n exp(r). K vectors at
// once, so that their chains of dependent operations overlap. exp(-inf) = 0; a subnormal result may be 0; NaN stays
// NaN.
template <class C, int K>
CHARLM_INLINE void exp(Vec<C> (&x)[K]) {
#ifdef CHARLM_HAS_LOOKUP
  if constexpr (std::is_same_v<C, float>) return exp_by_table(x);
#endif
  using Constant = Constants<C>;
  Vec<C> shifted[K], r[K], p[K];
  for (int i = 0; i < K; i++) shifted[i] = x[i] * Constant::kLog2E + Constant::kRound;
  for (int i = 0; i < K; i++) p[i] = shifted[i] - Constant::kRound;  // n
  for (int i = 0; i < K; i++) r[i] = x[i] - p[i] * Constant::kLn2High;
  for (int i = 0; i < K; i++) r[i] = r[i] - p[i] * Constant::kLn2Low;
  for (int i = 0; i < K; i++) p[i] = r[i] * Constant::kExp[0] + Constant::kExp[1];
#pragma GCC unroll 16
  for (size_t power = 2; power < sizeof(Constant::kExp) / sizeof(C); power++) {
    for (int i = 0; i < K; i++) p[i] = p[i] * r[i] + Constant::kExp[power];
  }
  for (int i = 0; i < K; i++) p[i] = p[i] * (r[i] * r[i]) + r[i];
  for (int i = 0; i < K; i++) p[i] = p[i] + 1;
  using Bits = typename Constant::Bits;
  for (int i = 0; i < K; i++) {  // multiplies by 2^n: adds n to the bits of the exponent
    const Bits bits = bit_cast<Bits>(p[i]) + (bit_cast<Bits>(shifted[i]) << Constant::kFractionBits);
    x[i] = x[i] < Constant::kSmallestExponent ? Vec<C>{} : bit_cast<Vec<C>>(bits);
  }
}

CHARLM_INLINE Vec<float> exp(Vec<float> x) {
  Vec<float> one[1] = {x};
  exp<float, 1>(one);
  return one[0];
}

CHARLM_INLINE Vec<double> exp(Vec<double> x) {
  Vec<double> one[1] = {x};
  exp<double, 1>(one);
  return one[0];
}

// log(x) for positive normal x = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)): with s = f / (2 + f),
// log(1 + f) = f - f^2/2 + s (f^2/2 + R(s^2)), as in fdlibm.
template <class C>
CHARLM_INLINE Vec<C> log(Vec<C> x) {
  using Constant = Constants<C>;
  using Bits = typename Constant::Bits;
  const Bits shifted = bit_cast<Bits>(x) + (Constant::kOne - Constant::kSqrtHalf);
  const Vec<C> f = bit_cast<Vec<C>>((shifted & Constant::kFraction) + Constant::kSqrtHalf) - 1;
  // Converts the biased k to a number through the low bits of kRound.
  const Bits biased = (shifted >> Constant::kFractionBits) + bit_cast<Bits>(broadcast<C>(Constant::kRound));
  const Vec<C> k = bit_cast<Vec<C>>(biased) - (Constant::kRound + C(Constant::kOne >> Constant::kFractionBits));
  const Vec<C> s = f / (f + 2), z = s * s, half_square = f * f * C(0.5);
  Vec<C> series = z * Constant::kLog[0];
  for (size_t i = 1; i < sizeof(Constant::kLog) / sizeof(C); i++) series = (series + Constant::kLog[i]) * z;
  return (s * (half_square + series) + k * Constant::kLn2Low - half_square) + f + k * Constant::kLn2High;
}

CHARLM_INLINE float log(float x) { return ::logf(x); }
CHARLM_INLINE double log(double x) { return ::log(x); }

// tanh(|x|) = t / (t + 2) with t = exp(2 |x|) - 1 = 2^n (exp(r) - 1) + (2^n - 1), where 2 |x| = n ln 2 + r as in exp().
// Nothing cancels near 0. The error is at most 3 units in the last place.
template <class C, int K>
CHARLM_INLINE void tanh(Vec<C> (&x)[K]) {
  using Constant = Constants<C>;
  using Bits = typename Constant::Bits;
  Vec<C> y[K], shifted[K], r[K], p[K];
  for (int i = 0; i < K; i++) {
    const Vec<C> magnitude = bit_cast<Vec<C>>(bit_cast<Bits>(x[i]) & ~Constant::kSign);
    y[i] = 2 * min<C>(broadcast<C>(20), magnitude);  // tanh(20) rounds to 1 in float and double; NaN stays
  }
  for (int i = 0; i < K; i++) shifted[i] = y[i] * Constant::kLog2E + Constant::kRound;
  for (int i = 0; i < K; i++) p[i] = shifted[i] - Constant::kRound;  // n
  if constexpr (std::is_same_v<C, float>) {  // an unsplit ln 2 adds a negligible 3e-9 |x| to the relative error of t
    for (int i = 0; i < K; i++) r[i] = y[i] - p[i] * Constant::kLn2;
  } else {
    for (int i = 0; i < K; i++) r[i] = y[i] - p[i] * Constant::kLn2High;
    for (int i = 0; i < K; i++) r[i] = r[i] - p[i] * Constant::kLn2Low;
  }
  for (int i = 0; i < K; i++) p[i] = r[i] * Constant::kExp[0] + Constant::kExp[1];
#pragma GCC unroll 16
  for (size_t power = 2; power < sizeof(Constant::kExp) / sizeof(C); power++) {
    for (int i = 0; i < K; i++) p[i] = p[i] * r[i] + Constant::kExp[power];
  }
  for (int i = 0; i < K; i++) p[i] = p[i] * (r[i] * r[i]) + r[i];
  for (int i = 0; i < K; i++) {
    const Vec<C> power = bit_cast<Vec<C>>((bit_cast<Bits>(shifted[i]) << Constant::kFractionBits) + Constant::kOne);
    const Vec<C> t = power * p[i] + (power - 1), magnitude = t / (t + 2);
    x[i] = bit_cast<Vec<C>>(bit_cast<Bits>(magnitude) | (bit_cast<Bits>(x[i]) & Constant::kSign));
  }
}

template <class C>
CHARLM_INLINE Vec<C> tanh(Vec<C> x) {
  Vec<C> one[1] = {x};
  tanh<C, 1>(one);
  return one[0];
}

// ------------------------------------------------------------------------------------------------- probabilities
// Conversions between probabilities and log-probabilities, over their whole range.

// log(x) for any x >= 0: subnormal numbers are scaled to normal ones. NaN for x < 0.
template <class C>
CHARLM_INLINE Vec<C> log_of_probability(Vec<C> x) {
  constexpr bool kFloat = sizeof(C) == sizeof(float);
  constexpr C kSmallestNormal = kFloat ? C(0x1p-126f) : C(0x1p-1022), kScale = kFloat ? C(0x1p24f) : C(0x1p54);
  constexpr C kLogScale = kFloat ? C(16.635532333438686) : C(37.429947750237048);
  const Mask<C> small = x < kSmallestNormal;
  const Vec<C> y = log<C>(select<C>(small, x * kScale, x)) - select<C>(small, broadcast<C>(kLogScale), Vec<C>{});
  return select<C>(x > 0, y, select<C>(x == 0, broadcast<C>(-INFINITY), broadcast<C>(NAN)));
}

// exp(x) for log-probabilities. An x > 0 is not one, but has an exponential; above 88 (709) the result is infinity,
// slightly before torch's exp overflows.
template <class C, int K>
CHARLM_INLINE void exp_of_log_probabilities(Vec<C> (&x)[K]) {
  constexpr C kLargestExponent = sizeof(C) == sizeof(float) ? C(88) : C(709);
  Mask<C> too_large[K];
  for (int k = 0; k < K; k++) too_large[k] = x[k] > kLargestExponent;
  exp<C, K>(x);
  for (int k = 0; k < K; k++) x[k] = select<C>(too_large[k], broadcast<C>(INFINITY), x[k]);
}

}  // namespace charlm::CHARLM_ISA
