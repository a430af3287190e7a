// Whether tensors that are written can share memory with themselves or with others, from sizes and strides alone.
#pragma once

#include <ATen/core/Tensor.h>

#include <algorithm>
#include <utility>
#include <vector>

namespace charlm {

// Whether no two elements can share an address, as far as sizes and strides prove it: sorted by stride, each dimension
// steps over all that the smaller ones reach.
inline bool is_provably_without_overlap(const at::Tensor& t) {
  std::vector<std::pair<int64_t, int64_t>> dims;  // (stride, size)
  for (int64_t d = 0; d < t.dim(); d++) {
    if (t.size(d) > 1) dims.emplace_back(t.stride(d), t.size(d));
  }
  std::sort(dims.begin(), dims.end());
  int64_t reach = 0;  // offset of the last element of the smaller dimensions
  for (const auto& [stride, size] : dims) {
    if (stride <= reach) return false;
    reach += stride * (size - 1);
  }
  return true;
}

// The bytes that a tensor touches: runs of `extent` bytes, one every `step` bytes along the dimension of the largest
// stride; `whole` bytes from the first to the last.
struct Footprint {
  explicit Footprint(const at::Tensor& t) : begin(reinterpret_cast<intptr_t>(t.const_data_ptr())) {
    int64_t outer = -1, last = 0;
    for (int64_t d = 0; d < t.dim(); d++) {
      last += t.stride(d) * (t.size(d) - 1);
      if (t.size(d) > 1 && (outer < 0 || t.stride(d) > t.stride(outer))) outer = d;
    }
    const auto size = static_cast<int64_t>(t.element_size());
    whole = (last + 1) * size;
    step = outer < 0 ? 0 : t.stride(outer) * size;
    extent = outer < 0 ? whole : whole - step * (t.size(outer) - 1);
  }

  // Provably apart: one behind the other, or, as columns of one matrix are, side by side in each step.
  static bool are_apart(const Footprint& a, const Footprint& b) {
    if (a.begin + a.whole <= b.begin || b.begin + b.whole <= a.begin) return true;
    if (a.step != b.step || a.step == 0) return false;
    const int64_t between = ((b.begin - a.begin) % a.step + a.step) % a.step;
    return a.extent <= between && between + b.extent <= a.step;
  }

  intptr_t begin;
  int64_t whole, step, extent;
};

}  // namespace charlm
