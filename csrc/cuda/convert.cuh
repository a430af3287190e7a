// Numbers as kernels compute with them, and as memory holds them: T, in packs of 16 bytes.
#pragma once

#include "cuda/cuda.cuh"

namespace charlm::cuda {
namespace {

__device__ __forceinline__ float to_compute(float x) { return x; }
__device__ __forceinline__ double to_compute(double x) { return x; }

__device__ __forceinline__ float to_compute(BFloat16 x) { return __uint_as_float(static_cast<unsigned>(x.bits) << 16); }

__device__ __forceinline__ float to_compute(Float16 x) {
#ifdef __CUDA_ARCH__
  return __half2float(__ushort_as_half(x.bits));
#else
  return static_cast<float>(__builtin_bit_cast(_Float16, x.bits));
#endif
}

// Rounds to nearest even.
template <class T>
__device__ __forceinline__ T from_compute(Compute<T> x) {
  if constexpr (sizeof(T) == sizeof(Compute<T>)) {
    return x;
  } else {
#ifdef __CUDA_ARCH__
    if constexpr (__is_same(T, BFloat16)) {
      return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
    } else {
      return {__half_as_ushort(__float2half_rn(x))};
    }
#else
    if constexpr (__is_same(T, BFloat16)) {
      const uint32_t bits = __float_as_uint(x);
      return x != x ? BFloat16{0x7fc0} : BFloat16{static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
    } else {
      return {__builtin_bit_cast(uint16_t, static_cast<_Float16>(x))};
    }
#endif
  }
}

constexpr int kPackBytes = 16;  // the widest load and store

template <class T>
constexpr int kPackSize = kPackBytes / static_cast<int>(sizeof(T));

// kPackSize<T> numbers, loaded and stored by one instruction from addresses that are multiples of 16.
template <class T>
struct alignas(kPackBytes) Pack {
  T values[kPackSize<T>];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  return __builtin_bit_cast(Pack<T>, *reinterpret_cast<const uint4*>(p));
}

// To global memory. The instruction is spelled out: of numbers that come from branches, nvcc would store each alone.
template <class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T>& pack) {
  const uint4 bits = __builtin_bit_cast(uint4, pack);
#ifdef __CUDA_ARCH__
  asm("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(bits.x), "r"(bits.y),
      "r"(bits.z), "r"(bits.w)
      : "memory");
#else
  *reinterpret_cast<uint4*>(p) = bits;
#endif
}

// kCount neighbours: one, or whole packs from a multiple of 16 bytes on.
template <int kCount, class T>
__device__ __forceinline__ void load_numbers(const T* p, T (&values)[kCount]) {
  if constexpr (kCount == 1) {
    values[0] = *p;
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += kPackSize<T>) {
      const Pack<T> pack = load_pack(p + i);
#pragma unroll
      for (int j = 0; j < kPackSize<T>; j++) values[i + j] = pack.values[j];
    }
  }
}

// Stores kCount numbers as T, each rounded once.
template <int kCount, class T>
__device__ __forceinline__ void store_numbers(T* p, const Compute<T> (&values)[kCount]) {
  if constexpr (kCount == 1) {
    *p = from_compute<T>(values[0]);
  } else {
#pragma unroll
    for (int i = 0; i < kCount; i += kPackSize<T>) {
      Pack<T> pack;
#pragma unroll
      for (int j = 0; j < kPackSize<T>; j++) pack.values[j] = from_compute<T>(values[i + j]);
      store_pack(p + i, pack);
    }
  }
}

// Numbers from `p` up to the next multiple of 16 bytes.
template <class T>
__device__ __forceinline__ int elements_to_alignment(const T* p) {
  return static_cast<int>((kPackBytes - reinterpret_cast<uintptr_t>(p) % kPackBytes) % kPackBytes / sizeof(T));
}

}  // namespace
}  // namespace charlm::cuda
