// Vec<C>: one vector register of the instruction set that this object is compiled for, as a vector type of GCC and
// Clang. Arithmetic operators compile to SSE2, AVX2, AVX-512 or NEON. Loads widen half types to float; stores round to
// nearest even.
#pragma once

#include <string.h>

#include <utility>

#if defined(__F16C__) || defined(__AVX__)
#include <immintrin.h>
#endif

#include "core/kernel.h"

namespace charlm::CHARLM_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kVectorRegisters = 32;
#else
constexpr int kVectorRegisters = 16;
#endif

#define CHARLM_INLINE inline __attribute__((always_inline))
#define CHARLM_NOINLINE __attribute__((noinline))  // for code that many loops call

template <class C>
struct VecOf;

template <>
struct VecOf<float> {
  typedef float type __attribute__((vector_size(kVectorBytes)));
  typedef int32_t mask __attribute__((vector_size(kVectorBytes)));
};

template <>
struct VecOf<double> {
  typedef double type __attribute__((vector_size(kVectorBytes)));
  typedef int64_t mask __attribute__((vector_size(kVectorBytes)));
};

template <class C>
using Vec = typename VecOf<C>::type;
template <class C>
using Mask = typename VecOf<C>::mask;  // each lane is 0 or -1: the result of comparing two Vec<C>

template <class C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));

template <class C>
CHARLM_INLINE Vec<C> broadcast(C x) {
  return x - Vec<C>{};
}

template <class C>
CHARLM_INLINE Vec<C> select(Mask<C> mask, Vec<C> yes, Vec<C> no) {
  return mask ? yes : no;
}

// max and min return b in lanes where a or b is NaN.
template <class C>
CHARLM_INLINE Vec<C> max(Vec<C> a, Vec<C> b) {
  return a > b ? a : b;
}

template <class C>
CHARLM_INLINE Vec<C> min(Vec<C> a, Vec<C> b) {
  return a < b ? a : b;
}

// The same by intrinsics, since GCC compiles a comparison with a constant to two instructions.
#if defined(__AVX512F__)
template <>
CHARLM_INLINE Vec<float> max<float>(Vec<float> a, Vec<float> b) {
  return _mm512_max_ps(a, b);
}
template <>
CHARLM_INLINE Vec<float> min<float>(Vec<float> a, Vec<float> b) {
  return _mm512_min_ps(a, b);
}
#elif defined(__AVX2__)
template <>
CHARLM_INLINE Vec<float> max<float>(Vec<float> a, Vec<float> b) {
  return _mm256_max_ps(a, b);
}
template <>
CHARLM_INLINE Vec<float> min<float>(Vec<float> a, Vec<float> b) {
  return _mm256_min_ps(a, b);
}
#endif

// a * b + c, rounded once if the instruction set has FMA. The compiler also contracts operators, but in a sum of two
// products it may fuse either one, so that the last bit would differ from loop to loop.
template <class C>
CHARLM_INLINE Vec<C> fma(Vec<C> a, Vec<C> b, Vec<C> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(C) == sizeof(float)) return _mm512_fmadd_ps(a, b, c);
  if constexpr (sizeof(C) == sizeof(double)) return _mm512_fmadd_pd(a, b, c);
#elif defined(__AVX2__)
  if constexpr (sizeof(C) == sizeof(float)) return _mm256_fmadd_ps(a, b, c);
  if constexpr (sizeof(C) == sizeof(double)) return _mm256_fmadd_pd(a, b, c);
#else
  return a * b + c;
#endif
}

// The mask of the first n lanes.
template <class C>
CHARLM_INLINE Mask<C> first_lanes(int64_t n) {
  Mask<C> lane;
  for (int i = 0; i < kLanes<C>; i++) lane[i] = i;
  return lane < static_cast<decltype(lane[0] + 0)>(n);
}

template <class To, class From>
CHARLM_INLINE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  memcpy(&to, &from, sizeof to);
  return to;
}

// Reduces the lanes to one number by halving: op takes two vectors, and finally two numbers.
template <class C, int kBytes = kVectorBytes, class Op>
CHARLM_INLINE C reduce(Op op, const C* lanes) {
  typedef C Half __attribute__((vector_size(kBytes / 2)));
  if constexpr (kBytes == 2 * sizeof(C)) {
    return op(lanes[0], lanes[1]);
  } else {
    Half low, high;
    memcpy(&low, lanes, sizeof low);
    memcpy(&high, lanes + kBytes / 2 / sizeof(C), sizeof high);
    const Half both = op(low, high);
    C halved[kBytes / 2 / sizeof(C)];
    memcpy(halved, &both, sizeof both);
    return reduce<C, kBytes / 2>(op, halved);
  }
}

