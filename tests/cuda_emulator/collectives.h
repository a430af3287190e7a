// The operations in which threads wait for each other: barriers of a block, and shuffles, votes, reductions and
// barriers of a warp. Each checks that the right threads take part.
#pragma once

#include <cstring>
#include <type_traits>

#include "scheduler.h"

namespace charlm::cuda_emulator {

using Location = std::source_location;

CHARLM_EMULATOR_CODE inline int current_lane() { return static_cast<int>(emulator.current->index % kWarpSize); }

CHARLM_EMULATOR_CODE inline bool same_place(const Location& a, const Location& b) {
  if (__builtin_memcmp(&a, &b, sizeof(a)) == 0) return true;  // fast path, nearly always taken
  return a.line() == b.line() && a.column() == b.column() && std::strcmp(a.file_name(), b.file_name()) == 0;
}

CHARLM_EMULATOR_COLD void set_barrier_exit_error() {
  const Block& block = *emulator.block;
  set_error(describe_wait(*block.barrier.first) + " in block " + describe(block.position) + ": " +
            std::to_string(block.n_exited) + " of " + std::to_string(emulator.n_threads) +
            " threads have exited without reaching it");
}

[[noreturn]] CHARLM_EMULATOR_COLD void fail_divergent(const char* kind, const Thread& me, const Thread& other) {
  fail(std::string("divergent ") + kind + ": " + describe(me) + " in " + describe_wait(me) + " but " + describe(other) +
       " waits in " + describe_wait(other));
}

[[noreturn]] CHARLM_EMULATOR_COLD void fail_mask(const Thread& me, const std::string& what) {
  fail(std::string(me.function) + " at " + describe(me.location) + ": mask " + describe_mask(me.mask) + " of " +
       describe(me) + " " + what);
}

[[noreturn]] CHARLM_EMULATOR_COLD void fail_source_lane(const Thread& me, const char* function, unsigned mask,
                                                        const Location& location) {
  fail(std::string(function) + " at " + describe(location) + ": " + describe(me) + " reads lane " +
       std::to_string(me.source_lane) + ", which mask " + describe_mask(mask) +
       " does not name: the value is undefined");
}

[[noreturn]] CHARLM_EMULATOR_COLD void fail_width(const char* function, int width, int distance,
                                                  const Location& location) {
  fail(std::string(function) + " at " + describe(location) + ": " + describe(*emulator.current) + " with distance " +
       std::to_string(distance) + " and width " + std::to_string(width) +
       ": the width must be a power of two up to 32, the distance less");
}

CHARLM_EMULATOR_CODE inline void open_barrier_if_all_wait() {
  Block& block = *emulator.block;
  Barrier& barrier = block.barrier;
  const unsigned n_threads = emulator.n_threads;
  if (barrier.n_waiting == 0 || barrier.n_waiting + block.n_exited != n_threads) return;
  if (block.n_exited > 0) return set_barrier_exit_error();
  for (unsigned begin = 0; begin < n_threads; begin += 64) {
    block.runnable[begin / 64] = ~uint64_t{0} >> (n_threads - begin < 64 ? 64 - (n_threads - begin) : 0);
  }
  barrier.n_waiting = 0;
  barrier.phase ^= 1;
}

// Returns the number of threads whose predicate is true.
CHARLM_EMULATOR_CODE inline int wait_for_block(const char* function, bool predicate, const Location& location) {
  Barrier& barrier = emulator.block->barrier;
  Thread& me = *emulator.current;
  me.function = function;
  me.location = location;
  me.mask = 0;
  const unsigned phase = barrier.phase;
  if (barrier.n_waiting == 0) {
    barrier.first = &me;
    barrier.n_true[phase] = 0;
  } else if (barrier.first->function != function || !same_place(barrier.first->location, location)) {
    fail_divergent("barrier", me, *barrier.first);
  }
  ++barrier.n_waiting;
  barrier.n_true[phase] += predicate;
  SyncObject& order = barrier.order[phase];
  release(order);
  open_barrier_if_all_wait();
  yield();
  acquire(order);
  return barrier.n_true[phase];
}

CHARLM_EMULATOR_CODE inline void check_mask(const Thread& me) {
  const Warp& warp = emulator.block->warps[me.index / kWarpSize];
  const unsigned n_lanes = emulator.n_threads - me.index / kWarpSize * kWarpSize;
  if (!(me.mask >> me.index % kWarpSize & 1)) fail_mask(me, "does not name its own lane");
  if (n_lanes < kWarpSize && me.mask >> n_lanes) {
    fail_mask(me, "names lanes that do not exist: the warp has " + std::to_string(n_lanes));
  }
  if (me.mask & warp.exited) fail_mask(me, "names lanes that have exited: " + describe_mask(warp.exited));
  if (const unsigned others = me.mask & warp.waiting) {
    const Thread& other = (&me - me.index % kWarpSize)[__builtin_ctz(others)];
    if (other.function != me.function || other.mask != me.mask || !same_place(other.location, me.location)) {
      fail_divergent("warp collective", me, other);
    }
  }
}

// Waits for the lanes in `mask`. Of the warp functions only __syncwarp() orders the lanes' memory accesses.
CHARLM_EMULATOR_CODE inline void wait_for_warp(const char* function, unsigned mask, bool orders_memory,
                                               void (*combine)(Thread* warp, unsigned lanes),
                                               const Location& location) {
  Thread& me = *emulator.current;
  Warp& warp = emulator.block->warps[me.index / kWarpSize];
  me.function = function;
  me.location = location;
  me.mask = mask;
  check_mask(me);
  warp.waiting |= 1u << me.index % kWarpSize;
  unsigned& phase = warp.phase[__builtin_ctz(mask)];
  SyncObject& order = warp.order[__builtin_ctz(mask)][phase];
  if (orders_memory) release(order);
  if ((mask & ~warp.waiting) == 0) {  // all lanes have arrived
    if (combine) combine(&me - me.index % kWarpSize, mask);
    warp.waiting &= ~mask;
    phase ^= 1;
    emulator.block->runnable[me.index / 64] |= uint64_t{mask} << me.index / kWarpSize % 2 * kWarpSize;
  }
  yield();
  if (orders_memory) acquire(order);
}

// A thread has returned from the kernel: opens a barrier, or reports an error, where other threads wait for it.
CHARLM_EMULATOR_CODE inline void check_exit(const Thread& me) {
  open_barrier_if_all_wait();
  const unsigned lane = me.index % kWarpSize;
  for (unsigned lanes = emulator.block->warps[me.index / kWarpSize].waiting; lanes; lanes &= lanes - 1) {
    const Thread& other = (&me - lane)[__builtin_ctz(lanes)];
    if (other.mask >> lane & 1) {
      return set_error(describe(me) + " exited while " + describe(other) + " waits for it in " + describe_wait(other));
    }
  }
}

// The value of lane `source`, or the caller's own if `own`.
template <class T>
CHARLM_EMULATOR_CODE T shuffle(const char* function, unsigned mask, T value, int source, bool own,
                               const Location& location) {
  static_assert(sizeof(T) <= 16 && std::is_trivially_copyable_v<T>);
  Thread& me = *emulator.current;
  me.source_lane = own ? static_cast<int>(me.index % kWarpSize) : source;
  if (!(mask >> me.source_lane & 1)) fail_source_lane(me, function, mask, location);
  __builtin_memcpy(me.operand, &value, sizeof(T));
  constexpr auto combine = [](Thread* warp, unsigned lanes) CHARLM_EMULATOR_CODE {
    for (; lanes; lanes &= lanes - 1) {
      Thread& lane = warp[__builtin_ctz(lanes)];
      __builtin_memcpy(lane.result, warp[lane.source_lane].operand, sizeof(T));
    }
  };
  wait_for_warp(function, mask, false, combine, location);
  __builtin_memcpy(&value, me.result, sizeof(T));
  return value;
}

// The first lane of the current thread's group of `width` lanes, after a check that the distance stays inside one.
CHARLM_EMULATOR_CODE inline int group_of_lane(const char* function, int width, int distance, const Location& location) {
  if (width < 1 || width > 32 || (width & (width - 1)) != 0 || distance < 0 || distance >= width) {
    fail_width(function, width, distance, location);
  }
  return current_lane() & ~(width - 1);
}

// operation(operation(value of the first lane, value of the second), ...). `operation` keeps no state.
template <class T, class Operation>
CHARLM_EMULATOR_CODE T reduce_warp(const char* function, unsigned mask, T value, Operation, const Location& location) {
  Thread& me = *emulator.current;
  __builtin_memcpy(me.operand, &value, sizeof(T));
  constexpr auto combine = [](Thread* warp, unsigned lanes) CHARLM_EMULATOR_CODE {
    T result{};
    for (unsigned rest = lanes; rest; rest &= rest - 1) {
      T operand;
      __builtin_memcpy(&operand, warp[__builtin_ctz(rest)].operand, sizeof(T));
      result = rest == lanes ? operand : Operation{}(result, operand);
    }
    for (; lanes; lanes &= lanes - 1) __builtin_memcpy(warp[__builtin_ctz(lanes)].result, &result, sizeof(T));
  };
  wait_for_warp(function, mask, false, combine, location);
  __builtin_memcpy(&value, me.result, sizeof(T));
  return value;
}

// The mask of the lanes whose predicate is true.
CHARLM_EMULATOR_CODE inline unsigned vote(const char* function, unsigned mask, bool predicate,
                                          const Location& location) {
  const unsigned mine = unsigned{predicate} << emulator.current->index % kWarpSize;
  return reduce_warp(function, mask, mine, [](unsigned a, unsigned b) { return a | b; }, location);
}

}  // namespace charlm::cuda_emulator

