// The kernels that defects.cpp runs: some with one seeded defect each, and correct ones. They are written like the
// kernels of csrc/cuda, and have defects that those could have.
#pragma once

#include <cmath>

#include "cuda/async.cuh"

namespace charlm::cuda {
namespace {

constexpr int kThreads = 64;
constexpr int kNumbers = 2 * kThreads + 2;  // in `out`, the buffer of every kernel; NaN at first
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ __forceinline__ int global_thread() { return static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x); }

// ---- defects that the emulator itself reports

__global__ void barrier_in_branch(float* out) {
  if (threadIdx.x < 32) __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void different_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
    out[threadIdx.x] = 1;
  } else {
    __syncthreads();
    out[threadIdx.x] = 2;
  }
}

__global__ void exit_before_barrier(float* out, int n) {
  if (static_cast<int>(threadIdx.x) >= n) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void barrier_in_loop_of_thread_length(float* out) {
  for (unsigned i = threadIdx.x; i < kNumbers - 1; i += blockDim.x) {
    out[i] = 1;
    __syncthreads();
  }
}

__global__ void barriers_of_warp_and_block(float* out) {
  if (threadIdx.x % 32 < 16) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  out[threadIdx.x] = 1;
}

__global__ void shuffle_in_branch(float* out) {
  float value = 1;
  if (threadIdx.x % 32 < 20) value += __shfl_xor_sync(kAllLanes, value, 1);
  out[threadIdx.x] = value;
}

__global__ void shuffle_from_lane_outside_mask(float* out) {
  float value = 1;
  if (threadIdx.x % 32 < 16) value += __shfl_down_sync(0x0000ffffu, value, 8);
  out[threadIdx.x] = value;
}

__global__ void shuffle_without_own_lane(float* out) { out[threadIdx.x] = __shfl_sync(0x7fffffffu, 1.0f, 0); }

__global__ void shuffle_in_partial_warp(float* out) { out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1.0f, 16); }

__global__ void shuffle_past_its_width(float* out) {
  float value = 1;
  for (int distance = 16; distance > 0; distance /= 2) value += __shfl_xor_sync(kAllLanes, value, distance, 16);
  out[threadIdx.x] = value;
}

__global__ void different_masks(float* out) {
  const unsigned mask = threadIdx.x % 32 < 16 ? 0x0000ffffu : kAllLanes;
  out[threadIdx.x] = static_cast<float>(__ballot_sync(mask, 1));
}

__global__ void too_much_static_shared(float* out) {
  CHARLM_SHARED(float, buffer, 12289);
  buffer[threadIdx.x] = 1;
  out[threadIdx.x] = buffer[threadIdx.x];
}

__global__ void static_beside_dynamic_shared(float* out) {
  CHARLM_SHARED(float, buffer, 4097);
  buffer[threadIdx.x] = 1;
  out[threadIdx.x] = buffer[threadIdx.x];
}

__global__ void fill(float* out, int n) {
  if (global_thread() < n) out[global_thread()] = 1;
}

// ---- defects that AddressSanitizer and UndefinedBehaviorSanitizer report

__global__ void write_past_end(float* out, int n) {
  if (global_thread() <= n) out[global_thread()] = 1;
}

__global__ void vector_load_past_end(float* out, int n) {
  const int i = 4 * static_cast<int>(threadIdx.x);
  if (i < n) out[threadIdx.x] = __ldg(reinterpret_cast<const float4*>(out + i)).x;
}

__global__ void vector_store_past_end(float* out, int n) {
  const int i = 4 * static_cast<int>(threadIdx.x);
  if (i < n) __stcs(reinterpret_cast<float4*>(out + i), make_float4(1, 1, 1, 1));
}

__global__ void vector_load_misaligned(float* out) {
  const float4 v = *reinterpret_cast<const float4*>(out + 1 + 4 * threadIdx.x);
  out[threadIdx.x] = v.x;
}

__global__ void vector_store_misaligned(float* out) {  // rows of 5 numbers
  *reinterpret_cast<uint4*>(out + 5 * threadIdx.x) = make_uint4(0, 0, 0, 0);
}

