// Matrix products on the CPU: by our own loops where a side is short or the BLAS has vectors of half our width, for
// then they are about twice as fast (bench/NOTES.md), by torch's BLAS elsewhere.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include <algorithm>
#include <optional>

#include "core/tensors.h"
#include "cpu/blocks.h"

namespace charlm {

constexpr int64_t kShort = 32;           // a side up to here is short
constexpr int64_t kL1Numbers = 1 << 14;  // numbers of b that stay in a near cache
// A long sum is made of so many parts at most, each of so many products at least, which are added up in their order.
constexpr int64_t kPart = 256, kMaxParts = 16;

// How many pieces of work, of so many products each, are worth a thread.
inline int64_t grain_of_products(int64_t products) {
  return std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, products));
}

// Products of a sum that are added up in a register: as many rows of b stay in a first-level cache, and a longer sum
// would round more.
constexpr int64_t kInner = 64;

// One product, by our loops and on this thread.
template <class C>
void multiply_here(const GemmArguments<C>& whole) {
  GemmArguments<C> g = whole;
  for (int64_t k = 0; k == 0 || k < whole.n_inner; k += kInner) {
    g.a = whole.a + k * g.a_column_stride;
    g.b = whole.b + k * g.b_row_stride;
    g.n_inner = std::min(kInner, whole.n_inner - k);
    g.adds = whole.adds || k > 0;
    cpu_kernels().of<C>().gemm(g);
  }
}

// b with rows as the kernels read them.
template <class C>
at::Tensor with_contiguous_rows(const at::Tensor& b) {
  if (b.stride(1) == 1) return b;
  const int64_t n_inner = b.size(0), n_columns = b.size(1), row_stride = b.stride(0), column_stride = b.stride(1);
  const at::Tensor result = at::empty({n_inner, n_columns}, b.options());
  const C* const from = const_data<C>(b);
  C* const to = mutable_data<C>(result);
  constexpr int64_t kBlock = 16;  // the lines of either are used up while they are near
  const int64_t n_blocks = (n_inner + kBlock - 1) / kBlock;
  constexpr int64_t kProducts = 32;  // that take as long as a number to copy
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

// out[M, N] = a[M, K] b[K, N], and `start` [N] added to each row; the same bits for any number of threads, if the loops
// are our own. Rows of `out` are contiguous.
void multiply(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b,
              const std::optional<at::Tensor>& start = {});
// out += a b
void add_product(const at::Tensor& out, const at::Tensor& a, const at::Tensor& b);

}  // namespace charlm
