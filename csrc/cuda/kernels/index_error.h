// How a kernel says that an index is out of range: it writes nothing for that index and leaves the first such value,
// with its position, in memory that the host can read without waiting. The host raises it later (../device.h).
#pragma once

#include "../../types.h"

namespace charlm::cuda {

// kIndexAtPlace: of the caller's indices, a kernel is given and counts those at one place of the last dimension; which
// one, sizes[n_dims] tells the host. (In a field of its own it would cost the kernels registers.)
enum class IndexKind : int32_t { kIndex, kTarget, kIndexAtPlace };

// The integer types that indices come in. As int64_t, a uint64 index of 2^63 or more is negative: out of any range.
enum class IndexType : int32_t { kInt8, kInt16, kInt32, kInt64, kUInt8, kUInt16, kUInt32, kUInt64 };

// What an index is checked against, and what its error will say.
struct IndexLimit {
  static constexpr int kMaxDims = 8;

  int64_t limit = 0;  // an index is in [0, limit)
  IndexKind kind = IndexKind::kIndex;
  IndexType type = IndexType::kInt64;
  int32_t n_dims = 0;  // of the tensor of indices as the caller gave it, or 1 if it has more than kMaxDims
  int64_t sizes[kMaxDims] = {};
};

// One for each device, in pinned host memory; all zero until an index is out of range.
struct IndexError {
  int32_t claimed = 0;  // not 0: a thread writes, or has written, what follows
  int32_t ready = 0;    // not 0: it has
  int64_t value = 0;
  int64_t position = 0;  // in a contiguous walk over the indices
  IndexLimit against;
};

// A tensor of indices as a kernel sees it.
struct Indices {
  const void* data = nullptr;  // [N], contiguous
  IndexLimit against;          // with the type of `data`
  IndexError* error = nullptr;
};

}  // namespace charlm::cuda
