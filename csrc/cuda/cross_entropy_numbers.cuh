// The numbers of a row in registers, kept as the bits of memory: as numbers, ptxas would give each half a register of
// its own. Words of 4 bytes and packs of 16 bytes, the maximum of some, and their exponentials.
#pragma once

#include "cuda/rows.cuh"

namespace charlm::cuda {
namespace {

// `value`, of which the compiler knows nothing: what depends on it is computed anew.
__device__ __forceinline__ int opaque(int value) {
#ifdef __CUDA_ARCH__
  asm volatile("" : "+r"(value));
#endif
  return value;
}

// ------------------------------------------------------------------------------------------------ words of 4 bytes

template <class T>
constexpr int kWordSize = 4 / static_cast<int>(sizeof(T));

template <class T>
constexpr uint32_t kWordOfMinusInfinity = 0xff800000;
template <>
constexpr uint32_t kWordOfMinusInfinity<BFloat16> = 0xff80ff80;
template <>
constexpr uint32_t kWordOfMinusInfinity<Float16> = 0xfc00fc00;

// The two halves of a word.
template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float& low, float& high) {
  if constexpr (__is_same(T, BFloat16)) {
    low = __uint_as_float(word << 16);
    high = __uint_as_float(word & 0xffff0000);
  } else {
    low = to_compute(Float16{static_cast<uint16_t>(word)});
    high = to_compute(Float16{static_cast<uint16_t>(word >> 16)});
  }
}

template <class T>
__device__ __forceinline__ void unpack(uint32_t word, float (&x)[kWordSize<T>]) {
  if constexpr (kWordSize<T> == 1) {
    x[0] = __uint_as_float(word);
  } else {
    unpack<T>(word, x[0], x[1]);
  }
}

// Rounds to two halves in a word.
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t word;
  if constexpr (__is_same(T, BFloat16)) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
#else
  return from_compute<T>(low).bits | uint32_t{from_compute<T>(high).bits} << 16;
#endif
}

template <class T>
__device__ __forceinline__ uint32_t pack(const float (&x)[kWordSize<T>]) {
  if constexpr (kWordSize<T> == 1) {
    return __float_as_uint(x[0]);
  } else {
    return pack<T>(x[0], x[1]);
  }
}