template <class C>
CHARLM_INLINE C reduce_sum(Vec<C> v) {
  C lanes[kLanes<C>];
  memcpy(lanes, &v, sizeof v);
  return reduce<C>([](auto a, auto b) { return a + b; }, lanes);
}

#ifdef __clang__
#define CHARLM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12 lacks __builtin_shufflevector
#define CHARLM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Mask<C>{__VA_ARGS__})
#endif

// Adds neighbouring elements of kElement lanes. In each block of kBlock lanes, the first half of the result is from a
// and the second from b: with four elements in a block, [a0 + a1, a2 + a3, b0 + b1, b2 + b3].
template <class C, int kElement, int kBlock, int... lane>
CHARLM_INLINE Vec<C> add_neighbours(Vec<C> a, Vec<C> b, std::integer_sequence<int, lane...>) {
  constexpr int kHalf = kBlock / kElement / 2;
  constexpr auto first = [](int i) {
    const int element = i % kBlock / kElement;
    return i / kBlock * kBlock + element % kHalf * 2 * kElement + i % kElement + (element < kHalf ? 0 : kLanes<C>);
  };
  return CHARLM_SHUFFLE(a, b, first(lane)...) + CHARLM_SHUFFLE(a, b, (first(lane) + kElement)...);
}

// The sums of the lanes of kLanes vectors: [sum(v[0]), sum(v[1]), …]. Sums within 16 bytes first, where shuffles are
// fastest.
template <class C, int kCount = kLanes<C>>
CHARLM_INLINE Vec<C> reduce_sums(const Vec<C>* v) {
  if constexpr (kCount == 1) return *v;
  if constexpr (kCount > 1) {
    constexpr int kLanesIn16Bytes = 16 / sizeof(C);
    const Vec<C> a = reduce_sums<C, kCount / 2>(v), b = reduce_sums<C, kCount / 2>(v + kCount / 2);
    constexpr std::make_integer_sequence<int, kLanes<C>> lanes;
    if constexpr (kCount <= kLanesIn16Bytes) return add_neighbours<C, 1, kLanesIn16Bytes>(a, b, lanes);
    if constexpr (kCount > kLanesIn16Bytes) return add_neighbours<C, kLanesIn16Bytes, kLanes<C>>(a, b, lanes);
  }
}

template <class C>
CHARLM_INLINE C reduce_max(Vec<C> v) {
  C lanes[kLanes<C>];
  memcpy(lanes, &v, sizeof v);
  return reduce<C>([](auto a, auto b) { return a > b ? a : b; }, lanes);
}

template <class C>
CHARLM_INLINE bool any(Mask<C> mask) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  return _mm256_movemask_epi8((__m256i)mask) != 0;
#else
  auto found = mask[0];
  for (int i = 1; i < kLanes<C>; i++) found |= mask[i];
  return found != 0;
#endif
}

typedef uint32_t VecU32 __attribute__((vector_size(kVectorBytes)));

// Returns table[i % kLanes] for each lane i of `index`, if the instruction set can do this with one instruction.
#if defined(__AVX512F__)
#define CHARLM_HAS_LOOKUP 1
CHARLM_INLINE VecU32 lookup(VecU32 table, VecU32 index) {
  return (VecU32)_mm512_permutexvar_epi32((__m512i)index, (__m512i)table);
}
#elif defined(__AVX2__)
#define CHARLM_HAS_LOOKUP 1
CHARLM_INLINE VecU32 lookup(VecU32 table, VecU32 index) {
  return (VecU32)_mm256_permutevar8x32_epi32((__m256i)table, (__m256i)index);
}
#endif

// ---------------------------------------------------------------------------------------------- loads and stores

typedef uint16_t HalfVecU16 __attribute__((vector_size(kVectorBytes / 2)));

CHARLM_INLINE Vec<float> widen(BFloat16, HalfVecU16 bits) {
  return bit_cast<Vec<float>>(__builtin_convertvector(bits, VecU32) << 16);
}

