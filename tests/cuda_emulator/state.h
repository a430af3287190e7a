// The state of the emulator: the launch, the blocks that run, their threads, and the collectives in which they wait.
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
inline constexpr unsigned kMaxClusterBlocks = 8;                              // that every GPU with clusters allows
inline constexpr size_t kMaxStaticShared = 48 << 10, kMaxShared = 227 << 10;  // bytes of a block, on sm_90

enum class Schedule { kForward, kReverse, kRandom };

struct Block;
struct TransferState;

inline constexpr unsigned kStoreGroups = 16;  // that ThreadSanitizer tells apart

struct Thread {
  unsigned index;  // in its block: the warp is index / 32, the lane is index % 32
  uint3 position;
  Block* block;
  Context context;
  Stack own_stack;  // with ThreadSanitizer
  void* identity;
  // The collective in which it waits, or waited last.
  const char* function;
  std::source_location location;
  unsigned mask;  // 0: the whole block
  int source_lane;
  void (*combine)(Thread* warp, unsigned lanes);  // run by the last lane that arrives
  alignas(16) unsigned char operand[16], result[16];

  // transfers.h, async.h
  TransferState* awaited;  // the transfer barrier in which it waits
  unsigned n_groups;       // of bulk stores, committed
  bool is_in_cluster_barrier, waits_for_cluster, has_met_cluster;
  unsigned cluster_phase;    // in which it arrived
  bool waited_for_previous;  // kernel
  // ThreadSanitizer's identities of what makes its loads and messages, and its stores.
  void *loader, *storer;
  SyncObject issued_loads, issued_stores, stores_have_read[kStoreGroups];
};

// Successive barriers alternate between two phases: a thread may arrive at the next barrier before another thread has
// left this one, and the two must not be confused.
struct Barrier {
  unsigned n_waiting;
  unsigned phase;
  Thread* first;  // that arrived
  int n_true[2];  // predicates of __syncthreads_count
  SyncObject order[2];
};

struct Warp {
  unsigned waiting;           // lanes inside a collective
  unsigned exited;            // lanes that have returned from the kernel
  unsigned phase[kWarpSize];  // by the lowest lane of the mask
  SyncObject order[kWarpSize][2];
};

// One array of shared memory. `name` is an address that is unique to its declaration.
struct SharedArray {
  const void* name;
  char* memory;
  size_t bytes, alignment;
};

struct Shared {
  static constexpr unsigned kMaxArrays = 64;

  char* arena;
  size_t used;  // bytes of the arena, gaps included
  char* dynamic;
  size_t dynamic_bytes, static_bytes;
  SharedArray arrays[kMaxArrays];
  unsigned n_arrays;
};

// A transfer barrier, whose object in shared memory holds `handle`.
struct TransferState {
  static constexpr uint64_t kHandle = 0xBA221E2000000000;  // + its index in the block

  const uint64_t* object;
  Thread* initializer;
  std::source_location location;  // of init_barrier()
  bool is_published;
  unsigned n_expected, n_missing;  // arrivals of a phase
  int64_t expected_bytes;
  uint64_t phase;  // ended phases
  unsigned n_waiting;
  SyncObject order;
};

// A copy or a message that was issued and has not been made.
struct Transfer {
  Thread* issuer;
  const char* function;
  std::source_location location;
  TransferState* barrier;  // null: a bulk store
  Block* receiver;         // with a barrier: the block of that
  unsigned group;          // of bulk stores
  char* to;
  const char* from;  // null: `value`
  unsigned bytes;
  uint64_t value;
};

struct Block {
  static constexpr unsigned kMaxBarriers = 256;

  uint3 position;
  unsigned rank;  // in its cluster
  Thread threads[kMaxThreads];
  unsigned n_exited;
  uint64_t runnable[kMaxThreads / 64], started[kMaxThreads / 64];  // bit i % 64 of word i / 64: thread i
  Barrier barrier;
  Warp warps[kMaxWarps];
  Shared shared;
  TransferState transfer_barriers[kMaxBarriers];
  unsigned n_transfer_barriers;
  SyncObject fenced_for_bulk;
};

// The barrier of arrive_in_cluster() and wait_for_cluster().
struct ClusterBarrier {
  unsigned n_arrived, phase;
  SyncObject published;
};

struct Emulator {
  static constexpr unsigned kMaxTransfers = 8192;

  std::mutex mutex;  // one launch at a time, whichever OS thread it comes from

  // The launch.
  void (*kernel)(const void* arguments);
  const void* arguments;
  Schedule schedule;
  uint64_t random;
  unsigned n_threads;  // of each block
  size_t dynamic_bytes;
  int capability;  // 90: sm_90
  bool is_dependent;
  Context host;
  // A cluster comes after the launch and the previous cluster of its side: two phases, as for barriers.
  SyncObject order[kSides][2];

  // The cluster: the blocks that run together, nearly always one.
  uint64_t n_clusters;  // begun, in this launch and before
  unsigned side, turn;
  unsigned n_blocks;  // in the cluster
  Block blocks[kSides][kMaxClusterBlocks];
  ClusterBarrier cluster_barrier[kSides];
  Transfer transfers[kMaxTransfers];  // in the order in which they were issued
  unsigned n_transfers;
  SyncObject fences;
  Thread* current;
  Block* block;  // of the current thread
  bool failed;
  std::string error;

  // The first n_free are free. With ThreadSanitizer, each thread has its own.
  Stack stacks[kMaxThreads * kMaxClusterBlocks];
  unsigned n_free;
};
inline Emulator emulator{};

inline std::string describe(const uint3& v) {
  return "(" + std::to_string(v.x) + "," + std::to_string(v.y) + "," + std::to_string(v.z) + ")";
}

inline std::string describe(const Thread& thread) {
  return "block " + describe(thread.block->position) + " thread " + describe(thread.position) + " [warp " +
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

std::string describe(const TransferState& barrier);  // transfers.h

// The collective in which a thread waits.
inline std::string describe_wait(const Thread& thread) {
  return std::string(thread.function) + (thread.mask ? " mask " + describe_mask(thread.mask) : "") + " at " +
         describe(thread.location) + (thread.awaited ? " for " + describe(*thread.awaited) : "");
}

CHARLM_EMULATOR_CODE inline void set_error(const std::string& error) {
  emulator.error = error;
  emulator.failed = true;
}

}  // namespace charlm::cuda_emulator
