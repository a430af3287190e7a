// How linear_cross_entropy divides its logits on a GPU.
#pragma once

#include <cstdint>

namespace charlm {

constexpr int64_t kDefaultMemoryBudget = int64_t{1} << 30;  // bytes

// The sizes and options of a call that decide its plan.
struct LinearSizes {
  int64_t n_rows;      // N
  int64_t n_features;  // D
  int64_t n_classes;   // V
  int64_t element_size;
  bool is_half;         // a sum of several products needs a copy in float
  bool with_gradients;  // of the logits
  bool wants_input;     // dX
  bool wants_weight;    // dW
  bool may_tile;        // the options allow tiles of classes
  int64_t budget;       // bytes beyond the results
};

// Blocks of rows, or tiles of classes for all rows, whose logits are computed twice. The logits of the first
// `kept` + `kept_in_weight` tiles are kept from the first time: in `kept` buffers, and in the memory of dW.
struct LinearPlan {
  int64_t block_rows = 0;  // 0: tiles of classes
  int64_t tile_classes = 0;
  int64_t kept = 0;
  int64_t kept_in_weight = 0;
};

// Rows of 16 bytes: with others the products of half types take five to six times as long.
inline int64_t class_multiple(int64_t element_size) { return 16 / element_size; }
inline int64_t padded_classes(int64_t n_classes, int64_t element_size) {
  const int64_t multiple = class_multiple(element_size);
  return (n_classes + multiple - 1) / multiple * multiple;
}

LinearPlan choose_linear_plan_on_gpu(const LinearSizes& sizes);

}  // namespace charlm
