// Shared memory: an arena in which every array has exact bounds. All its bits are set (NaN, or -1 as an integer) at the
// start of each block, so that a number that was never written shows in the result.
#pragma once

#include <type_traits>

#include "scheduler.h"

namespace charlm::cuda_emulator {

inline constexpr size_t kGap = 1024;  // bytes between arrays, which AddressSanitizer checks

inline constexpr size_t kArenaBytes = kMaxShared + (Shared::kMaxArrays + 2) * 2 * kGap;

// `bytes` at an address that is `remainder` mod 128.
CHARLM_EMULATOR_CODE inline char* allocate_shared(Shared& shared, size_t bytes, size_t remainder) {
  char* const memory = shared.arena + shared.used + remainder;
  shared.used += (remainder + bytes + kGap + 127) / 128 * 128;
  allow_access(memory, bytes);
  auto* const words = reinterpret_cast<volatile uint64_t*>(memory);  // no memset(): ThreadSanitizer would see it
  for (size_t i = 0; i < (bytes + 7) / 8; ++i) words[i] = ~uint64_t{0};
  return memory;
}

CHARLM_EMULATOR_CODE inline void begin_shared(Shared& shared) {
  char*& arena = shared.arena;
  if (!arena) {
    void* const memory = mmap(nullptr, kArenaBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    arena = static_cast<char*>(memory);
    forbid_access(arena, kArenaBytes);
  }
  shared.used = kGap;
  shared.n_arrays = 0;
  shared.static_bytes = 0;
  shared.dynamic_bytes = emulator.dynamic_bytes;
  // Exactly 16-byte aligned, as cuda.cuh promises.
  shared.dynamic = allocate_shared(shared, shared.dynamic_bytes, 16);
}

CHARLM_EMULATOR_CODE inline void end_shared(Shared& shared) { forbid_access(shared.arena, shared.used); }

CHARLM_EMULATOR_CODE inline char* shared_array(Shared& shared, const void* name, size_t bytes, size_t alignment) {
  for (unsigned i = 0; i < shared.n_arrays; ++i) {
    if (shared.arrays[i].name == name) return shared.arrays[i].memory;
  }
  shared.static_bytes += bytes;
  if (shared.n_arrays == Shared::kMaxArrays || shared.static_bytes > kMaxStaticShared) {
    fail("more than 48 KiB of static shared memory, or more than 64 arrays");
  }
  if (shared.static_bytes + shared.dynamic_bytes > kMaxShared) fail("more than 227 KiB of shared memory");
  if (shared.dynamic_bytes <= cuda::kMaxUnrequestedSharedBytes &&
      shared.static_bytes + shared.dynamic_bytes > kMaxStaticShared) {
    fail("more than 48 KiB of static and dynamic shared memory, and none was requested");
  }
  // 16-byte aligned only if the type is, so that UndefinedBehaviorSanitizer reports a 128-bit access to any other
  // type. AddressSanitizer requires multiples of 8.
  char* const memory = allocate_shared(shared, bytes, alignment < 16 ? 8 : 0);
  shared.arrays[shared.n_arrays++] = {name, memory, bytes, alignment};
  return memory;
}

// Where `block` has what the current block has at `p`; null if that is not in shared memory.
CHARLM_EMULATOR_CODE inline char* shared_address_in(Block& block, const void* pointer, size_t bytes) {
  const Shared& mine = emulator.block->shared;
  const char* const p = static_cast<const char*>(pointer);
  const auto holds = [&](const char* memory, size_t size)
                         CHARLM_EMULATOR_CODE { return p >= memory && p + bytes <= memory + size; };
  if (holds(mine.dynamic, mine.dynamic_bytes)) return block.shared.dynamic + (p - mine.dynamic);
  for (unsigned i = 0; i < mine.n_arrays; ++i) {
    const SharedArray& array = mine.arrays[i];
    if (holds(array.memory, array.bytes)) {
      return shared_array(block.shared, array.name, array.bytes, array.alignment) + (p - array.memory);
    }
  }
  return nullptr;
}

template <class T, size_t n>
using Array = T[n];

template <class T, size_t n>
Array<T, n>& shared_array(const void* name) {
  static_assert(std::is_trivially_copyable_v<T>, "objects in shared memory are neither constructed nor destroyed");
  return *reinterpret_cast<Array<T, n>*>(shared_array(emulator.block->shared, name, sizeof(T) * n, alignof(T)));
}

}  // namespace charlm::cuda_emulator

#define CHARLM_SHARED(T, name, n)                                                                                \
  ::charlm::cuda_emulator::Array<T, n>& name = ::charlm::cuda_emulator::shared_array<T, n>([]() -> const void* { \
    static char this_array;                                                                                      \
    return &this_array;                                                                                          \
  }())

#define CHARLM_DYNAMIC_SHARED(T, name) \
  T* const name = reinterpret_cast<T*>(::charlm::cuda_emulator::emulator.block->shared.dynamic)