// The maximum of each number, before it is unpacked. NaN is ignored, unless both are NaN.
template <class T>
__device__ __forceinline__ uint32_t max_of_words(uint32_t a, uint32_t b) {
#ifdef __CUDA_ARCH__
  if constexpr (kWordSize<T> == 2) {
    uint32_t word;
    if constexpr (__is_same(T, BFloat16)) {
      asm("max.bf16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    } else {
      asm("max.f16x2 %0, %1, %2;" : "=r"(word) : "r"(a), "r"(b));
    }
    return word;
  }
#endif
  float x[kWordSize<T>], y[kWordSize<T>];
  unpack<T>(a, x);
  unpack<T>(b, y);
#pragma unroll
  for (int i = 0; i < kWordSize<T>; i++) x[i] = fmax(x[i], y[i]);
  return pack<T>(x);
}

constexpr int kChains = 4;  // reductions of a lane that do not wait for each other

// NaN is ignored, unless there are only NaNs.
template <class T, int kWords>
__device__ __forceinline__ float max_of(const uint32_t (&words)[kWords]) {
  constexpr int kUsed = kWords < kChains ? kWords : kChains;
  uint32_t largest[kUsed];
#pragma unroll
  for (int k = 0; k < kWords; k++) {
    largest[k % kUsed] = k < kUsed ? words[k] : max_of_words<T>(largest[k % kUsed], words[k]);
  }
#pragma unroll
  for (int k = 1; k < kUsed; k++) largest[0] = max_of_words<T>(largest[0], largest[k]);
  float x[kWordSize<T>];
  unpack<T>(largest[0], x);
  return kWordSize<T> == 1 ? x[0] : fmax(x[0], x[kWordSize<T> - 1]);
}

// -------------------------------------------------------------------------------------------------------------- packs

template <class T>
__device__ __forceinline__ uint4 bits_of_minus_infinity() {
  constexpr bool kIsFloat = sizeof(T) == sizeof(float), kIsDouble = sizeof(T) == sizeof(double);
  constexpr unsigned kLow = kIsDouble ? 0 : kIsFloat ? 0xff800000 : __is_same(T, BFloat16) ? 0xff80ff80 : 0xfc00fc00;
  constexpr unsigned kHigh = kIsDouble ? 0xfff00000 : kLow;
  return uint4{kLow, kHigh, kLow, kHigh};
}

// A pack from any address of an element.
template <class T>
__device__ __forceinline__ uint4 load_any_bits(const T* p) {
  if constexpr (sizeof(T) == 2) {
    if (reinterpret_cast<uintptr_t>(p) % 4 != 0) {
      const auto word = [&](int i) { return p[i].bits | unsigned{p[i + 1].bits} << 16; };
      return uint4{word(0), word(2), word(4), word(6)};
    }
  }
  if constexpr (sizeof(T) == 8) {
    return __builtin_bit_cast(uint4, Pack<T>{p[0], p[1]});
  } else {
    const auto* const words = reinterpret_cast<const unsigned*>(p);
    return uint4{words[0], words[1], words[2], words[3]};
  }
}

template <class T>
__device__ __forceinline__ uint4 load_bits(const T* p) {
  return *reinterpret_cast<const uint4*>(p);
}

template <class T>
__device__ __forceinline__ void store_bits(T* p, uint4 bits) {
  store_pack(p, __builtin_bit_cast(Pack<T>, bits));
}

template <class T>
__device__ __forceinline__ void unpack(uint4 bits, Compute<T> (&x)[kPackSize<T>]) {
  if constexpr (sizeof(T) == 2) {
    const uint32_t words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; k++) unpack<T>(words[k], x[2 * k], x[2 * k + 1]);
  } else {
    const auto pack = __builtin_bit_cast(Pack<T>, bits);
#pragma unroll
    for (int k = 0; k < kPackSize<T>; k++) x[k] = to_compute(pack.values[k]);
  }
}

// The same by another instruction: after unpack(), ptxas would keep all results of the first call in registers.
template <class T>
__device__ __forceinline__ void unpack_again(uint4 bits, Compute<T> (&x)[kPackSize<T>]) {
#ifdef __CUDA_ARCH__
  if constexpr (__is_same(T, BFloat16)) {
    const unsigned words[] = {bits.x, bits.y, bits.z, bits.w};
#pragma unroll
    for (int k = 0; k < 4; k++) {
      x[2 * k] = __uint_as_float(__byte_perm(words[k], 0, 0x1044));
      x[2 * k + 1] = __uint_as_float(__byte_perm(words[k], 0, 0x3244));
    }
    return;
  }
#endif
  unpack<T>(bits, x);
}

// Rounds to T.
template <class T>
__device__ __forceinline__ uint4 packed(const Compute<T> (&x)[kPackSize<T>]) {
  if constexpr (sizeof(T) == 2) {
    uint32_t words[4];
#pragma unroll
    for (int k = 0; k < 4; k++) words[k] = pack<T>(x[2 * k], x[2 * k + 1]);
    return uint4{words[0], words[1], words[2], words[3]};
  } else {
    Pack<T> numbers;
#pragma unroll
    for (int k = 0; k < kPackSize<T>; k++) numbers.values[k] = x[k];
    return __builtin_bit_cast(uint4, numbers);
  }
}

// The largest number of some packs. NaN is ignored, unless there are only NaNs.
template <class T, int kPacks>
__device__ __forceinline__ Compute<T> largest_of(const uint4 (&packs)[kPacks]) {
  if constexpr (sizeof(T) < sizeof(float)) {
    uint32_t words[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      const uint4 bits = packs[i];
      words[i] = max_of_words<T>(max_of_words<T>(bits.x, bits.y), max_of_words<T>(bits.z, bits.w));
    }
    return max_of<T>(words);
  } else {
    Compute<T> largest = -INFINITY;
#pragma unroll
    for (int i = 0; i < kPacks; i++) {
      Compute<T> x[kPackSize<T>];
      unpack<T>(packs[i], x);
#pragma unroll
      for (int k = 0; k < kPackSize<T>; k++) largest = fmax(largest, x[k]);
    }
    return largest;
  }
}

