// A launch: the checks of its configuration, the loop over blocks, and the start and end of the threads of a block.
#pragma once

#include <numeric>
#include <tuple>
#include <type_traits>
#include <utility>

#include "collectives.h"
#include "shared_memory.h"
#include "transfers.h"

namespace charlm::cuda_emulator {

CHARLM_EMULATOR_CODE inline void end_thread(Thread& me) {
  release(emulator.order[emulator.side][emulator.turn]);
  ++me.block->n_exited;
  me.block->warps[me.index / kWarpSize].exited |= 1u << me.index % kWarpSize;
  if (!emulator.failed) check_exit(me);
  if (!emulator.failed) check_transfers_at_exit(me);
}

// Runs the current thread to its end on its own stack, which the next thread that has not started yet then reuses: a
// kernel without barriers needs one stack and no switch.
CHARLM_EMULATOR_CODE inline void run_threads() {
  Stack previous;
  enter_stack(nullptr, previous);
  if (!emulator.host.stack.bottom) emulator.host.stack = previous;
  for (;;) {
    Thread& me = *emulator.current;
    acquire(emulator.order[emulator.side][emulator.turn ^ 1]);
    emulator.kernel(emulator.arguments);
    end_thread(me);
    Thread* const next = take_runnable();
    if (!kThreadSanitizer && next && !is_started(*next)) {
      next->context.stack = me.context.stack;
      next->context.fake_stack = nullptr;
      mark_started(*next);
      set_current(*next);
      continue;
    }
    if (!kThreadSanitizer) emulator.stacks[emulator.n_free++] = me.context.stack;
    switch_to(me.context, next, true);
  }
}

CHARLM_EMULATOR_CODE inline bool has_exited(const Thread& thread) {
  return thread.block->warps[thread.index / kWarpSize].exited >> thread.index % kWarpSize & 1;
}

inline std::string describe_deadlock(const Block& block) {
  std::string text = "deadlock in block " + describe(block.position) + ": " + std::to_string(block.n_exited) + " of " +
                     std::to_string(emulator.n_threads) + " threads have exited";
  std::string last;
  unsigned n_kinds = 0;
  for (unsigned i = 0; i < emulator.n_threads && n_kinds < 6; ++i) {
    const Thread& thread = block.threads[i];
    if (has_exited(thread)) continue;
    const std::string wait = describe_wait(thread);
    if (wait == last) continue;
    text += "; " + describe(thread) + " waits in " + wait;
    last = wait;
    ++n_kinds;
  }
  return text;
}

// After a failure: releases the stacks and identities of threads that did not finish. The actions of all threads happen
// before what the host does next, such as freeing the memory that they used.
CHARLM_EMULATOR_CODE inline void give_up_threads(Block& block) {
  for (unsigned i = 0; i < emulator.n_threads; ++i) {
    Thread& thread = block.threads[i];
    const bool given_up = is_started(thread) && !has_exited(thread);
    if (kThreadSanitizer) {
      switch_identity(thread.identity);
      release(emulator.order[emulator.side][emulator.turn]);
      switch_identity(emulator.host.identity);
      if (given_up) destroy_identity(std::exchange(thread.identity, nullptr));
    } else if (given_up) {
      const Stack& stack = thread.context.stack;
      allow_access(stack.bottom, stack.size);
      emulator.stacks[emulator.n_free++] = stack;
    }
    block.warps[i / kWarpSize].waiting = 0;
  }
  block.barrier.n_waiting = 0;
}

// Block `index` of the grid. The host creates ThreadSanitizer's identities of all threads before the block begins,
// because the actions of the creator happen before those of the thread.
CHARLM_EMULATOR_CODE inline void begin_block(Block& block, uint64_t index) {
  block.position.x = static_cast<unsigned>(index % gridDim.x);
  block.position.y = static_cast<unsigned>(index / gridDim.x % gridDim.y);
  block.position.z = static_cast<unsigned>(index / gridDim.x / gridDim.y);
  block.n_exited = 0;
  for (unsigned begin = 0; begin < emulator.n_threads; begin += 64) {
    const unsigned n = emulator.n_threads - begin;
    block.runnable[begin / 64] = ~uint64_t{0} >> (n < 64 ? 64 - n : 0);
    block.started[begin / 64] = 0;
  }
  for (unsigned warp = 0; warp * kWarpSize < emulator.n_threads; ++warp) block.warps[warp].exited = 0;
  block.n_transfer_barriers = 0;
  for (unsigned i = 0; kThreadSanitizer && i < emulator.n_threads; ++i) {
    void*& identity = block.threads[i].identity;
    if (!identity) identity = create_identity();
  }
  begin_shared(block.shared);
}

CHARLM_EMULATOR_CODE inline void run_cluster(uint64_t cluster) {
  emulator.side = emulator.n_clusters % kSides;
  emulator.turn = emulator.n_clusters / kSides % 2;
  ++emulator.n_clusters;
  emulator.cluster_barrier[emulator.side].n_arrived = 0;
  emulator.n_transfers = 0;
  Block* const blocks = emulator.blocks[emulator.side];
  const unsigned n = emulator.n_blocks;
  for (unsigned rank = 0; rank < n; ++rank) begin_block(blocks[rank], cluster * n + rank);
  set_current_block(blocks[0]);
  do {
    switch_to(emulator.host, take_runnable());
  } while (!emulator.failed && end_a_phase());
  for (unsigned rank = 0; rank < n; ++rank) {
    end_shared(blocks[rank].shared);
    if (!emulator.failed && blocks[rank].n_exited < emulator.n_threads) set_error(describe_deadlock(blocks[rank]));
  }
  for (unsigned rank = 0; emulator.failed && rank < n; ++rank) give_up_threads(blocks[rank]);
}

// 10 * major + minor, an H100's by default.
inline int capability_from_environment() {
  const char* const value = std::getenv("CHARLM_CUDA_EMULATOR_CAPABILITY");
  return value ? std::atoi(value) : 90;
}

inline void check_configuration(const cuda::LaunchOptions& options, const dim3& grid, const dim3& block,
                                int64_t shared_bytes) {
  const auto describe_dim = [](const dim3& dim) { return describe(uint3{dim.x, dim.y, dim.z}); };
  constexpr unsigned kMaxGridX = 2147483647, kMaxGridYZ = 65535, kMaxBlockZ = 64;
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > kMaxGridX || grid.y > kMaxGridYZ || grid.z > kMaxGridYZ) {
    throw Error("invalid launch configuration: a grid of " + describe_dim(grid) + " blocks");
  }
  if (block.x == 0 || block.y == 0 || block.z == 0 || block.x > kMaxThreads || block.y > kMaxThreads ||
      block.z > kMaxBlockZ || uint64_t{block.x} * block.y * block.z > kMaxThreads) {
    throw Error("invalid launch configuration: a block of " + describe_dim(block) + " threads");
  }
  if (shared_bytes < 0 || shared_bytes > int64_t{kMaxShared}) {
    throw Error("invalid launch configuration: " + std::to_string(shared_bytes) + " bytes of dynamic shared memory");
  }
  const unsigned n_blocks = static_cast<unsigned>(options.cluster_blocks);
  if (n_blocks < 1 || n_blocks > kMaxClusterBlocks || grid.x % n_blocks != 0) {
    throw Error("invalid launch configuration: a grid of " + describe_dim(grid) + " blocks in clusters of " +
                std::to_string(options.cluster_blocks));
  }
  if ((n_blocks > 1 || options.is_dependent) && capability_from_environment() < cuda::kSm90) {
    throw Error("invalid launch configuration: LaunchOptions on a GPU of compute capability " +
                std::to_string(capability_from_environment()));
  }
}

