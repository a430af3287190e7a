// How a row of numbers says a distribution over classes; torch-free, for kernels too.
#pragma once

#include <stdint.h>

namespace charlm {

// p = softmax(x), p = exp(x), p = x.
enum class Distribution : int64_t { kLogits = 0, kLogProbs = 1, kProbs = 2 };

}  // namespace charlm
