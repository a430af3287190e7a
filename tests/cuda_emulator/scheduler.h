// Chooses the thread that runs next. A thread runs until it must wait for others, then switches directly to the next
// one; the host resumes when no thread can run.
#pragma once

#include "state.h"

namespace charlm::cuda_emulator {

void run_threads();  // launch.h: where a thread starts

CHARLM_EMULATOR_CODE inline uint64_t next_random() {
  uint64_t& x = emulator.random;
  x ^= x << 13;
  x ^= x >> 7;
  x ^= x << 17;
  return x;
}

CHARLM_EMULATOR_CODE inline bool is_started(const Thread& thread) {
  return thread.block->started[thread.index / 64] >> thread.index % 64 & 1;
}

CHARLM_EMULATOR_CODE inline void make_runnable(Thread& thread) {
  thread.block->runnable[thread.index / 64] |= uint64_t{1} << thread.index % 64;
}

// Takes the next runnable thread of a block; null if there is none.
CHARLM_EMULATOR_CODE inline Thread* take_runnable(Block& block) {
  constexpr int kWords = kMaxThreads / 64;
  const auto take = [&block](int word, int bit) CHARLM_EMULATOR_CODE {
    block.runnable[word] &= ~(uint64_t{1} << bit);
    return &block.threads[word * 64 + bit];
  };
  if (emulator.schedule == Schedule::kReverse) {
    for (int word = kWords - 1; word >= 0; --word) {
      if (const uint64_t bits = block.runnable[word]) return take(word, 63 - __builtin_clzll(bits));
    }
    return nullptr;
  }
  const unsigned from = emulator.schedule == Schedule::kRandom ? next_random() % emulator.n_threads : 0;
  for (int i = 0; i <= kWords; ++i) {  // cyclically from `from` on: its word is read twice
    const int word = (from / 64 + i) % kWords;
    const uint64_t wanted = i == 0 ? ~uint64_t{0} << from % 64 : ~uint64_t{0};
    if (const uint64_t bits = block.runnable[word] & wanted) return take(word, __builtin_ctzll(bits));
  }
  return nullptr;
}

// Takes the next runnable thread; null if there is none, or if the kernel has failed.
CHARLM_EMULATOR_CODE inline Thread* take_runnable() {
  if (emulator.failed) return nullptr;
  Block* const blocks = emulator.blocks[emulator.side];
  const unsigned n = emulator.n_blocks;
  if (n == 1) return take_runnable(*blocks);
  const unsigned first = emulator.schedule == Schedule::kRandom ? next_random() % n : 0;
  for (unsigned i = 0; i < n; ++i) {
    const unsigned rank = emulator.schedule == Schedule::kReverse ? n - 1 - i : (first + i) % n;
    if (Thread* const thread = take_runnable(blocks[rank])) return thread;
  }
  return nullptr;
}

CHARLM_EMULATOR_CODE inline void set_current_block(Block& block) {
  emulator.block = &block;
  blockIdx = block.position;
}

CHARLM_EMULATOR_CODE inline void set_current(Thread& thread) {
  emulator.current = &thread;
  threadIdx = thread.position;
  if (thread.block != emulator.block) set_current_block(*thread.block);
}

CHARLM_EMULATOR_CODE inline void mark_started(Thread& thread) {
  thread.block->started[thread.index / 64] |= uint64_t{1} << thread.index % 64;
  thread.context.identity = thread.identity;
  thread.awaited = nullptr;
  thread.n_groups = 0;
  thread.is_in_cluster_barrier = thread.waits_for_cluster = thread.has_met_cluster = false;
  thread.waited_for_previous = false;
}

// Gives a thread that has not run yet a stack. With ThreadSanitizer each thread has its own stack, since a stack that
// several threads use in turn would be reported as a race.
CHARLM_EMULATOR_CODE inline void start(Thread& thread) {
  if (kThreadSanitizer) {
    if (!thread.own_stack.bottom) thread.own_stack = allocate_stack();
    thread.context.stack = thread.own_stack;
  } else {
    thread.context.stack = emulator.n_free > 0 ? emulator.stacks[--emulator.n_free] : allocate_stack();
  }
  mark_started(thread);
  thread.context.fake_stack = nullptr;
  // Stacks are page-aligned; the offset keeps the threads from sharing a few sets of the cache.
  prepare(thread.context, run_threads, thread.index % 8 * 512);
}

// From a thread or the host to `next`, or to the host if that is null.
CHARLM_EMULATOR_CODE inline void switch_to(Context& from, Thread* next, bool from_ends = false) {
  if (!next) return switch_context(from, emulator.host, from_ends);
  if (!is_started(*next)) start(*next);
  set_current(*next);
  switch_context(from, next->context, from_ends);
}

// Suspends the current thread until it is runnable and the schedule chooses it.
CHARLM_EMULATOR_CODE inline void yield() {
  Thread& me = *emulator.current;
  Thread* const next = take_runnable();
  if (next != &me) switch_to(me.context, next);
}

// Reports an error of the current thread, which never runs again.
[[noreturn]] CHARLM_EMULATOR_CODE inline void fail(const std::string& error) {
  set_error(error);
  for (;;) yield();
}

}  // namespace charlm::cuda_emulator