__global__ void vector_load_from_scalar_shared(float* out) {
  CHARLM_SHARED(float, buffer, kThreads);
  buffer[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = reinterpret_cast<const float4*>(buffer)[threadIdx.x / 4].x;
}

__global__ void shared_past_end(float* out) {
  CHARLM_SHARED(float, buffer, kThreads);
  buffer[threadIdx.x + 1] = 0;
  out[threadIdx.x] = 0;
}

__global__ void shared_past_end_by_pointer(float* out) {
  CHARLM_SHARED(float, buffer, kThreads);
  float* const mine = buffer + threadIdx.x;
  mine[1] = 0;
  out[threadIdx.x] = 0;
}

__global__ void dynamic_shared_past_end(float* out) {
  CHARLM_DYNAMIC_SHARED(float, buffer);
  buffer[threadIdx.x + 1] = 0;
  out[threadIdx.x] = 0;
}

__global__ void local_array_past_end(float* out) {
  float values[4] = {};
  for (unsigned i = 0; i <= threadIdx.x % 5; ++i) values[i] = 1;
  out[threadIdx.x] = values[0];
}

__global__ void offset_of_32_bits(float* out, int row_stride) {
  const int row = static_cast<int>(2 * blockIdx.x);
  out[row * row_stride] = 1;
}

// ---- defects that ThreadSanitizer reports; some also give a wrong result, under some schedules

__global__ void missing_barrier(float* out) {
  CHARLM_SHARED(float, buffer, kThreads);
  buffer[threadIdx.x] = 1;
  out[global_thread()] = buffer[(threadIdx.x + 33) % kThreads];
}

__global__ void reduction_buffer_reused(float* out) {
  CHARLM_SHARED(float, buffer, kThreads / 32);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = static_cast<float>(round);
    __syncthreads();
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += buffer[warp];
  }
  out[global_thread()] = sum;
}

__global__ void implicit_warp_synchrony(float* out) {
  CHARLM_SHARED(float, buffer, kThreads);
  buffer[threadIdx.x] = 1;
  (void)__shfl_xor_sync(kAllLanes, 1.0f, 1);
  out[global_thread()] = buffer[threadIdx.x ^ 1];
}

__global__ void warp_barrier_for_block(float* out) {
  CHARLM_SHARED(float, buffer, kThreads);
  buffer[threadIdx.x] = 1;
  __syncwarp();
  out[global_thread()] = buffer[(threadIdx.x + 32) % kThreads];
}

__global__ void warps_race_in_global_memory(float* out) {
  out[threadIdx.x] = 1;
  out[kThreads + threadIdx.x] = out[(threadIdx.x + 32) % kThreads];
}

__global__ void plain_add_in_block(float* out) { out[0] += 1; }

__global__ void plain_add_between_blocks(float* out) { out[threadIdx.x] += 1; }

__global__ void plain_store_beside_atomic(float* out) {
  if (threadIdx.x == 0) {
    out[0] = 0;
  } else {
    atomicAdd(out, 1.0f);
  }
}

__global__ void overlapping_vector_stores(float* out) {
  reinterpret_cast<float4*>(out)[threadIdx.x / 2] = make_float4(1, 1, 1, 1);
}

// Each block writes a number, and the last block to finish adds them up. `out`: [0] the bits of the ticket, [1] the
// sum, [2 + b] the number of block b.
template <bool kFence>
__global__ void last_block_sums(float* out) {
  unsigned* const ticket = reinterpret_cast<unsigned*>(out);
  if (threadIdx.x != 0) return;
  out[2 + blockIdx.x] = 1;
  if (kFence) __threadfence();
  if (atomicAdd(ticket, 1u) != gridDim.x - 1) return;
  if (kFence) __threadfence();
  float sum = 0;
  for (unsigned b = 0; b < gridDim.x; ++b) sum += out[2 + b];
  out[1] = sum;
}

// ---- defects that only a wrong result shows

__global__ void shared_never_written(float* out) {
  CHARLM_SHARED(float, buffer, kThreads);
  if (threadIdx.x < kThreads - 1) buffer[threadIdx.x] = 1;
  __syncthreads();
  out[global_thread()] = buffer[threadIdx.x];
}

__global__ void missing_tail(float* out, int n) {
  const int i = 4 * global_thread();
  if (i + 4 <= n) *reinterpret_cast<float4*>(out + i) = make_float4(1, 1, 1, 1);
}

