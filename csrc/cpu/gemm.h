// Matrix products on the CPU: by our own loops where a side is short, which a BLAS runs at a half of its speed and less,
// and by torch's BLAS elsewhere.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

namespace charlm {

// out[M, N] = a[M, K] b[K, N], and `start` [N] added to each row; the same bits for any number of threads, if the loops
// are our own. Rows of `out` are contiguous.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
              const std::optional<at::Tensor>& start = {});
// out += a b
void add_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

}  // namespace charlm
