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
  return emulator.started[thread.index / 64] >> thread.index % 64 & 1;
}

// Takes the next runnable thread; null if there is none, or if the kernel has failed.
CHARLM_EMULATOR_CODE inline Thread* take_runnable() {
  constexpr int kWords = kMaxThreads / 64;
  if (emulator.failed) return nullptr;
  const auto take = [](int word, int bit) CHARLM_EMULATOR_CODE {
    emulator.runnable[word] &= ~(uint64_t{1} << bit);
    return &emulator.threads[word * 64 + bit];
  };
  if (emulator.schedule == Schedule::kReverse) {
    for (int word = kWords - 1; word >= 0; --word) {
      if (const uint64_t bits = emulator.runnable[word]) return take(word, 63 - __builtin_clzll(bits));
    }
    return nullptr;
  }
  const unsigned from = emulator.schedule == Schedule::kRandom ? next_random() % emulator.n_threads : 0;
  for (int i = 0; i <= kWords; ++i) {  // cyclically from `from` on: its word is read twice
    const int word = (from / 64 + i) % kWords;
    const uint64_t wanted = i == 0 ? ~uint64_t{0} << from % 64 : ~uint64_t{0};
    if (const uint64_t bits = emulator.runnable[word] & wanted) return take(word, __builtin_ctzll(bits));
  }
  return nullptr;
}

CHARLM_EMULATOR_CODE inline void set_current(Thread& thread) {
  emulator.current = &thread;
  threadIdx = thread.position;
}

CHARLM_EMULATOR_CODE inline void mark_started(Thread& thread) {
  emulator.started[thread.index / 64] |= uint64_t{1} << thread.index % 64;
  thread.context.identity = thread.identity[emulator.side];
}

// Gives a thread that has not run yet a stack. With ThreadSanitizer each thread has its own stack, since a stack that
// several threads use in turn would be reported as a race.
CHARLM_EMULATOR_CODE inline void start(Thread& thread) {
  Stack* stacks = emulator.stacks[emulator.side];
  if (kThreadSanitizer) {
    if (!stacks[thread.index].bottom) stacks[thread.index] = allocate_stack();
    thread.context.stack = stacks[thread.index];
  } else {
    thread.context.stack = emulator.n_free > 0 ? stacks[--emulator.n_free] : allocate_stack();
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