// ---- transfers: one correct kernel, and the same without one of its steps

enum class Step {
  kNone,
  kInit,
  kPublish,
  kExpectLess,
  kExpectMore,
  kWaitLoaded,
  kWaitLoadedInSomeThreads,
  kParity,
  kWaitStored,
  kWaitLastStored,
  kFence,
};

constexpr int kChunk = 32, kChunks = 2 * kThreads / kChunk, kStages = 2;
constexpr unsigned kChunkBytes = kChunk * sizeof(float);

// out[i] = in[i] + 1, for 2 * kThreads numbers: loaded and stored by bulk copies, in chunks.
template <Step kOmitted>
__device__ __forceinline__ void add_one_in_chunks(float* out, const float* in) {
  CHARLM_SHARED(float4, ring, kStages * kChunk / 4);
  CHARLM_SHARED(TransferBarrier, loaded, kStages);
  const bool is_first = threadIdx.x == 0;
  const auto stage_of = [&](int chunk) { return reinterpret_cast<float*>(ring) + chunk % kStages * kChunk; };
  const auto load = [&](int chunk) {
    constexpr unsigned kBytes =
        kChunkBytes + (kOmitted == Step::kExpectMore) * 16 - (kOmitted == Step::kExpectLess) * 16;
    expect_bytes(loaded + chunk % kStages, kBytes);
    load_bulk(stage_of(chunk), in + chunk * kChunk, kChunkBytes, loaded + chunk % kStages);
  };
  if (is_first) {
    for (int i = 0; kOmitted != Step::kInit && i < kStages; ++i) init_barrier(loaded + i, 1);
    if (kOmitted != Step::kPublish) publish_barriers();
  }
  __syncthreads();
  if (is_first) load(0);
  for (int chunk = 0; chunk < kChunks; ++chunk) {
    if (is_first && chunk + 1 < kChunks) {
      if (kOmitted != Step::kWaitStored) wait_bulk_stores_read<0>();
      load(chunk + 1);
    }
    const unsigned parity = kOmitted == Step::kParity ? chunk % 2 : chunk / kStages % 2;
    if (kOmitted != Step::kWaitLoaded && (kOmitted != Step::kWaitLoadedInSomeThreads || threadIdx.x < kChunk / 2)) {
      wait_barrier(loaded + chunk % kStages, parity);
    }
    if (threadIdx.x < kChunk) stage_of(chunk)[threadIdx.x] += 1;
    if (kOmitted != Step::kFence) fence_shared_for_bulk();
    __syncthreads();
    if (is_first) {
      store_bulk(out + chunk * kChunk, stage_of(chunk), kChunkBytes);
      commit_bulk_stores();
    }
  }
  if (is_first && kOmitted != Step::kWaitLastStored) wait_bulk_stores_read<0>();
}

#define CHARLM_KERNEL(name, omitted) \
  __global__ void name(float* out, const float* in) { add_one_in_chunks<Step::omitted>(out, in); }
CHARLM_KERNEL(correct_transfers, kNone)
CHARLM_KERNEL(transfer_barrier_not_initialised, kInit)
CHARLM_KERNEL(transfer_barrier_not_published, kPublish)
CHARLM_KERNEL(too_few_bytes_expected, kExpectLess)
CHARLM_KERNEL(too_many_bytes_expected, kExpectMore)
CHARLM_KERNEL(load_never_awaited, kWaitLoaded)
CHARLM_KERNEL(load_awaited_by_some_threads, kWaitLoadedInSomeThreads)
CHARLM_KERNEL(wrong_parity, kParity)
CHARLM_KERNEL(stage_loaded_before_it_is_stored, kWaitStored)
CHARLM_KERNEL(exit_before_stores_have_read, kWaitLastStored)
CHARLM_KERNEL(stores_not_fenced, kFence)
#undef CHARLM_KERNEL

__global__ void arrival_too_many(float* out) {
  CHARLM_SHARED(TransferBarrier, barrier, 1);
  if (threadIdx.x == 0) init_barrier(barrier, kThreads - 1);
  __syncthreads();
  expect_bytes(barrier, 16);
  out[threadIdx.x] = 1;
}

