// Launches of torch's kl_div, element by element (../../pointwise_kl_div.h); each returns CUDA's error code, 0 for
// success.
#pragma once

#include "../../pointwise_kl_div.h"
#include "stream.h"

namespace charlm::cuda {

// Blocks of a forward that adds up: its sums are in the order of the blocks.
constexpr int kMostPointwiseBlocks = 1024;

// `output`; or, without it, *total, the sum divided by `divisor`. `sums` has room for kMostPointwiseBlocks.
template <class T>
int pointwise_kl_div_forward(const PointwiseKlDiv<T>& p, Compute<T>* sums, T* total, double divisor, Stream stream);
// `grad_input` and `grad_target`
template <class T>
int pointwise_kl_div_backward(const PointwiseKlDiv<T>& p, Stream stream);

}  // namespace charlm::cuda
