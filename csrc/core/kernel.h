// What every kernel receives, on every device: element types, indices and the place where it runs. No torch header: CPU
// kernels are compiled once per instruction set, and GPU kernels by nvcc.
#pragma once

#include <stdint.h>

struct CUstream_st;

namespace charlm {

// --------------------------------------------------------------------------------------------------- element types
// The half types are bare bits, so that no kernel needs a torch header: arithmetic is in Compute<T>, and each result is
// rounded once, when it is stored.

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

template <class T>
struct ComputeType {
  using type = float;
};

template <>
struct ComputeType<double> {
  using type = double;
};

template <class T>
using Compute = typename ComputeType<T>::type;

// --------------------------------------------------------------------------------------------------------- indices
// How a GPU kernel reports an index out of range: it reads nothing for that index, gives 0 as its result, and records
// the first such value and its position in memory that the host can read without waiting. The host raises it later
// (core/device.h).

// What a kernel's indices are. kIndexAtPlace (embedding_linear): one column of the caller's indices [..., T]; the
// kernel counts positions in that column.
enum class IndexKind : int32_t { kIndex, kTarget, kIndexAtPlace };

// The integer types that indices come in. As int64_t, a uint64 index of 2^63 or more is negative: out of any range.
enum class IndexType : int32_t { kInt8, kInt16, kInt32, kInt64, kUInt8, kUInt16, kUInt32, kUInt64 };

// What an index is checked against, and what its error shows.
struct IndexLimit {
  static constexpr int kMaxDims = 7;

  int64_t limit = 0;  // an index is in [0, limit)
  IndexKind kind = IndexKind::kIndex;
  IndexType type = IndexType::kInt64;
  int32_t n_dims = 0;  // of the tensor of indices as the caller gave it, or 1 if it has more than kMaxDims
  // The sizes of that tensor. first() is kept in the last element, because a separate field costs the kernels
  // registers.
  int64_t sizes[kMaxDims + 1] = {};

  int64_t& first() { return sizes[kMaxDims]; }  // position of the kernel's first index in that tensor
  int64_t first() const { return sizes[kMaxDims]; }
};

// One for each device, in pinned host memory; all zero until an index is out of range.
struct IndexError {
  int32_t claimed = 0;  // not 0: a thread writes, or has written, what follows
  int32_t ready = 0;    // not 0: it has
  int64_t value = 0;
  int64_t position = 0;  // among the kernel's indices
  IndexLimit against;
};

// A tensor of indices as a kernel sees it.
struct Indices {
  const void* data = nullptr;   // [N], contiguous
  IndexLimit against;           // GPU; with the type of `data`
  IndexError* error = nullptr;  // GPU

  const int64_t* as_int64() const { return static_cast<const int64_t*>(data); }
};

// ---------------------------------------------------------------------------------------------------------- launch

using Stream = CUstream_st*;  // cudaStream_t

// Where a kernel runs, its scratch memory, and what it reports. On the CPU one call handles the rows [begin, end) on
// the calling thread; on a GPU one call launches the work for all rows on `stream`.
struct Launch {
  int64_t begin = 0, end = 0;  // CPU
  void* scratch = nullptr;     // CPU: one row of numbers in the compute type, for kernels that request it
  double sum = 0;              // CPU, output of kernels that reduce: the sum over these rows
  double largest = 0;          // CPU, output of kl_div's forward: the largest input, at least 0
  int64_t first_bad = -1;      // CPU, output of embedding's forward: position of the first index out of range, or -1

  Stream stream = nullptr;       // GPU
  void* workspace = nullptr;     // GPU: device memory, for kernels that request it
  int64_t max_shared_bytes = 0;  // GPU: shared memory that one block can have
  int compute_capability = 0;    // GPU: 10 * major + minor, 90 for an H100
};

// Returns 0, or CUDA's error code.
template <class Params>
using Kernel = int (*)(const Params&, Launch&);

}  // namespace charlm
