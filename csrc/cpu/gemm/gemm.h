// Matrix products on the CPU. Our own loops (gemm_tiles.h) run a product if a side is short or the BLAS uses vectors of
// half our width, where they are about twice as fast (bench/NOTES.md); torch's BLAS runs the others.
#pragma once

#include "core/tensors.h"

namespace charlm {

constexpr int64_t kMaxShortSide = 32;  // the longest side that counts as short

// out[M, N] = a[M, K] b[K, N], plus `start` [N] in each row. Rows of `out` must be contiguous. Our own loops give the
// same bits for any number of threads.
void multiply(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& start = {});
// out += a b
void add_product(const Tensor& out, const Tensor& a, const Tensor& b);

}  // namespace charlm
