// c = a b of matrices so small that a call of a BLAS would take longer than the product: one thread, nothing packed.
#pragma once

#include "embedding_linear.h"
#include "vec.h"

namespace charlm::CHARLM_ISA {

// kRows rows and kVectors vectors of c, in registers.
template <class C, int kRows, int kVectors, class Width>
CHARLM_INLINE void gemm_tile(const SmallGemm<C> g, int64_t row, int64_t column, Width width) {
  Vec<C> sum[kRows][kVectors];
  for (int v = 0; v < kVectors; v++) {
    const Vec<C> start = g.start ? load(g.start + column + v * kLanes<C>, width, C(0)) : Vec<C>{};
    for (int r = 0; r < kRows; r++) sum[r][v] = start;
  }
  const C* a = g.a + row * g.a_row_stride;
  const C* b = g.b + column;
  for (int64_t k = 0; k < g.n_inner; k++, a += g.a_column_stride, b += g.b_row_stride) {
    Vec<C> right[kVectors];
    for (int v = 0; v < kVectors; v++) right[v] = load(b + v * kLanes<C>, width, C(0));
    for (int r = 0; r < kRows; r++) {
      const Vec<C> left = broadcast<C>(a[r * g.a_row_stride]);
      for (int v = 0; v < kVectors; v++) sum[r][v] = fma<C>(left, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; r++) {
    C* c = g.c + (row + r) * g.n_columns + column;
    for (int v = 0; v < kVectors; v++) store(c + v * kLanes<C>, sum[r][v], width);
  }
}

template <class C>
void small_gemm(const SmallGemm<C>& given) {
  constexpr int kRows = 4, kVectors = 3;  // 12 sums, 3 vectors of b and one of a: 16 registers
  const SmallGemm<C> g = given;
  for_each_vectors<C, kVectors>(g.n_columns, [=]<int K>(int64_t column, auto width, Count<K>) {
    int64_t row = 0;
    for (; row + kRows <= g.n_rows; row += kRows) gemm_tile<C, kRows, K>(g, row, column, width);
    for (; row < g.n_rows; row++) gemm_tile<C, 1, K>(g, row, column, width);
  });
}

}  // namespace charlm::CHARLM_ISA
