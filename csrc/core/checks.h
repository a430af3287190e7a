// Argument checks shared by all ops: torch's error types, with the offending value, its position and the limit.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "core/tensors.h"

namespace charlm {

inline bool is_index_dtype(at::ScalarType dtype) { return c10::isIntegralType(dtype, /*includeBool=*/false); }

inline void check_index_dtype(const at::Tensor& index, const char* name) {
  TORCH_CHECK(is_index_dtype(index.scalar_type()), "expected ", name, " of an integer dtype, but got ",
              index.scalar_type());
}

inline void check_same_device(const at::Tensor& a, const char* a_name, const at::Tensor& b, const char* b_name) {
  TORCH_CHECK(a.device() == b.device(), "Expected all tensors to be on the same device, but ", a_name, " is on ",
              a.device(), " and ", b_name, " is on ", b.device());
}

// Raises the IndexError of an index, `shown` as text, at `flat_position` in row-major order among indices of
// shape `sizes`: "target 27 at position (3,) is out of range for 27 classes".
[[noreturn]] inline void raise_out_of_range(const std::string& shown, at::IntArrayRef sizes, int64_t flat_position,
                                            int64_t limit, const char* noun, const char* things) {
  std::vector<int64_t> position(sizes.size());
  for (size_t d = sizes.size(); d-- > 0; flat_position /= sizes[d]) position[d] = flat_position % sizes[d];
  TORCH_CHECK_INDEX(false, noun, " ", shown, " at position (", c10::Join(", ", position),
                    position.size() == 1 ? "," : "", ") is out of range for ", limit, " ", things);
  throw;  // not reached: tells the compiler that the check above does not return
}

// Overload that reads the value from `index`.
[[noreturn]] inline void raise_out_of_range(const at::Tensor& index, int64_t flat_position, int64_t limit,
                                            const char* noun, const char* things) {
  const at::Tensor value = index.reshape({-1})[flat_position];
  const std::string shown = index.scalar_type() == at::kUInt64
                                ? std::to_string(*static_cast<const uint64_t*>(value.const_data_ptr()))
                                : std::to_string(value.to(at::kLong).item<int64_t>());
  raise_out_of_range(shown, index.sizes(), flat_position, limit, noun, things);
}

// The state that backward reads must be the one that forward returned.
inline void check_state(const at::Tensor& state, int64_t n_numbers, int64_t n_rows, const at::Tensor& input,
                        const char* forward) {
  TORCH_CHECK(state.dim() == 2 && state.size(0) == n_numbers && state.size(1) == n_rows && state.is_contiguous() &&
                  state.scalar_type() == compute_dtype(input) && state.device() == input.device(),
              "state must be the one that ", forward, " returned, got shape ", state.sizes());
}

// ------------------------------------------------------------------------------------------------- shared memory
// Whether tensors that are written can share memory with themselves or with others, from sizes and strides alone.

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