CHARLM_INLINE HalfVecU16 narrow(BFloat16, Vec<float> x) {
  const VecU32 u = bit_cast<VecU32>(x);
  const VecU32 rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const VecU32 quiet_nan = (u >> 16) | 0x40;  // rounding the bits of a NaN could give infinity
  return __builtin_convertvector(x == x ? rounded : quiet_nan, HalfVecU16);
}

#if defined(__AVX512F__)
CHARLM_INLINE Vec<float> widen(Float16, HalfVecU16 bits) { return _mm512_cvtph_ps((__m256i)bits); }
CHARLM_INLINE HalfVecU16 narrow(Float16, Vec<float> x) {
  return (HalfVecU16)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
#elif defined(__F16C__)
CHARLM_INLINE Vec<float> widen(Float16, HalfVecU16 bits) { return _mm256_cvtph_ps((__m128i)bits); }
CHARLM_INLINE HalfVecU16 narrow(Float16, Vec<float> x) {
  return (HalfVecU16)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
}
#else
CHARLM_INLINE Vec<float> widen(Float16, HalfVecU16 bits) {
  const VecU32 u = __builtin_convertvector(bits, VecU32);
  // Moves the 10 bits of fraction and 5 bits of exponent into place. The multiplication by 2^112 corrects the bias and
  // normalizes subnormal numbers.
  const Vec<float> finite = bit_cast<Vec<float>>((u & 0x7fff) << 13) * 0x1p112f;
  const VecU32 special = ((u & 0x7fff) << 13) | 0x7f800000;  // infinity, NaN
  const VecU32 magnitude = (u & 0x7c00) == 0x7c00 ? special : bit_cast<VecU32>(finite);
  return bit_cast<Vec<float>>(magnitude | ((u & 0x8000) << 16));
}

CHARLM_INLINE HalfVecU16 narrow(Float16, Vec<float> x) {
  const VecU32 u = bit_cast<VecU32>(x);
  const VecU32 magnitude = u & 0x7fffffff;
  // From 2^-14 on: change the bias and round to nearest even; results of 2^16 and more become infinity.
  const VecU32 normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // Below 2^-14: adding 0.5, whose unit in the last place is 2^-24, aligns and rounds the bits.
  const VecU32 subnormal =
      bit_cast<VecU32>(bit_cast<Vec<float>>(magnitude) + 0.5f) - bit_cast<VecU32>(broadcast<float>(0.5f));
  VecU32 half = magnitude < VecU32{} + (113u << 23) ? subnormal : normal;
  half = magnitude >= VecU32{} + 0x477ff000u ? VecU32{} + 0x7c00u : half;  // 65520 and more
  half = magnitude > VecU32{} + 0x7f800000u ? VecU32{} + 0x7e00u : half;   // NaN
  return __builtin_convertvector(half | ((u >> 16) & 0x8000), HalfVecU16);
}
#endif

// The width of a load or store: a whole vector, or the first n lanes at the end of a row. A load sets the other lanes
// to `fill`.
struct Whole {
  static constexpr bool kIsWhole = true;
};

struct Part {
  static constexpr bool kIsWhole = false;
  int64_t n;
};

template <class C>
CHARLM_INLINE Vec<C> load(const C* p, Whole) {
  Vec<C> v;
  memcpy(&v, p, sizeof v);
  return v;
}

template <class Half>
CHARLM_INLINE Vec<float> load_half(const Half* p) {
  HalfVecU16 bits;
  memcpy(&bits, p, sizeof bits);
  return widen(Half{}, bits);
}

CHARLM_INLINE Vec<float> load(const BFloat16* p, Whole) { return load_half(p); }
CHARLM_INLINE Vec<float> load(const Float16* p, Whole) { return load_half(p); }

template <class C>
CHARLM_INLINE void store(C* p, Vec<C> v, Whole) {
  memcpy(p, &v, sizeof v);
}

template <class Half>
CHARLM_INLINE void store_half(Half* p, Vec<float> v) {
  const HalfVecU16 bits = narrow(Half{}, v);
  memcpy(p, &bits, sizeof bits);
}

CHARLM_INLINE void store(BFloat16* p, Vec<float> v, Whole) { store_half(p, v); }
CHARLM_INLINE void store(Float16* p, Vec<float> v, Whole) { store_half(p, v); }

template <class T, class C = Compute<T>>
CHARLM_INLINE Vec<C> load(const T* p, Part part, C fill = 0) {
  T lanes[kLanes<C>] = {};
  for (int64_t i = 0; i < part.n; i++) lanes[i] = p[i];
  const Vec<C> v = load(lanes, Whole{});
  return select<C>(first_lanes<C>(part.n), v, broadcast<C>(fill));
}

template <class T, class C = Compute<T>>
CHARLM_INLINE Vec<C> load(const T* p, Whole whole, C) {
  return load(p, whole);
}

template <class T, class C = Compute<T>>
CHARLM_INLINE void store(T* p, Vec<C> v, Part part) {
  T lanes[kLanes<C>];
  store(lanes, v, Whole{});
  for (int64_t i = 0; i < part.n; i++) p[i] = lanes[i];
}

#if defined(__AVX512F__)
CHARLM_INLINE Vec<float> load(const float* p, Part part, float fill = 0) {
  return _mm512_mask_loadu_ps(broadcast<float>(fill), (__mmask16)((1u << part.n) - 1), p);
}
CHARLM_INLINE void store(float* p, Vec<float> v, Part part) {
  _mm512_mask_storeu_ps(p, (__mmask16)((1u << part.n) - 1), v);
}
CHARLM_INLINE Vec<double> load(const double* p, Part part, double fill = 0) {
  return _mm512_mask_loadu_pd(broadcast<double>(fill), (__mmask8)((1u << part.n) - 1), p);
}
CHARLM_INLINE void store(double* p, Vec<double> v, Part part) {
  _mm512_mask_storeu_pd(p, (__mmask8)((1u << part.n) - 1), v);
}
#elif defined(__AVX2__)
CHARLM_INLINE Vec<float> load(const float* p, Part part, float fill = 0) {
  const Mask<float> lanes = first_lanes<float>(part.n);
  return select<float>(lanes, _mm256_maskload_ps(p, (__m256i)lanes), broadcast<float>(fill));
}
CHARLM_INLINE void store(float* p, Vec<float> v, Part part) {
  _mm256_maskstore_ps(p, (__m256i)first_lanes<float>(part.n), v);
}
CHARLM_INLINE Vec<double> load(const double* p, Part part, double fill = 0) {
  const Mask<double> lanes = first_lanes<double>(part.n);
  return select<double>(lanes, _mm256_maskload_pd(p, (__m256i)lanes), broadcast<double>(fill));
}
CHARLM_INLINE void store(double* p, Vec<double> v, Part part) {
  _mm256_maskstore_pd(p, (__m256i)first_lanes<double>(part.n), v);
}
#endif

// Reads or rounds one number exactly as the vector versions do.
CHARLM_INLINE float load_one(const float* p) { return *p; }
CHARLM_INLINE double load_one(const double* p) { return *p; }
CHARLM_INLINE void store_one(float* p, float x) { *p = x; }
CHARLM_INLINE void store_one(double* p, double x) { *p = x; }

template <class Half>
CHARLM_INLINE float load_one(const Half* p) {
  return widen(Half{}, HalfVecU16{} + p->bits)[0];
}

template <class Half>
CHARLM_INLINE void store_one(Half* p, float x) {
  p->bits = narrow(Half{}, broadcast<float>(x))[0];
}

// Calls body(c, Whole) for c = 0, W, 2 W, … and body(c, Part) for the remaining elements of n.
template <class C, class Body>
CHARLM_INLINE void for_each_vector(int64_t n, Body&& body) {
  int64_t c = 0;
  for (; c + kLanes<C> <= n; c += kLanes<C>) body(c, Whole{});
  if (c < n) body(c, Part{n - c});
}

// Prefetches kBytes from p on; p may be outside any tensor.
template <int kBytes>
CHARLM_INLINE void prefetch(const void* p) {
  for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(static_cast<const char*>(p) + i);
}

// An integer known at compile time, as an argument.
template <int K>
struct Count {};

// Calls body(c, Whole, Count<K>) for groups of K vectors, and body(c, width, Count<1>) for each remaining vector.
template <class C, int K, class Body>
CHARLM_INLINE void for_each_vector_group(int64_t n, Body&& body) {
  int64_t c = 0;
  for (; c + K * kLanes<C> <= n; c += K * kLanes<C>) body(c, Whole{}, Count<K>{});
  for_each_vector<C>(n - c, [&](int64_t rest, auto width) { body(c + rest, width, Count<1>{}); });
}

}  // namespace charlm::CHARLM_ISA
