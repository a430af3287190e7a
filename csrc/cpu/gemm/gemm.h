// Matrix products on the CPU. Our own loops (gemm_tiles.h) run a product if a side is short or the BLAS uses vectors of
// half our width, where they are about twice as fast (bench/NOTES.md); torch's BLAS runs the others.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

#include "core/tensors.h"
#include "cpu/blocks.h"

namespace charlm {

constexpr int64_t kMaxShortSide = 32;    // the longest side that counts as short
constexpr int64_t kL1Numbers = 1 << 14;  // numbers of b that fit in a first-level cache
// A long sum is split into at most kMaxParts parts of at least kMinPartProducts products, which are added up in order.
constexpr int64_t kMinPartProducts = 256, kMaxParts = 16;

// Grain size of a parallel loop whose iterations take `products` multiplications each.
inline int64_t grain_of_products(int64_t products) {
  return std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, products));
}

// Products that are added up in a register before the sum goes to memory: kInnerBlock rows of b stay in a first-level
// cache, and a longer sum would round more.
constexpr int64_t kInnerBlock = 64;

// Computes one product with our loops on this thread.
template <class C>
void multiply_here(const GemmParams<C>& whole) {
  GemmParams<C> g = whole;
  for (int64_t k = 0; k == 0 || k < whole.n_inner; k += kInnerBlock) {
    g.a = whole.a + k * g.a_column_stride;
    g.b = whole.b + k * g.b_row_stride;
    g.n_inner = std::min(kInnerBlock, whole.n_inner - k);
    g.adds = whole.adds || k > 0;
    cpu_kernels().of<C>().gemm(g);
  }
}

// b, or a copy of it, with contiguous rows as the kernels require.
template <class C>
at::Tensor with_contiguous_rows(const at::Tensor& b) {
  if (b.stride(1) == 1) return b;
  const int64_t n_inner = b.size(0), n_columns = b.size(1), row_stride = b.stride(0), column_stride = b.stride(1);
  const at::Tensor result = at::empty({n_inner, n_columns}, b.options());
  const C* const from = const_data<C>(b);
  C* const to = mutable_data<C>(result);
  constexpr int64_t kBlock = 16;  // cache lines of both matrices are used completely while in cache
  const int64_t n_blocks = (n_inner + kBlock - 1) / kBlock;
  constexpr int64_t kProducts = 32;  // take as long as copying a number
  at::parallel_for(0, n_blocks, grain_of_products(kProducts * kBlock * n_columns), [&](int64_t begin, int64_t end) {
    for (int64_t first = begin * kBlock; first < std::min(n_inner, end * kBlock); first += kBlock) {
      const int64_t last = std::min(n_inner, first + kBlock);
      for (int64_t n = 0; n < n_columns; n++) {
        for (int64_t k = first; k < last; k++) to[k * n_columns + n] = from[k * row_stride + n * column_stride];
      }
    }
  });
  return result;
}

// out[M, N] = a[M, K] b[K, N], plus `start` [N] in each row. Rows of `out` must be contiguous. Our own loops give the
// same bits for any number of threads.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
              const std::optional<at::Tensor>& start = {});
// out += a b
void add_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

}  // namespace charlm
