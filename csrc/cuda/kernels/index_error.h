// How a kernel says that an index is out of range: it writes nothing for that index and leaves the first such value,
// with its position, in memory that the host can read without waiting. The host raises it later (../device.h).
#pragma once

#include "../../types.h"

namespace charlm::cuda {

// kIndexAtPlace: of the caller's indices, a kernel is given and counts those at one place of the last dimension.
enum class IndexKind : int32_t { kIndex, kTarget, kIndexAtPlace };

// The integer types that indices come in. As int64_t, a uint64 index of 2^63 or more is negative: out of any range.
enum class IndexType : int32_t { kInt8, kInt16, kInt32, kInt64, kUInt8, kUInt16, kUInt32, kUInt64 };

// What an index is checked against, and what its error will say.
struct IndexLimit {
  static constexpr int kMaxDims = 7;

  int64_t limit = 0;  // an index is in [0, limit)
  IndexKind kind = IndexKind::kIndex;
  IndexType type = IndexType::kInt64;
  int32_t n_dims = 0;  // of the tensor of indices as the caller gave it, or 1 if it has more than kMaxDims
  // Its sizes and, in the last place, first(): in a field of its own that would cost the kernels registers.
  int64_t sizes[kMaxDims + 1] = {};

  int64_t& first() { return sizes[kMaxDims]; }  // position of the kernel's first index in that tensor
  int64_t first() const { return sizes[kMaxDims]; }
};

// One for each device, in pinned host memory; all zero until an index is out of range.
struct IndexError {
  int32_t claimed = 0;  // not 0: a thread writes, or has written, what follows
  int32_t ready = 0;    // not 0: it has
  int64_t value = 0;
  int64_t position = 0;  // in a contiguous walk over the kernel's indices
  IndexLimit against;
};

// A tensor of indices as a kernel sees it.
struct Indices {
  const void* data = nullptr;  // [N], contiguous
  IndexLimit against;          // with the type of `data`
  IndexError* error = nullptr;
};

}  // namespace charlm::cuda
