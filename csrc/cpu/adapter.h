// What the CPU adapters share: element types seen as the kernels see them, and loops over fixed blocks of rows.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "isa.h"

namespace charlm {

// Calls f.template operator()<T>() with the kernels' type for a floating dtype.
template <class F>
auto with_float_type(at::ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case at::kFloat:
      return f.template operator()<float>();
    case at::kDouble:
      return f.template operator()<double>();
    case at::kBFloat16:
      return f.template operator()<BFloat16>();
    case at::kHalf:
      return f.template operator()<Float16>();
    default:
      TORCH_CHECK_NOT_IMPLEMENTED(false, "\"", op, "\" not implemented for '", dtype, "'");
  }
}

template <class T>
const T* const_data(const at::Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}

template <class T>
T* mutable_data(const at::Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// Blocks of rows whose size depends on nothing but the work in a row. A sum that is made per block, and then over the
// blocks in order, is the same for any number of threads.
class Blocks {
 public:
  Blocks(int64_t n_rows, int64_t elements_per_row)
      : n_rows_(n_rows), rows_per_block_(std::max<int64_t>(1, kElements / std::max<int64_t>(1, elements_per_row))) {}

  int64_t count() const { return (n_rows_ + rows_per_block_ - 1) / rows_per_block_; }

  // Calls f(block, begin, end) for each block of rows, on torch's threads.
  template <class F>
  void parallel_for(F&& f) const {
    at::parallel_for(0, count(), 1, [&](int64_t first, int64_t last) {
      for (int64_t block = first; block < last; block++) {
        f(block, block * rows_per_block_, std::min(n_rows_, (block + 1) * rows_per_block_));
      }
    });
  }

  // The sum of f(begin, end) over the blocks, in their order.
  template <class F>
  double parallel_sum(F&& f) const {
    c10::SmallVector<double, 64> sums(count());
    parallel_for([&](int64_t block, int64_t begin, int64_t end) { sums[block] = f(begin, end); });
    double sum = 0;
    for (const double s : sums) sum += s;
    return sum;
  }

 private:
  // 64 KiB of float: enough that starting a thread costs little, little enough to stay in a second-level cache.
  static constexpr int64_t kElements = 16384;
  int64_t n_rows_;
  int64_t rows_per_block_;
};

}  // namespace charlm
