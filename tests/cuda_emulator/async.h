// The functions of csrc/cuda/async.cuh, which has their description.
#pragma once

#include "transfers.h"

namespace charlm::cuda {

using TransferBarrier = uint64_t;

#define CHARLM_HERE const std::source_location& location = std::source_location::current()
#define CHARLM_ENTER(function) cuda_emulator::Thread& me = cuda_emulator::enter(function, location)

inline void let_next_kernel_begin(CHARLM_HERE) { cuda_emulator::enter("let_next_kernel_begin", location); }

inline void wait_for_previous_kernel(CHARLM_HERE) {
  CHARLM_ENTER("wait_for_previous_kernel");
  me.waited_for_previous = true;
}

inline void init_barrier(TransferBarrier* barrier, int arrivals, CHARLM_HERE) {
  CHARLM_ENTER("init_barrier");
  cuda_emulator::init(me, barrier, arrivals);
}

inline void publish_barriers(CHARLM_HERE) {
  CHARLM_ENTER("publish_barriers");
  cuda_emulator::publish(me);
}

inline void arrive(TransferBarrier* barrier, CHARLM_HERE) {
  CHARLM_ENTER("arrive");
  cuda_emulator::arrive(me, barrier, 0);
}

inline void expect_bytes(TransferBarrier* barrier, unsigned bytes, CHARLM_HERE) {
  CHARLM_ENTER("expect_bytes");
  cuda_emulator::arrive(me, barrier, bytes);
}

// Suspends the thread until the phase has ended: what is polled takes no turns from the others.
inline bool try_wait_barrier(TransferBarrier* barrier, unsigned parity, CHARLM_HERE) {
  CHARLM_ENTER("try_wait_barrier");
  cuda_emulator::wait(me, barrier, parity);
  return true;
}

inline void wait_barrier(TransferBarrier* barrier, unsigned parity, CHARLM_HERE) {
  CHARLM_ENTER("wait_barrier");
  cuda_emulator::wait(me, barrier, parity);
}

inline void load_bulk(void* shared, const void* global, unsigned bytes, TransferBarrier* barrier, CHARLM_HERE) {
  CHARLM_ENTER("load_bulk");
  cuda_emulator::check_bulk(me, shared, global, bytes);
  cuda_emulator::load(me, shared, global, bytes, barrier);
}

inline void store_bulk(void* global, const void* shared, unsigned bytes, CHARLM_HERE) {
  CHARLM_ENTER("store_bulk");
  cuda_emulator::check_bulk(me, shared, global, bytes);
  cuda_emulator::issue_store(me, global, shared, bytes);
}

inline void fence_shared_for_bulk(CHARLM_HERE) {
  CHARLM_ENTER("fence_shared_for_bulk");
  cuda_emulator::release(me.block->fenced_for_bulk);
}

inline void commit_bulk_stores(CHARLM_HERE) {
  CHARLM_ENTER("commit_bulk_stores");
  ++me.n_groups;
}

template <int kGroups>
void wait_bulk_stores_read(CHARLM_HERE) {
  static_assert(kGroups >= 0);
  CHARLM_ENTER("wait_bulk_stores_read");
  cuda_emulator::wait_stores(me, kGroups);
}

inline int cluster_rank(CHARLM_HERE) {
  CHARLM_ENTER("cluster_rank");
  return static_cast<int>(me.block->rank);
}

inline void arrive_in_cluster(CHARLM_HERE) {
  CHARLM_ENTER("arrive_in_cluster");
  cuda_emulator::arrive_in_cluster(me);
}

inline void wait_for_cluster(CHARLM_HERE) {
  CHARLM_ENTER("wait_for_cluster");
  cuda_emulator::wait_for_cluster(me);
}

template <class C>
void store_in_cluster(C* shared, C value, int rank, TransferBarrier* barrier, CHARLM_HERE) {
  static_assert(sizeof(C) == 4 || sizeof(C) == 8);
  CHARLM_ENTER("store_in_cluster");
  uint64_t bits = 0;
  __builtin_memcpy(&bits, &value, sizeof(C));
  cuda_emulator::send(me, shared, bits, sizeof(C), rank, barrier);
}

#undef CHARLM_ENTER
#undef CHARLM_HERE

}  // namespace charlm::cuda
