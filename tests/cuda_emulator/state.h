// The state of the emulator: the launch, the threads of the block that runs, and the collectives in which they wait.
#pragma once

#include <mutex>
#include <source_location>
#include <stdexcept>
#include <string>

#include "context.h"
#include "cuda_types.h"

namespace charlm::cuda_emulator {

// An error of a kernel or a launch.
struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

inline constexpr unsigned kMaxThreads = 1024, kWarpSize = 32, kMaxWarps = kMaxThreads / kWarpSize;
inline constexpr size_t kMaxStaticShared = 48 << 10, kMaxShared = 227 << 10;  // bytes of a block, on sm_90

enum class Schedule { kForward, kReverse, kRandom };

struct Thread {
  unsigned index;  // in its block: the warp is index / 32, the lane is index % 32
  uint3 position;
  Context context;
  void* identity[kSides];
  // The collective in which it waits, or waited last.
  const char* function;
  std::source_location location;
  unsigned mask;  // 0: the whole block
  int source_lane;
  void (*combine)(Thread* warp, unsigned lanes);  // run by the last lane that arrives
  alignas(16) unsigned char operand[16], result[16];
};

// Successive barriers alternate between two phases: a thread may arrive at the next barrier before another thread has
// left this one, and the two must not be confused.
struct Barrier {
  unsigned n_waiting;
  unsigned phase;
  Thread* first;  // that arrived
  int n_true[2];  // predicates of __syncthreads_count
  SyncObject order[kSides][2];
};

struct Warp {
  unsigned waiting;           // lanes inside a collective
  unsigned exited;            // lanes that have returned from the kernel
  unsigned phase[kWarpSize];  // by the lowest lane of the mask
  SyncObject order[kSides][kWarpSize][2];
};

// One array of shared memory. `name` is an address that is unique to its declaration.
struct SharedArray {
  const void* name;
  char* memory;
};

struct Shared {
  static constexpr unsigned kMaxArrays = 64;

  char* arena[kSides];
  size_t used;  // bytes of the arena, gaps included
  char* dynamic;
  size_t dynamic_bytes, static_bytes;
  SharedArray arrays[kMaxArrays];
  unsigned n_arrays;
};

struct Emulator {
  std::mutex mutex;  // one launch at a time, whichever OS thread it comes from

  // The launch.
  void (*kernel)(const void* arguments);
  const void* arguments;
  Schedule schedule;
  uint64_t random;
  unsigned n_threads;  // of each block
  Context host;
  // A block comes after the launch and the previous block of its side: two phases, as for barriers.
  SyncObject order[kSides][2];

  // The block.
  uint64_t n_blocks;  // begun, in this launch and before
  unsigned side, turn;
  SyncObject fences;
  Thread threads[kMaxThreads];
  Thread* current;
  unsigned n_exited;
  uint64_t runnable[kMaxThreads / 64], started[kMaxThreads / 64];  // bit i % 64 of word i / 64: thread i
  Barrier barrier;
  Warp warps[kMaxWarps];
  Shared shared;
  bool failed;
  std::string error;

  // The first n_free are free; with ThreadSanitizer, thread i has stack i of its side.
  Stack stacks[kSides][kMaxThreads];
  unsigned n_free;
};
inline Emulator emulator{};

inline std::string describe(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

inline std::string describe(const Thread& thread) {
  return "block " + describe(blockIdx) + " thread " + describe(thread.position) + " [warp " +
         std::to_string(thread.index / kWarpSize) + " lane " + std::to_string(thread.index % kWarpSize) + "]";
}

inline std::string describe(const std::source_location& location) {
  const std::string path = location.file_name();
  return path.substr(path.rfind('/') + 1) + ":" + std::to_string(location.line());
}

inline std::string describe_mask(unsigned mask) {
  std::string digits = "0x";
  for (int shift = 28; shift >= 0; shift -= 4) digits += "0123456789abcdef"[mask >> shift & 15];
  return digits;
}

// The collective in which a thread waits.
inline std::string describe_wait(const Thread& thread) {
  return std::string(thread.function) + (thread.mask ? " mask " + describe_mask(thread.mask) : "") + " at " +
         describe(thread.location);
}

CHARLM_EMULATOR_CODE inline void set_error(const std::string& error) {
  emulator.error = error;
  emulator.failed = true;
}

}  // namespace charlm::cuda_emulator
