// The activations that a linear layer may end with, by the number that their op takes.
#pragma once

#include <stdint.h>

namespace charlm {

enum class Activation : int64_t { kNone = 0, kTanh = 1, kRelu = 2, kGelu = 3 };

}  // namespace charlm