#define CHARLM_HERE const std::source_location& location = std::source_location::current()

inline void __syncthreads(CHARLM_HERE) { charlm::cuda_emulator::wait_for_block("__syncthreads", false, location); }
inline int __syncthreads_count(int predicate, CHARLM_HERE) {
  return charlm::cuda_emulator::wait_for_block("__syncthreads_count", predicate != 0, location);
}
inline int __syncthreads_or(int predicate, CHARLM_HERE) {
  return charlm::cuda_emulator::wait_for_block("__syncthreads_or", predicate != 0, location) != 0;
}
inline int __syncthreads_and(int predicate, CHARLM_HERE) {
  return charlm::cuda_emulator::wait_for_block("__syncthreads_and", predicate == 0, location) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CHARLM_HERE) {
  charlm::cuda_emulator::wait_for_warp("__syncwarp", mask, true, nullptr, location);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, CHARLM_HERE) {
  const int group = charlm::cuda_emulator::group_of_lane("__shfl_sync", width, 0, location);
  return charlm::cuda_emulator::shuffle("__shfl_sync", mask, value, group + (source & (width - 1)), false, location);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance, int width = 32, CHARLM_HERE) {
  const int group = charlm::cuda_emulator::group_of_lane("__shfl_xor_sync", width, distance, location);
  const int source = charlm::cuda_emulator::current_lane() ^ distance;
  return charlm::cuda_emulator::shuffle("__shfl_xor_sync", mask, value, source, source >= group + width, location);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned distance, int width = 32, CHARLM_HERE) {
  const int group =
      charlm::cuda_emulator::group_of_lane("__shfl_down_sync", width, static_cast<int>(distance), location);
  const int source = charlm::cuda_emulator::current_lane() + static_cast<int>(distance);
  return charlm::cuda_emulator::shuffle("__shfl_down_sync", mask, value, source, source >= group + width, location);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned distance, int width = 32, CHARLM_HERE) {
  const int group = charlm::cuda_emulator::group_of_lane("__shfl_up_sync", width, static_cast<int>(distance), location);
  const int source = charlm::cuda_emulator::current_lane() - static_cast<int>(distance);
  return charlm::cuda_emulator::shuffle("__shfl_up_sync", mask, value, source, source < group, location);
}

