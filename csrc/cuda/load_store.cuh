// Loads and stores: elements of type T, converted to the compute type and moved in packs of 16 bytes; and indices of
// any integer type, checked against their limit.
#pragma once

#include "cuda/cuda.cuh"

namespace charlm::cuda {
namespace {

// ------------------------------------------------------------------------------------------------------------ elements

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

// Rounds to nearest, ties to even.
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

// Number i of a gradient (Device::gradient).
template <class T>
__device__ __forceinline__ Compute<T> load_gradient(const Compute<T>* converted, const T* unconverted, int64_t i) {
  return unconverted ? to_compute(unconverted[i]) : converted[i];
}

constexpr int kPackBytes = 16;  // the widest load and store

template <class T>
constexpr int kPackSize = kPackBytes / static_cast<int>(sizeof(T));

// kPackSize<T> numbers, loaded or stored by one instruction at an address that is a multiple of 16.
template <class T>
struct alignas(kPackBytes) Pack {
  T values[kPackSize<T>];
};

template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* p) {
  return __builtin_bit_cast(Pack<T>, *reinterpret_cast<const uint4*>(p));
}

// Stores to global memory. Inline assembly, because nvcc splits the store if the numbers come from different branches.
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

// A pack from any address of an element, by loads as wide as its alignment allows.
template <class T>
__device__ __forceinline__ Pack<T> load_any_pack(const T* p) {
  const auto address = reinterpret_cast<uintptr_t>(p);
  if (address % kPackBytes == 0) return load_pack(p);
  if constexpr (sizeof(T) < 4) {
    if (address % 4 == 0) {
      const auto* const words = reinterpret_cast<const unsigned*>(p);
      return __builtin_bit_cast(Pack<T>, uint4{words[0], words[1], words[2], words[3]});
    }
  }
  Pack<T> pack;
#pragma unroll
  for (int k = 0; k < kPackSize<T>; k++) pack.values[k] = p[k];
  return pack;
}

// Loads kCount consecutive numbers: one, or whole packs from a multiple of 16 bytes on.
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

// Number of elements from `p` to the next multiple of 16 bytes.
template <class T>
__host__ __device__ __forceinline__ int elements_to_alignment(const T* p) {
  return static_cast<int>((kPackBytes - reinterpret_cast<uintptr_t>(p) % kPackBytes) % kPackBytes / sizeof(T));
}

// ------------------------------------------------------------------------------------------------------------- indices

// Calls use(data) with the indices as a pointer to their own type.
template <class Use>
__device__ __forceinline__ void with_index_type(const Indices& indices, Use use) {
  switch (indices.against.type) {  // the same for all threads
    case IndexType::kInt8:
      return use(static_cast<const int8_t*>(indices.data));
    case IndexType::kInt16:
      return use(static_cast<const int16_t*>(indices.data));
    case IndexType::kInt32:
      return use(static_cast<const int32_t*>(indices.data));
    case IndexType::kUInt8:
      return use(static_cast<const uint8_t*>(indices.data));
    case IndexType::kUInt16:
      return use(static_cast<const uint16_t*>(indices.data));
    case IndexType::kUInt32:
      return use(static_cast<const uint32_t*>(indices.data));
    default:
      return use(static_cast<const int64_t*>(indices.data));
  }
}

__device__ __forceinline__ int64_t load_index(const Indices& indices, int64_t n) {
  int64_t index;
  with_index_type(indices, [&](const auto* data) { index = data[n]; });
  return index;
}

// index[k] = index at n + k * step, or 0 from `end` on. All loads are issued before the first value is used: a loop
// over load_index() would wait for each value inside its branch.
template <int kCount>
__device__ __forceinline__ void load_indices(const Indices& indices, int64_t n, int64_t step, int64_t end,
                                             int64_t (&index)[kCount]) {
  with_index_type(indices, [&](const auto* data) {
#pragma unroll
    for (int k = 0; k < kCount; k++) index[k] = n + k * step < end ? data[n + k * step] : 0;
  });
}

__device__ __forceinline__ bool in_range(const Indices& indices, int64_t index) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(indices.against.limit);
}

// Only the first thread of the device that gets here writes, since one error is enough.
__device__ inline void record_index_error(const Indices& indices, int64_t position, int64_t index) {
  IndexError* const error = indices.error;
  if (atomicCAS(&error->claimed, 0, 1) != 0) return;
  error->value = index;
  error->position = position;
  error->against = indices.against;
  __threadfence_system();  // the host reads the other fields only after `ready`
  *static_cast<volatile int32_t*>(&error->ready) = 1;
}

// An index out of range that a thread found in a loop and records after the loop, which saves registers.
struct BadIndex {
  int64_t position = -1;
  int64_t index = 0;

  // Returns whether `value` is in range.
  __device__ __forceinline__ bool check(const Indices& indices, int64_t at_position, int64_t value) {
    if (in_range(indices, value)) return true;
    position = at_position;
    index = value;
    return false;
  }

  __device__ __forceinline__ void record(const Indices& indices) const {
    if (position >= 0) record_index_error(indices, position, index);
  }
};

}  // namespace
}  // namespace charlm::cuda
