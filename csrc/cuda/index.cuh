// Reading indices of any integer type, and recording one that is out of range.
#pragma once

#include "cuda/cuda.cuh"

namespace charlm::cuda {
namespace {

// Calls use(indices as a pointer to their type).
template <class Use>
__device__ __forceinline__ void with_index_type(const Indices& indices, Use use) {
  switch (indices.against.type) {  // the same for all threads
    case IndexType::kInt8:
      return use(static_cast<const int8_t*>(indices.data));
    case IndexType::kInt16:
      return use(static_cast<const int16_t*>(indices.data));
    case IndexType::kInt32:
      return use(static_cast<const int32_t*>(indices.data));
    case IndexType::kUInt8:
      return use(static_cast<const uint8_t*>(indices.data));
    case IndexType::kUInt16:
      return use(static_cast<const uint16_t*>(indices.data));
    case IndexType::kUInt32:
      return use(static_cast<const uint32_t*>(indices.data));
    default:
      return use(static_cast<const int64_t*>(indices.data));
  }
}

__device__ __forceinline__ int64_t load_index(const Indices& indices, int64_t n) {
  int64_t index;
  with_index_type(indices, [&](const auto* data) { index = data[n]; });
  return index;
}

// index[k] = that at n + k * step, 0 from `end` on. All are loaded before the first is widened: a loop over
// load_index() would wait for each of them in its branch.
template <int kCount>
__device__ __forceinline__ void load_indices(const Indices& indices, int64_t n, int64_t step, int64_t end,
                                             int64_t (&index)[kCount]) {
  with_index_type(indices, [&](const auto* data) {
#pragma unroll
    for (int k = 0; k < kCount; k++) index[k] = n + k * step < end ? data[n + k * step] : 0;
  });
}

__device__ __forceinline__ bool in_range(const Indices& indices, int64_t index) {
  return static_cast<uint64_t>(index) < static_cast<uint64_t>(indices.against.limit);
}

// The first thread of the device to come here writes; the others' indices are as bad, and one is enough.
__device__ inline void record_index_error(const Indices& indices, int64_t position, int64_t index) {
  IndexError* const error = indices.error;
  if (atomicCAS(&error->claimed, 0, 1) != 0) return;
  error->value = index;
  error->position = position;
  error->against = indices.against;
  __threadfence_system();  // the host reads the rest only after it has seen this:
  *static_cast<volatile int32_t*>(&error->ready) = 1;
}

// An index out of range that a thread met in a loop, to be recorded after it: one copy of the code, fewer registers.
struct BadIndex {
  int64_t position = -1;
  int64_t index = 0;

  // Whether `index` is in range.
  __device__ __forceinline__ bool check(const Indices& indices, int64_t at, int64_t found) {
    if (in_range(indices, found)) return true;
    position = at;
    index = found;
    return false;
  }

  __device__ __forceinline__ void record(const Indices& indices) const {
    if (position >= 0) record_index_error(indices, position, index);
  }
};

}  // namespace
}  // namespace charlm::cuda
