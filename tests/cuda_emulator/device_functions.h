// CUDA's device functions other than barriers: atomics, fences, cached loads, bits, arithmetic.
#pragma once

#include <cmath>
#include <concepts>
#include <cstring>

#include "state.h"

// For the math functions, which CUDA has in the global namespace.
#include <math.h>

namespace charlm::cuda_emulator {

// Atomics are relaxed, as in CUDA: for ThreadSanitizer they do not race with each other, and order no other access.
template <class T, class Update>
T update_atomically(T* address, Update update) {
  T old, desired;
  __atomic_load(address, &old, __ATOMIC_RELAXED);
  do {
    desired = update(old);
  } while (!__atomic_compare_exchange(address, &old, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

template <class T, class... Ts>
concept OneOf = (std::same_as<T, Ts> || ...);

template <class T>
concept Atomic = OneOf<T, int, unsigned, unsigned long long>;

// A fence orders the accesses before it in one thread with the accesses after a later fence in another thread.
CHARLM_EMULATOR_CODE inline void fence() {
  acquire(emulator.fences);
  release(emulator.fences);
}

// Reads all of *address, as the GPU does, even if the kernel uses only a part of it: sanitizers then check all of it.
template <class T>
T load(const T* address) {
  T value = *address;
  asm volatile("" : "+m"(value));
  return value;
}

template <class To, class From>
To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From));
  To result;
  std::memcpy(&result, &value, sizeof(To));
  return result;
}

}  // namespace charlm::cuda_emulator

template <class T>
  requires(charlm::cuda_emulator::Atomic<T> || std::floating_point<T>)
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return charlm::cuda_emulator::update_atomically(address, [=](T old) {
    if constexpr (std::same_as<T, int>) {
      return static_cast<int>(static_cast<unsigned>(old) + static_cast<unsigned>(value));  // wraps
    } else {
      return old + value;
    }
  });
}
template <class T>
  requires(charlm::cuda_emulator::Atomic<T> || std::same_as<T, long long>)
T atomicMax(T* address, std::type_identity_t<T> value) {
  return charlm::cuda_emulator::update_atomically(address, [=](T old) { return old < value ? value : old; });
}
template <charlm::cuda_emulator::Atomic T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> desired) {
  return charlm::cuda_emulator::update_atomically(address, [=](T old) { return old == expected ? desired : old; });
}

inline void __threadfence() { charlm::cuda_emulator::fence(); }
inline void __threadfence_block() { charlm::cuda_emulator::fence(); }
inline void __threadfence_system() { charlm::cuda_emulator::fence(); }

template <class T>
T __ldg(const T* address) {
  return charlm::cuda_emulator::load(address);
}
template <class T>
T __ldcs(const T* address) {
  return charlm::cuda_emulator::load(address);
}
template <class T>
T __ldcg(const T* address) {
  return charlm::cuda_emulator::load(address);
}
template <class T>
void __stcs(T* address, std::type_identity_t<T> value) {
  *address = value;
}
template <class T>
void __stcg(T* address, std::type_identity_t<T> value) {
  *address = value;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
inline int __clz(int bits) { return bits ? __builtin_clz(static_cast<unsigned>(bits)) : 32; }
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(uint64_t{a} * b >> 32); }

inline int __float_as_int(float value) { return charlm::cuda_emulator::bits_as<int>(value); }
inline unsigned __float_as_uint(float value) { return charlm::cuda_emulator::bits_as<unsigned>(value); }
inline float __int_as_float(int bits) { return charlm::cuda_emulator::bits_as<float>(bits); }
inline float __uint_as_float(unsigned bits) { return charlm::cuda_emulator::bits_as<float>(bits); }
inline long long __double_as_longlong(double value) { return charlm::cuda_emulator::bits_as<long long>(value); }
inline double __longlong_as_double(long long bits) { return charlm::cuda_emulator::bits_as<double>(bits); }

inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fdividef(float a, float b) { return a / b; }

// Both arguments have the same type: otherwise a conversion would go unnoticed.
template <class T>
  requires std::integral<T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
  requires std::integral<T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
