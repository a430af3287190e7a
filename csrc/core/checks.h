// Argument checks shared by all ops: torch's error types, with the offending value, its position and the limit.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>

#include <string>
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

}  // namespace charlm
