// Allocation of outputs on the CPU, and parallel loops over fixed blocks of rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include "cpu/isa.h"

namespace charlm {

// Allocates an output, in huge pages if it is large and the system grants them: first-touch page faults of ordinary
// pages take longer than the arithmetic (bench/NOTES.md). The memory comes from torch's allocator.
inline at::Tensor new_output(at::IntArrayRef shape, const at::TensorOptions& options) {
  at::Tensor output = at::empty(shape, options);
#ifdef __linux__
  constexpr uintptr_t kPageBytes = 4096;
  constexpr size_t kMinBytes = 4 << 20;  // two huge pages
  if (output.nbytes() >= kMinBytes) {
    const auto begin = reinterpret_cast<uintptr_t>(output.mutable_data_ptr());
    const uintptr_t first = (begin + kPageBytes - 1) / kPageBytes * kPageBytes,
                    last = (begin + output.nbytes()) / kPageBytes * kPageBytes;
    madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE);  // only advice, so a failure is harmless
  }
#endif
  return output;
}

// Blocks of rows. Their size depends only on the work in a row, so that a sum over each block and then over the blocks
// in order has the same bits for any number of threads.
class Blocks {
 public:
  Blocks(int64_t n_rows, int64_t elements_per_row) : n_rows_(n_rows) {
    rows_per_block_ = std::max<int64_t>(1, kBlockElements / std::max<int64_t>(1, elements_per_row));
    if (rows_per_block_ > kRowMultiple) rows_per_block_ -= rows_per_block_ % kRowMultiple;
  }

  int64_t count() const { return (n_rows_ + rows_per_block_ - 1) / rows_per_block_; }

  // Calls worker(block, begin, end) for each block of rows on torch's threads, with one worker per thread.
  template <class MakeWorker>
  void parallel_for_workers(MakeWorker&& make_worker) const {
    at::parallel_for(0, count(), 1, [&](int64_t first, int64_t last) {
      auto worker = make_worker();
      for (int64_t block = first; block < last; block++) {
        worker(block, block * rows_per_block_, std::min(n_rows_, (block + 1) * rows_per_block_));
      }
    });
  }

  template <class F>
  void parallel_for(F&& f) const {
    parallel_for_workers([&] { return [&](int64_t block, int64_t begin, int64_t end) { f(block, begin, end); }; });
  }

  // The sum of worker(begin, end) over the blocks, in order.
  template <class MakeWorker>
  double parallel_sum(MakeWorker&& make_worker) const {
    c10::SmallVector<double, 64> sums(count(), 0.0);
    parallel_for_workers([&] {
      return [&, worker = make_worker()](int64_t block, int64_t begin, int64_t end) mutable {
        sums[block] = worker(begin, end);
      };
    });
    double sum = 0;
    for (const double s : sums) sum += s;
    return sum;
  }

 private:
  // 64 KiB of float: enough work to amortize the start of a thread, and few enough to stay in a second-level cache.
  static constexpr int64_t kBlockElements = 16384;
  static constexpr int64_t kRowMultiple = 16;  // the rows of a tile (cpu/cross_entropy_tiles.h)
  int64_t n_rows_;
  int64_t rows_per_block_;
};

}  // namespace charlm