inline Schedule schedule_from_environment() {
  const char* const value = std::getenv("CHARLM_CUDA_EMULATOR_SCHEDULE");
  const std::string name = value ? value : "forward";
  if (name == "forward") return Schedule::kForward;
  if (name == "reverse") return Schedule::kReverse;
  if (name == "random") return Schedule::kRandom;
  throw Error("CHARLM_CUDA_EMULATOR_SCHEDULE is forward, reverse or random, not \"" + name + "\"");
}

inline void seed_from_environment() {
  const char* const seed = std::getenv("CHARLM_CUDA_EMULATOR_SEED");
  emulator.random = ((seed ? std::strtoull(seed, nullptr, 10) : 0) + 1) * 0x9E3779B97F4A7C15u | 1;
  for (int i = 0; i < 8; ++i) next_random();
}

inline void place_threads() {
  const uint64_t n_threads = uint64_t{blockDim.x} * blockDim.y * blockDim.z;
  emulator.n_threads = static_cast<unsigned>(n_threads);
  for (Block* blocks : emulator.blocks) {
    for (unsigned rank = 0; rank < emulator.n_blocks; ++rank) {
      blocks[rank].rank = rank;
      for (unsigned i = 0; i < emulator.n_threads; ++i) {
        Thread& thread = blocks[rank].threads[i];
        thread.index = i;
        thread.position = {i % blockDim.x, i / blockDim.x % blockDim.y, i / (blockDim.x * blockDim.y)};
        thread.block = &blocks[rank];
      }
    }
  }
}