__global__ void bulk_of_20_bytes(float* out, const float* in) {
  CHARLM_SHARED(float4, buffer, 2);
  CHARLM_SHARED(TransferBarrier, barrier, 1);
  if (threadIdx.x == 0) {
    init_barrier(barrier, 1);
    publish_barriers();
    expect_bytes(barrier, 20);
    load_bulk(buffer, in, 20, barrier);
    wait_barrier(barrier, 0);
  }
  out[threadIdx.x] = 1;
}

__global__ void bulk_store_past_end(float* out) {
  CHARLM_SHARED(float4, buffer, 1);
  if (threadIdx.x == 0) {
    buffer[0] = make_float4(1, 1, 1, 1);
    fence_shared_for_bulk();
    store_bulk(out + 2 * kThreads, buffer, 16);
    commit_bulk_stores();
    wait_bulk_stores_read<0>();
  }
}

__global__ void bulk_load_past_end(float* out) {
  CHARLM_SHARED(float4, buffer, 1);
  CHARLM_SHARED(TransferBarrier, barrier, 1);
  if (threadIdx.x == 0) {
    init_barrier(barrier, 1);
    publish_barriers();
    expect_bytes(barrier, 16);
    load_bulk(buffer, out + 2 * kThreads, 16, barrier);
    wait_barrier(barrier, 0);
  }
}

// Each block sends its share to each block, which adds up what it received.
template <Step kOmitted>
__device__ __forceinline__ void add_in_cluster(float* out) {
  constexpr int kBlocks = 4;
  CHARLM_SHARED(float, shares, kBlocks);
  CHARLM_SHARED(TransferBarrier, received, 1);
  if (threadIdx.x == 0) {
    init_barrier(received, 1);
    publish_barriers();
    expect_bytes(received, kBlocks * sizeof(float));
  }
  __syncthreads();
  if (kOmitted != Step::kPublish) arrive_in_cluster();
  if (kOmitted != Step::kPublish) wait_for_cluster();
  const int rank = cluster_rank();
  if (threadIdx.x < kBlocks) {
    store_in_cluster(shares + rank, (rank + 1) / 10.0f, static_cast<int>(threadIdx.x), received);
  }
  if (kOmitted != Step::kWaitLoaded) wait_barrier(received, 0);
  float sum = 0;
  for (int block = 0; block < kBlocks; ++block) sum += shares[block];
  if (threadIdx.x < kThreads / 2) out[blockIdx.x * (kThreads / 2) + threadIdx.x] = sum;
}

__global__ void correct_cluster(float* out) { add_in_cluster<Step::kNone>(out); }
__global__ void message_before_meeting(float* out) { add_in_cluster<Step::kPublish>(out); }
__global__ void exit_before_message(float* out) { add_in_cluster<Step::kWaitLoaded>(out); }

__global__ void correct_dependent_kernel(float* out) {
  let_next_kernel_begin();
  wait_for_previous_kernel();
  out[global_thread()] = 1;
}

__global__ void previous_kernel_not_awaited(float* out) {
  if (threadIdx.x > 0) wait_for_previous_kernel();
  out[global_thread()] = 1;
}

// ---- correct kernels

__global__ void correct_atomics(float* out) { atomicAdd(out + threadIdx.x % 8, 1.0f); }

__global__ void correct_warp_exchange(float* out) {
  CHARLM_SHARED(float, buffer, kThreads);
  buffer[threadIdx.x] = 1;
  __syncwarp();
  out[global_thread()] = buffer[threadIdx.x ^ 1];
}

__global__ void correct_block_reduction(float* out) {
  CHARLM_SHARED(float, buffer, kThreads / 32);
  float sum = 0;
  for (int round = 0; round < 3; ++round) {
    float value = static_cast<float>(round) / kThreads;
    for (int distance = 16; distance > 0; distance /= 2) value += __shfl_down_sync(kAllLanes, value, distance);
    if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = value;
    __syncthreads();
    for (int warp = 0; warp < kThreads / 32; ++warp) sum += buffer[warp];
    __syncthreads();
  }
  out[global_thread()] = sum / 3;
}

