// Annotations for the sanitizers: which stack runs, which bytes are out of bounds, and which event happens before
// which. Every function here is empty in a build without its sanitizer.
#pragma once

#include <cstddef>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

// The emulator itself must not be instrumented: it would be slow, and ThreadSanitizer would report its bookkeeping as
// races between CUDA threads. It must not be inlined into a kernel either, where it would be instrumented.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CHARLM_EMULATOR_CODE __attribute__((noinline, no_sanitize("address", "thread", "undefined")))
#else
#define CHARLM_EMULATOR_CODE
#endif
#define CHARLM_EMULATOR_COLD __attribute__((cold)) CHARLM_EMULATOR_CODE inline

namespace charlm::cuda_emulator {

#if defined(__SANITIZE_ADDRESS__)
inline constexpr bool kAddressSanitizer = true;
#else
inline constexpr bool kAddressSanitizer = false;
#endif

// Neighbouring blocks run concurrently on a GPU. ThreadSanitizer treats them as unordered if they have separate
// threads, stacks, shared memory and barriers: so there are two sets of these, called sides, which the blocks use
// alternately; large clusters use one. A dependent kernel is unordered with the kernel before it, too, so
// it uses another two sides.
#if defined(__SANITIZE_THREAD__)
inline constexpr bool kThreadSanitizer = true;
inline constexpr unsigned kSides = 2, kAllSides = 4;
#else
inline constexpr bool kThreadSanitizer = false;
inline constexpr unsigned kSides = 1, kAllSides = 1;
#endif

struct Stack {
  char* bottom = nullptr;
  size_t size = 0;
};

// Everything before release() happens before everything after a later acquire() of the same object.
struct SyncObject {
  char address[8];
};

CHARLM_EMULATOR_CODE inline void release([[maybe_unused]] SyncObject& object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(&object);
#endif
}

CHARLM_EMULATOR_CODE inline void acquire([[maybe_unused]] SyncObject& object) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(&object);
#endif
}

CHARLM_EMULATOR_CODE inline void* create_identity() {
#if defined(__SANITIZE_THREAD__)
  return __tsan_create_fiber(0);
#else
  return nullptr;
#endif
}

CHARLM_EMULATOR_CODE inline void destroy_identity([[maybe_unused]] void* identity) {
#if defined(__SANITIZE_THREAD__)
  __tsan_destroy_fiber(identity);
#endif
}

CHARLM_EMULATOR_CODE inline void* current_identity() {
#if defined(__SANITIZE_THREAD__)
  return __tsan_get_current_fiber();
#else
  return nullptr;
#endif
}

CHARLM_EMULATOR_CODE inline void switch_identity([[maybe_unused]] void* identity) {
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(identity, __tsan_switch_to_fiber_no_sync);
#endif
}

// Before and after a switch of stacks. `fake_stack` is saved for the stack that is left; null: that stack has ended.
CHARLM_EMULATOR_CODE inline void leave_stack([[maybe_unused]] void** fake_stack, [[maybe_unused]] const Stack& next) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(fake_stack, next.bottom, next.size);
#endif
}

// `previous` becomes the stack that was left, as AddressSanitizer knows it.
CHARLM_EMULATOR_CODE inline void enter_stack([[maybe_unused]] void* fake_stack, [[maybe_unused]] Stack& previous) {
#if defined(__SANITIZE_ADDRESS__)
  const void* bottom = nullptr;
  __sanitizer_finish_switch_fiber(fake_stack, &bottom, &previous.size);
  previous.bottom = static_cast<char*>(const_cast<void*>(bottom));
#endif
}

CHARLM_EMULATOR_CODE inline void forbid_access([[maybe_unused]] char* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_poison_memory_region(memory, bytes);
#endif
}

CHARLM_EMULATOR_CODE inline void allow_access([[maybe_unused]] char* memory, [[maybe_unused]] size_t bytes) {
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(memory, bytes);
#endif
}

}  // namespace charlm::cuda_emulator