// Runs the clusters in the order of the schedule. A random order visits all of them cyclically with a random stride.
inline void run_clusters() {
  const uint64_t n = uint64_t{gridDim.x} * gridDim.y * gridDim.z / emulator.n_blocks;
  uint64_t first = 0, stride = 1;
  if (emulator.schedule == Schedule::kReverse) first = stride = n - 1;
  if (emulator.schedule == Schedule::kRandom && n > 1) {
    first = next_random() % n;
    do {
      stride = next_random() % n;
    } while (std::gcd(stride, n) != 1);
  }
  uint64_t cluster = first;
  for (uint64_t i = 0; i < n && !emulator.failed; ++i, cluster = (cluster + stride) % n) run_cluster(cluster);
}

// Launches may come from any OS thread, and each happens before the next. A program that launches from several threads
// synchronizes them, but possibly in code that ThreadSanitizer does not instrument.
inline void run_grid(const cuda::LaunchOptions& options, dim3 grid, dim3 block, int64_t shared_bytes,
                     void (*kernel)(const void*), const void* arguments) {
  check_configuration(options, grid, block, shared_bytes);
  const std::lock_guard<std::mutex> lock(emulator.mutex);
  emulator.schedule = schedule_from_environment();
  seed_from_environment();
  gridDim = grid;
  blockDim = block;
  emulator.n_blocks = static_cast<unsigned>(options.cluster_blocks);
  place_threads();
  emulator.capability = capability_from_environment();
  emulator.is_dependent = options.is_dependent;
  emulator.kernel = kernel;
  emulator.arguments = arguments;
  emulator.dynamic_bytes = static_cast<size_t>(shared_bytes);
  emulator.host.stack = {};  // of this OS thread; the first CUDA thread sets it
  emulator.host.identity = current_identity();
  emulator.failed = false;
  for (auto& turns : emulator.order) {
    for (SyncObject& order : turns) {
      acquire(order);
      release(order);
    }
  }
  run_clusters();
  for (auto& turns : emulator.order) {
    for (SyncObject& order : turns) acquire(order);
  }
  if (emulator.failed) throw Error("CUDA emulator: " + emulator.error);
}

// Converts an argument to the type of the kernel's parameter, and checks that an integer keeps its value.
template <class Parameter, class Argument>
Parameter convert_argument(const Argument& argument) {
  if constexpr (std::is_integral_v<Parameter> && std::is_integral_v<Argument> && !std::is_same_v<Parameter, bool> &&
                !std::is_same_v<Argument, bool>) {
    if (!std::in_range<Parameter>(argument)) {
      throw Error("a kernel's argument, " + std::to_string(argument) + ", does not fit the type of its parameter");
    }
  }
  return static_cast<Parameter>(argument);
}

}  // namespace charlm::cuda_emulator

namespace charlm::cuda {

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(const LaunchOptions& options, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                          int64_t shared_bytes, cudaStream_t /*stream*/, const Arguments&... arguments) {
  struct Call {
    void (*kernel)(Parameters...);
    std::tuple<Parameters...> arguments;
  };
  const Call call{kernel, {cuda_emulator::convert_argument<Parameters>(arguments)...}};
  const auto run = [](const void* pointer) {
    const Call& call = *static_cast<const Call*>(pointer);
    std::apply(call.kernel, call.arguments);
  };
  cuda_emulator::run_grid(options, grid, block, shared_bytes, run, &call);
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 grid, dim3 block, int64_t shared_bytes,
                          cudaStream_t stream, const Arguments&... arguments) {
  return launch_kernel(LaunchOptions{}, kernel, grid, block, shared_bytes, stream, arguments...);
}

}  // namespace charlm::cuda