__global__ void correct_vectors_with_head_and_tail(float* out, int begin, int n) {  // out[begin, begin + n)
  const int head = (4 - begin % 4) % 4;
  const int i = global_thread();
  if (i < head) out[begin + i] = 1;
  if (i < (n - head) / 4) __stcs(reinterpret_cast<float4*>(out + begin + head) + i, make_float4(1, 1, 1, 1));
  if (i < (n - head) % 4) out[begin + n - 1 - i] = 1;
}

__global__ void correct_dynamic_shared(float* out, int n) {
  CHARLM_DYNAMIC_SHARED(float4, buffer);
  for (int i = static_cast<int>(threadIdx.x); i < n; i += kThreads) buffer[i] = make_float4(1, 0, 0, 0);
  __syncthreads();
  out[global_thread()] = buffer[n - 1 - threadIdx.x].x;
}

__global__ void correct_groups_of_lanes(float* out) {  // 8 lanes sum 8 numbers, one group at a time
  const unsigned mask = 0xffu << threadIdx.x % 32 / 8 * 8;
  float sum = 0.125f;
  for (int distance = 4; distance > 0; distance /= 2) sum += __shfl_xor_sync(mask, sum, distance, 8);
  out[global_thread()] = sum;
}

__global__ void correct_positions(float* out) {  // 3-dimensional blocks in a 3-dimensional grid
  const unsigned block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const unsigned thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  out[block * blockDim.x * blockDim.y * blockDim.z + thread] = 1;
}

// Each line is true in every thread.
__global__ void correct_functions(float* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned odd = 0xaaaaaaaau;
  int* const ints = reinterpret_cast<int*>(out) + kThreads;
  const bool facts[] = {
      __shfl_sync(kAllLanes, lane, 5) == 5,
      __shfl_sync(kAllLanes, lane, 5, 8) == lane / 8 * 8 + 5,
      __shfl_sync(kAllLanes, lane, lane + 1) == (lane + 1) % 32,
      __shfl_xor_sync(kAllLanes, static_cast<double>(lane), 3) == (lane ^ 3),
      __shfl_down_sync(kAllLanes, lane, 2) == (lane < 30 ? lane + 2 : lane),
      __shfl_down_sync(kAllLanes, lane, 2, 4) == (lane % 4 < 2 ? lane + 2 : lane),
      __shfl_up_sync(kAllLanes, lane, 1) == (lane > 0 ? lane - 1 : 0),
      __ballot_sync(kAllLanes, lane % 2) == odd,
      __any_sync(kAllLanes, lane == 7) == 1 && __any_sync(kAllLanes, 0) == 0,
      __all_sync(kAllLanes, 1) == 1 && __all_sync(kAllLanes, lane != 7) == 0,
      __reduce_add_sync(kAllLanes, lane) == 496 && __reduce_add_sync(kAllLanes, 1u) == 32,
      __reduce_min_sync(kAllLanes, -lane) == -31 && __reduce_max_sync(kAllLanes, 7u + lane) == 38,
      __reduce_and_sync(kAllLanes, 1u << lane) == 0 && __reduce_or_sync(kAllLanes, 1u << lane) == kAllLanes,
      __reduce_xor_sync(kAllLanes, 1u << lane % 31) == 0x7ffffffeu,
      __syncthreads_count(lane == 3) == kThreads / 32,
      __syncthreads_or(threadIdx.x == 9) == 1 && __syncthreads_or(0) == 0,
      __syncthreads_and(1) == 1 && __syncthreads_and(threadIdx.x != 9) == 0,
      __popc(odd) == 16 && __ffs(8) == 4 && __ffs(0) == 0 && __clz(1) == 31 && __clz(0) == 32,
      __umulhi(0x80000000u, 6) == 3 && __float_as_uint(1.0f) == 0x3f800000u && __int_as_float(0x40000000) == 2,
      min(3, 4) == 3 && max(3u, 4u) == 4 && max(1.0f, NAN) == 1 && rsqrtf(4.0f) == 0.5f && exp2f(3.0f) == 8,
      __fmaf_rn(2, 3, 4) == 10 && __ldg(&warpSize) == 32,
  };
  if (threadIdx.x == 0) *ints = 0;
  __syncthreads();
  atomicMax(ints, lane);
  __syncthreads();
  bool all = *ints == 31;
  for (bool fact : facts) all = all && fact;
  out[threadIdx.x] = all;
}

}  // namespace
}  // namespace charlm::cuda