inline unsigned __ballot_sync(unsigned mask, int predicate, CHARLM_HERE) {
  return charlm::cuda_emulator::vote("__ballot_sync", mask, predicate != 0, location);
}
inline int __any_sync(unsigned mask, int predicate, CHARLM_HERE) {
  return charlm::cuda_emulator::vote("__any_sync", mask, predicate != 0, location) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CHARLM_HERE) {
  return charlm::cuda_emulator::vote("__all_sync", mask, predicate != 0, location) == mask;
}

#define CHARLM_REDUCTION(name, T, expression)                                                                          \
  inline T name(unsigned mask, T value, CHARLM_HERE) {                                                                 \
    return charlm::cuda_emulator::reduce_warp(#name, mask, value, [](T a, T b) -> T { return expression; }, location); \
  }
CHARLM_REDUCTION(__reduce_add_sync, unsigned, a + b)
CHARLM_REDUCTION(__reduce_add_sync, int, static_cast<int>(static_cast<unsigned>(a) + static_cast<unsigned>(b)))
CHARLM_REDUCTION(__reduce_min_sync, unsigned, b < a ? b : a)
CHARLM_REDUCTION(__reduce_min_sync, int, b < a ? b : a)
CHARLM_REDUCTION(__reduce_max_sync, unsigned, a < b ? b : a)
CHARLM_REDUCTION(__reduce_max_sync, int, a < b ? b : a)
CHARLM_REDUCTION(__reduce_and_sync, unsigned, (a & b))
CHARLM_REDUCTION(__reduce_or_sync, unsigned, (a | b))
CHARLM_REDUCTION(__reduce_xor_sync, unsigned, (a ^ b))
#undef CHARLM_REDUCTION
#undef CHARLM_HERE
