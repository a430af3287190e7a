// What a kernel does without waiting, and how it waits later: copies between global and shared memory, messages between
// the blocks of a cluster, and the start of the next kernel. Each function is one PTX instruction of sm_90 or later; a
// launch on an older GPU must choose a kernel that calls none of them (Launch::compute_capability), and there they
// trap. tests/cuda_emulator/async.h has the same functions for the CPU.
//
// A transfer barrier (PTX: mbarrier) counts arrivals and bytes. Its phases alternate between parity 0 and 1, beginning
// with 0; a phase ends when all arrivals and all expected bytes have come. The thread that waits sees the bytes.
//
//   if (threadIdx.x == 0) {
//     init_barrier(barrier, 1);
//     publish_barriers();
//   }
//   __syncthreads();
//   if (threadIdx.x == 0) {
//     expect_bytes(barrier, bytes);                // the one arrival
//     load_bulk(shared, global, bytes, barrier);
//   }
//   wait_barrier(barrier, 0);
#pragma once

#include "cuda/cuda.cuh"

#ifdef __CUDACC__

namespace charlm::cuda {
namespace {

#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define CHARLM_SM90(...) asm volatile(__VA_ARGS__)
#else
#define CHARLM_SM90(...) __trap()
#endif

// ---------------------------------------------------------------------------------------------------- dependent launch
// A kernel launched with LaunchOptions::is_dependent may begin before the kernel before it has ended.

// Lets the next kernel begin, once all blocks have called this or ended.
__device__ __forceinline__ void let_next_kernel_begin() {
  CHARLM_SM90("griddepcontrol.launch_dependents;" :: : "memory");
}

// Waits for the end of the kernel before this one, and sees what it wrote. Every thread of a dependent kernel must call
// it: else the kernel after this one could begin too early.
__device__ __forceinline__ void wait_for_previous_kernel() { CHARLM_SM90("griddepcontrol.wait;" :: : "memory"); }

// ----------------------------------------------------------------------------------------------------------- addresses

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

// --------------------------------------------------------------------------------------------------- transfer barriers

using TransferBarrier = uint64_t;  // in shared memory

__device__ __forceinline__ void init_barrier(TransferBarrier* barrier, int arrivals) {
  CHARLM_SM90("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// Makes this thread's init_barrier() calls visible to copies, and to the other blocks of a cluster after its next
// barrier.
__device__ __forceinline__ void publish_barriers() {
  CHARLM_SM90("fence.mbarrier_init.release.cluster;" :: : "memory");
}

__device__ __forceinline__ void arrive(TransferBarrier* barrier) {
  CHARLM_SM90("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Arrives, and makes the current phase wait for as many bytes more.
__device__ __forceinline__ void expect_bytes(TransferBarrier* barrier, unsigned bytes) {
  CHARLM_SM90("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
              "r"(bytes) : "memory");
}

// Whether the phase of that parity has ended. The hardware may wait a while for it.
__device__ __forceinline__ bool try_wait_barrier(TransferBarrier* barrier, unsigned parity) {
  unsigned done = 0;
  CHARLM_SM90(
      "{ .reg .pred p; mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
      : "=r"(done)
      : "r"(shared_address(barrier)), "r"(parity)
      : "memory");
  return done != 0;
}

__device__ __forceinline__ void wait_barrier(TransferBarrier* barrier, unsigned parity) {
  while (!try_wait_barrier(barrier, parity)) {
  }
}

// --------------------------------------------------------------------------------------------------------- bulk copies
// Addresses and `bytes` are multiples of 16.

__device__ __forceinline__ void load_bulk(void* shared, const void* global, unsigned bytes, TransferBarrier* barrier) {
  CHARLM_SM90("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                  shared_address(shared)),
              "l"(__cvta_generic_to_global(global)), "r"(bytes), "r"(shared_address(barrier)) : "memory");
}

// Part of this thread's current group. The threads that wrote `shared` call fence_shared_for_bulk() before a barrier
// with this thread.
__device__ __forceinline__ void store_bulk(void* global, const void* shared, unsigned bytes) {
  CHARLM_SM90("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(__cvta_generic_to_global(global)),
              "r"(shared_address(shared)), "r"(bytes) : "memory");
}

__device__ __forceinline__ void fence_shared_for_bulk() { CHARLM_SM90("fence.proxy.async.shared::cta;" :: : "memory"); }

// Ends this thread's current group of stores.
__device__ __forceinline__ void commit_bulk_stores() { CHARLM_SM90("cp.async.bulk.commit_group;" :: : "memory"); }

// Waits until at most kGroups of this thread's latest groups still read shared memory, which may then be written again.
// Before the block ends, kGroups must be 0.
template <int kGroups>
__device__ __forceinline__ void wait_bulk_stores_read() {
  CHARLM_SM90("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// ------------------------------------------------------------------------------------------------------------ clusters
// The blocks of a cluster run at the same time. LaunchOptions::cluster_blocks is their number.

__device__ __forceinline__ int cluster_rank() {
  unsigned rank = 0;
  CHARLM_SM90("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return static_cast<int>(rank);
}

// A barrier of all threads of a cluster in two halves. It says that all blocks run; it orders no memory but the
// barriers that were published. All threads call each half once.
__device__ __forceinline__ void arrive_in_cluster() {
  CHARLM_SM90("barrier.cluster.arrive.relaxed.aligned;" :: : "memory");
}
__device__ __forceinline__ void wait_for_cluster() {
  CHARLM_SM90("barrier.cluster.wait.acquire.aligned;" :: : "memory");
}

// Stores `value` where block `rank` of the cluster has `shared`, and counts its bytes on that block's `barrier`. No
// block may end before the others have received what they expect from it; sizeof(value) is 4 or 8.
template <class C>
__device__ __forceinline__ void store_in_cluster(C* shared, C value, int rank, TransferBarrier* barrier) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  unsigned address, remote_barrier;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(shared)), "r"(rank));
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(remote_barrier) : "r"(shared_address(barrier)), "r"(rank));
  if constexpr (sizeof(C) == 4) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b32 [%0], %1, [%2];" ::"r"(address),
                 "r"(__builtin_bit_cast(unsigned, value)), "r"(remote_barrier)
                 : "memory");
  } else {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.b64 [%0], %1, [%2];" ::"r"(address),
                 "l"(__builtin_bit_cast(unsigned long long, value)), "r"(remote_barrier)
                 : "memory");
  }
#else
  __trap();
#endif
}

#undef CHARLM_SM90

}  // namespace
}  // namespace charlm::cuda

#endif