// -------------------------------------------------------------------------------------------------------- exponentials

// 1 / x for x >= 1, or NaN: 1 ulp.
__device__ __forceinline__ float reciprocal(float x) {
  const float y = reciprocal_approximate(x);
  return fmaf(y, fmaf(-x, y, 1), y);
}

// a / b, where `inverse` is 1 / b: exactly 1 if a is b.
__device__ __forceinline__ float quotient(float a, float b, float inverse) {
  const float first = a * inverse;
  return fmaf(fmaf(-first, b, a), inverse, first);
}

// exp(z - max) for the numbers z of a row, times that of the maximum, which need not be 1. Half types: 2^(z log2(e) -
// max log2(e)), one fma. The second product is rounded, which changes all numbers of the row by the same factor. For a
// maximum so large that other numbers differ from it by 64 or more, log2(e) is left out: exact, and the other numbers
// give 0 as before.
template <class T>
class Exponential {
  using C = Compute<T>;
  static constexpr float kLog2e = 1.44269504f, kLarge = 0x1p18f;

 public:
  static constexpr bool kIsExact = sizeof(T) >= sizeof(float);  // exp(max - max) is 1

  __device__ __forceinline__ explicit Exponential(C max) : from_(max == -INFINITY ? C(0) : max) {
    if constexpr (!kIsExact) {
      factor_ = fabsf(from_) > kLarge ? 1 : kLog2e;
      offset_ = -from_ * factor_;
    }
  }

  __device__ __forceinline__ C operator()(C z) const {
    if constexpr (kIsExact) {
      return exp_of<T>(z - from_);
    } else {
      return exp2_approximate(fmaf(z, factor_, offset_));
    }
  }

  // What the exponentials are relative to: the maximum, or 0 if that is -inf.
  __device__ __forceinline__ C from() const { return from_; }

  // A sum of exponentials, divided by that of the maximum.
  __device__ __forceinline__ C corrected(C sum) const {
    if constexpr (kIsExact) {
      return sum;
    } else {
      const float of_max = (*this)(from_);
      return quotient(sum, of_max, reciprocal(of_max));
    }
  }

  // The factor of an exponential in a gradient, from its factor if that of the maximum were 1. A row of -inf gets NaN.
  __device__ __forceinline__ C corrected_factor(C factor, C max) const {
    if constexpr (kIsExact) {
      return max == -INFINITY ? C(NAN) : factor;
    } else {
      return max == -INFINITY ? NAN : factor * reciprocal((*this)(from_));
    }
  }

 private:
  const C from_;
  float factor_ = 1, offset_ = 0;
};

// Sets `values` to the exponentials of the words and returns their sum.
template <class T, int kWords>
__device__ __forceinline__ float exponentials(const uint32_t (&words)[kWords], const Exponential<T>& exponential,
                                              float logit_scale, float (&values)[kWords * kWordSize<T>]) {
  constexpr int P = kWordSize<T>, kUsed = kWords * P < kChains ? kWords * P : kChains;
  float sums[kUsed];
  const auto compute = [&](auto scaled) {
#pragma unroll
    for (int k = 0; k < kWords; k++) {
      float z[P];
      unpack<T>(words[k], z);
#pragma unroll
      for (int j = 0; j < P; j++) {
        const int i = k * P + j;
        values[i] = exponential(scaled(z[j]));
        sums[i % kUsed] = i < kUsed ? values[i] : sums[i % kUsed] + values[i];
      }
    }
  };
  if (logit_scale == 1) {
    compute([](float x) { return x; });
  } else {
    compute([&](float x) { return x * logit_scale; });
  }
#pragma unroll
  for (int i = 1; i < kUsed; i++) sums[0] += sums[i];
  return sums[0];
}

}  // namespace
}  // namespace charlm::cuda
