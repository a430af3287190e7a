// What runs beside the threads on sm_90: bulk copies and messages between the blocks of a cluster, and the barriers
// that count them. A transfer is made as late as the rules allow, so that a kernel that does not wait for it reads old
// bytes: a load or a message when every thread waits and one of them for its barrier, a bulk store when its thread
// waits for it. For ThreadSanitizer a thread's loads and its stores are made by two identities of their own.
#pragma once

#include "collectives.h"
#include "shared_memory.h"

namespace charlm::cuda_emulator {

// Of the transfers that were issued for a barrier and have not been made.
CHARLM_EMULATOR_CODE inline int64_t issued_bytes(const TransferState& barrier) {
  int64_t bytes = 0;
  for (unsigned i = 0; i < emulator.n_transfers; ++i) {
    if (emulator.transfers[i].barrier == &barrier) bytes += emulator.transfers[i].bytes;
  }
  return bytes;
}

inline std::string describe(const TransferState& barrier) {
  return "phase " + std::to_string(barrier.phase) + " of the barrier of " + describe(barrier.location) +
         ", which misses " + std::to_string(barrier.n_missing) + " of " + std::to_string(barrier.n_expected) +
         " arrivals, and " + std::to_string(barrier.expected_bytes - issued_bytes(barrier)) + " of " +
         std::to_string(barrier.expected_bytes) + " bytes";
}

// Begins a function of async.h.
CHARLM_EMULATOR_CODE inline Thread& enter(const char* function, const Location& location) {
  Thread& me = *emulator.current;
  me.function = function;
  me.location = location;
  me.mask = 0;
  if (emulator.capability < cuda::kSm90) {
    fail(describe_wait(me) + " needs sm_90; the GPU has compute capability " + std::to_string(emulator.capability));
  }
  return me;
}

[[noreturn]] CHARLM_EMULATOR_COLD void fail_in(const Thread& me, const std::string& what) {
  fail(describe_wait(me) + ": " + describe(me) + ": " + what);
}

CHARLM_EMULATOR_CODE inline std::string describe_issue(const Transfer& transfer) {
  return std::string(transfer.function) + " at " + describe(transfer.location) + " of " + describe(*transfer.issuer);
}

// ------------------------------------------------------------------------------------------------------------
// transfers

// What sanitizers see of a transfer, when it is issued. The bytes are set to NaN: from now on they may change.
__attribute__((noinline)) inline void touch(void* to, const void* from, unsigned bytes) {
  for (unsigned i = 0; from && i < bytes / 8; ++i) (void)static_cast<const volatile uint64_t*>(from)[i];
  for (unsigned i = 0; to && i < bytes / 4; ++i) static_cast<volatile uint32_t*>(to)[i] = ~uint32_t{0};
}

CHARLM_EMULATOR_CODE inline void make_transfer(const Transfer& transfer) {
  auto* const to = reinterpret_cast<volatile uint32_t*>(transfer.to);
  const auto* const from = transfer.from ? transfer.from : reinterpret_cast<const char*>(&transfer.value);
  for (unsigned i = 0; i < transfer.bytes / 4; ++i) to[i] = reinterpret_cast<const volatile uint32_t*>(from)[i];
}

// Makes the transfers that are `due`, in their order.
template <class Due>
CHARLM_EMULATOR_CODE void make_transfers(Due due) {
  unsigned n_kept = 0;
  for (unsigned i = 0; i < emulator.n_transfers; ++i) {
    Transfer& transfer = emulator.transfers[i];
    if (due(transfer)) {
      make_transfer(transfer);
    } else {
      emulator.transfers[n_kept++] = transfer;
    }
  }
  emulator.n_transfers = n_kept;
}

CHARLM_EMULATOR_CODE inline Transfer& add_transfer(Thread& me, void* to, const void* from, unsigned bytes) {
  if (emulator.n_transfers == Emulator::kMaxTransfers) fail_in(me, "more transfers at a time than the emulator keeps");
  Transfer& transfer = emulator.transfers[emulator.n_transfers++];
  transfer = {};
  transfer.issuer = &me;
  transfer.function = me.function;
  transfer.location = me.location;
  transfer.to = static_cast<char*>(to);
  transfer.from = static_cast<const char*>(from);
  transfer.bytes = bytes;
  return transfer;
}

// The host creates the identity of a thread's transfers, because the creator's actions happen before its own.
CHARLM_EMULATOR_CODE inline void switch_to_transfers(void*& identity) {
  if (!kThreadSanitizer) return;
  switch_identity(emulator.host.identity);
  if (!identity) identity = create_identity();
  switch_identity(identity);
}

// A load, or a message if `from` is null: comes after what its thread did before.
CHARLM_EMULATOR_CODE inline Transfer& issue_load(Thread& me, TransferState& barrier, Block& receiver, void* to,
                                                 const void* from, unsigned bytes) {
  Transfer& transfer = add_transfer(me, to, from, bytes);
  transfer.barrier = &barrier;
  transfer.receiver = &receiver;
  release(me.issued_loads);
  switch_to_transfers(me.loader);
  acquire(me.issued_loads);
  touch(to, from, bytes);
  if (from) release(receiver.fenced_for_bulk);
  release(barrier.order);
  release(emulator.order[emulator.side][emulator.turn]);
  switch_identity(me.identity);
  return transfer;
}

// A store reads what was fenced before, and writes after what its thread did before.
CHARLM_EMULATOR_CODE inline void issue_store(Thread& me, void* to, const void* from, unsigned bytes) {
  add_transfer(me, to, from, bytes).group = me.n_groups;
  release(me.issued_stores);
  switch_to_transfers(me.storer);
  acquire(me.block->fenced_for_bulk);
  touch(nullptr, from, bytes);
  release(me.stores_have_read[me.n_groups % kStoreGroups]);
  acquire(me.issued_stores);
  touch(to, nullptr, bytes);
  release(emulator.order[emulator.side][emulator.turn]);
  switch_identity(me.identity);
}

// --------------------------------------------------------------------------------------------------------------
// barriers

__attribute__((noinline)) inline void write_handle(volatile uint64_t* object, uint64_t handle) { *object = handle; }
__attribute__((noinline)) inline void read_handle(const volatile uint64_t* object) { (void)*object; }

// Null if the barrier is not initialised.
CHARLM_EMULATOR_CODE inline TransferState* find_barrier(Block& block, const uint64_t* object) {
  read_handle(object);
  const uint64_t i = *object - TransferState::kHandle;
  const bool exists = i < block.n_transfer_barriers && block.transfer_barriers[i].object == object;
  return exists ? &block.transfer_barriers[i] : nullptr;
}

CHARLM_EMULATOR_CODE inline TransferState& barrier_of(const Thread& me, const uint64_t* object) {
  TransferState* const barrier = find_barrier(*me.block, object);
  if (!barrier) fail_in(me, "the barrier is not initialised");
  return *barrier;
}

CHARLM_EMULATOR_CODE inline void check_published(const Thread& me, const TransferState& barrier) {
  if (!barrier.is_published) fail_in(me, "no publish_barriers() after init_barrier() at " + describe(barrier.location));
}

CHARLM_EMULATOR_CODE inline void end_phase(Block& block, TransferState& barrier) {
  ++barrier.phase;
  barrier.expected_bytes = 0;
  barrier.n_missing = barrier.n_expected;
  for (unsigned i = 0; barrier.n_waiting > 0 && i < emulator.n_threads; ++i) {
    if (block.threads[i].awaited != &barrier) continue;
    block.threads[i].awaited = nullptr;
    make_runnable(block.threads[i]);
    --barrier.n_waiting;
  }
}

CHARLM_EMULATOR_CODE inline void init(Thread& me, uint64_t* object, int arrivals) {
  Block& block = *me.block;
  if (!shared_address_in(block, object, 8) || reinterpret_cast<uintptr_t>(object) % 8 != 0 || arrivals < 1) {
    fail_in(me, "a barrier is 8 aligned bytes of shared memory, of at least 1 arrival");
  }
  if (const TransferState* const old = find_barrier(block, object)) {
    fail_in(me, "the barrier was initialised before, at " + describe(old->location));
  }
  if (block.n_transfer_barriers == Block::kMaxBarriers) fail_in(me, "more barriers than the emulator keeps");
  write_handle(object, TransferState::kHandle + block.n_transfer_barriers);
  const unsigned n = static_cast<unsigned>(arrivals);
  block.transfer_barriers[block.n_transfer_barriers++] = {object, &me, me.location, false, n, n, 0, 0, 0, {}};
}

CHARLM_EMULATOR_CODE inline void publish(Thread& me) {
  Block& block = *me.block;
  for (unsigned i = 0; i < block.n_transfer_barriers; ++i) {
    if (block.transfer_barriers[i].initializer == &me) block.transfer_barriers[i].is_published = true;
  }
  release(emulator.cluster_barrier[emulator.side].published);
}

CHARLM_EMULATOR_CODE inline void arrive(Thread& me, uint64_t* object, unsigned bytes) {
  TransferState& barrier = barrier_of(me, object);
  if (barrier.n_missing == 0) fail_in(me, "one arrival too many: the last ones were for " + describe(barrier));
  release(barrier.order);
  barrier.expected_bytes += bytes;
  if (--barrier.n_missing == 0 && barrier.expected_bytes == 0 && issued_bytes(barrier) == 0) {
    end_phase(*me.block, barrier);
  }
}

CHARLM_EMULATOR_CODE inline void wait(Thread& me, uint64_t* object, unsigned parity) {
  TransferState& barrier = barrier_of(me, object);
  if (parity > 1) fail_in(me, "parity " + std::to_string(parity));
  if (barrier.phase % 2 == parity) {
    const uint64_t phase = barrier.phase;
    me.awaited = &barrier;
    ++barrier.n_waiting;
    yield();
    if (barrier.phase != phase + 1) {
      fail_in(me, "it may wait for ever: phase " + std::to_string(phase + 1) +
                      " can end before it sees the end of phase " + std::to_string(phase));
    }
  }
  acquire(barrier.order);
}

// Of a copy between shared and global memory.
inline void check_bulk(const Thread& me, const void* shared, const void* global, unsigned bytes) {
  const auto is_aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  if (!is_aligned(shared) || !is_aligned(global) || bytes % 16 != 0 || bytes == 0) {
    fail_in(me, "the addresses and the number of bytes, " + std::to_string(bytes) + ", must be multiples of 16");
  }
  if (!shared_address_in(*me.block, shared, bytes)) fail_in(me, "the bytes are not in one array of shared memory");
}

CHARLM_EMULATOR_CODE inline void load(Thread& me, void* shared, const void* global, unsigned bytes,
                                      const uint64_t* object) {
  TransferState& barrier = barrier_of(me, object);
  check_published(me, barrier);
  issue_load(me, barrier, *me.block, shared, global, bytes);
}

// Makes the stores of the thread's committed groups but the latest `n`.
CHARLM_EMULATOR_CODE inline void wait_stores(Thread& me, unsigned n) {
  make_transfers([&me, n](const Transfer& each) CHARLM_EMULATOR_CODE {
    return !each.barrier && each.issuer == &me && each.group + n < me.n_groups;
  });
  if (me.n_groups > n) acquire(me.stores_have_read[(me.n_groups - n - 1) % kStoreGroups]);
}

// When no thread can run: makes the transfers of one barrier that a thread waits for, and ends its phase. False if
// there is none.
CHARLM_EMULATOR_CODE inline bool end_a_phase() {
  if (emulator.n_transfers == 0) return false;
  const unsigned n = emulator.n_transfers;
  const unsigned first = emulator.schedule == Schedule::kRandom ? next_random() % n : 0;
  for (unsigned i = 0; i < n; ++i) {
    const unsigned which = emulator.schedule == Schedule::kReverse ? n - 1 - i : (first + i) % n;
    const Transfer& transfer = emulator.transfers[which];
    TransferState* const barrier = transfer.barrier;
    if (!barrier || barrier->n_waiting == 0 || barrier->n_missing > 0) continue;
    const int64_t bytes = issued_bytes(*barrier);
    if (bytes < barrier->expected_bytes) continue;
    if (bytes > barrier->expected_bytes) {
      set_error(describe_issue(transfer) + ": more bytes than expected for " + describe(*barrier));
      return false;
    }
    Block& block = *transfer.receiver;
    make_transfers([barrier](const Transfer& each) CHARLM_EMULATOR_CODE { return each.barrier == barrier; });
    end_phase(block, *barrier);
    return true;
  }
  return false;
}

// -------------------------------------------------------------------------------------------------- clusters and
// kernels

CHARLM_EMULATOR_CODE inline void arrive_in_cluster(Thread& me) {
  ClusterBarrier& barrier = emulator.cluster_barrier[emulator.side];
  if (me.is_in_cluster_barrier) fail_in(me, "no wait_for_cluster() after the arrival before");
  me.is_in_cluster_barrier = true;
  me.cluster_phase = barrier.phase;
  if (++barrier.n_arrived < emulator.n_threads * emulator.n_blocks) return;
  barrier.n_arrived = 0;
  ++barrier.phase;
  for (unsigned rank = 0; rank < emulator.n_blocks; ++rank) {
    Block& block = emulator.blocks[emulator.side][rank];
    for (unsigned i = 0; i < emulator.n_threads; ++i) {
      Thread& thread = block.threads[i];
      if (!thread.waits_for_cluster) continue;
      thread.waits_for_cluster = false;
      make_runnable(thread);
    }
  }
}

CHARLM_EMULATOR_CODE inline void wait_for_cluster(Thread& me) {
  ClusterBarrier& barrier = emulator.cluster_barrier[emulator.side];
  if (!me.is_in_cluster_barrier) fail_in(me, "no arrive_in_cluster() before");
  if (barrier.phase == me.cluster_phase) {
    me.waits_for_cluster = true;
    yield();
  }
  me.is_in_cluster_barrier = false;
  me.has_met_cluster = true;
  acquire(barrier.published);
}

CHARLM_EMULATOR_CODE inline void send(Thread& me, void* to, uint64_t value, unsigned bytes, int rank,
                                      const uint64_t* object) {
  if (rank < 0 || rank >= static_cast<int>(emulator.n_blocks)) {
    fail_in(me, "block " + std::to_string(rank) + " of a cluster of " + std::to_string(emulator.n_blocks));
  }
  if (!me.has_met_cluster)
    fail_in(me, "no wait_for_cluster() before: block " + std::to_string(rank) + " may not run yet");
  Block& block = emulator.blocks[emulator.side][rank];
  if (block.n_exited == emulator.n_threads) fail_in(me, "block " + std::to_string(rank) + " has ended");
  char* const there = shared_address_in(block, to, bytes);
  const char* const object_there = shared_address_in(block, object, 8);
  if (!there || !object_there) fail_in(me, "the address is not in shared memory");
  TransferState* const barrier = find_barrier(block, reinterpret_cast<const uint64_t*>(object_there));
  if (!barrier) fail_in(me, "the barrier of block " + std::to_string(rank) + " is not initialised");
  check_published(me, *barrier);
  issue_load(me, *barrier, block, there, nullptr, bytes).value = value;
}

// A thread has returned from the kernel.
CHARLM_EMULATOR_CODE inline void check_transfers_at_exit(const Thread& me) {
  if (me.is_in_cluster_barrier) return set_error(describe(me) + " exited between arriving in its cluster and waiting");
  if (emulator.is_dependent && !me.waited_for_previous) {
    return set_error(describe(me) + " of a dependent kernel exited without wait_for_previous_kernel()");
  }
  for (unsigned i = 0; i < emulator.n_transfers; ++i) {
    const Transfer& transfer = emulator.transfers[i];
    if (!transfer.barrier && transfer.issuer == &me) {
      return set_error(describe_issue(transfer) + ": it exited without waiting until shared memory was read");
    }
    if (transfer.barrier && transfer.receiver == me.block && me.block->n_exited == emulator.n_threads) {
      return set_error(describe_issue(transfer) + ": block " + describe(me.block->position) +
                       " ended without waiting for it");
    }
  }
}

}  // namespace charlm::cuda_emulator
