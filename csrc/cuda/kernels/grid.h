// Arithmetic of launch functions: how work is cut into blocks.
#pragma once

#include <stdint.h>

namespace charlm::cuda {

// Blocks of a launch; what is beyond them is walked over by the same blocks. Enough to fill any GPU several times.
constexpr int kMaxBlocks = 8192;

// The second argument of __launch_bounds__: that many blocks must fit into a multiprocessor. Left to itself, ptxas
// spills registers, or loads less at a time, to fit in more.
constexpr int kMinBlocks = 2;

constexpr int64_t ceil_div(int64_t n, int64_t divisor) { return (n + divisor - 1) / divisor; }

constexpr int64_t round_up(int64_t n, int64_t multiple) { return ceil_div(n, multiple) * multiple; }

// The smallest power of two that is not smaller than n.
constexpr int power_of_two(int64_t n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

}  // namespace charlm::cuda
