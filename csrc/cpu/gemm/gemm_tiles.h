// c = a b in tiles that are summed in registers. Nothing is packed: the caller ensures that the part of b in one call
// fits in a first-level cache. The pragmas unroll loops that GCC would not: it would keep the sums of a tile whose last
// vector is partial in memory, at a third of the speed.
#pragma once

#include "core/kernels.h"
#include "cpu/vec.h"

namespace charlm::CHARLM_ISA {

constexpr int kMaxGemmVectors = 4;

// Rows of a tile: its kRows * kVectors sums, kVectors vectors of b and one of a fill 16 registers. Twice the rows with
// 32 registers.
template <int kVectors>
constexpr int kGemmRows = (kVectors == 4   ? 3
                           : kVectors == 3 ? 4
                           : kVectors == 2 ? 6
                                           : 8) *
                          (kVectorRegisters / 16);

// Computes kRows rows and kVectors vectors of c. The last vector may be partial.
template <class C, int kRows, int kVectors, class Width>
CHARLM_INLINE void gemm_tile(const GemmParams<C>& g, int64_t row, int64_t column, Width width) {
  const auto load_row = [=](Vec<C>* to, const C* from) {
    for (int v = 0; v < kVectors - 1; v++) to[v] = load(from + v * kLanes<C>, Whole{});
    to[kVectors - 1] = load(from + (kVectors - 1) * kLanes<C>, width, C(0));
  };
  C* const c = g.c + row * g.c_row_stride + column;
  const int64_t a_row_stride = g.a_row_stride;
  Vec<C> sum[kRows][kVectors] = {};
  const C *a = g.a + row * a_row_stride, *b = g.b + column;
  for (int64_t k = 0; k < g.n_inner; k++, a += g.a_column_stride, b += g.b_row_stride) {
    Vec<C> right[kVectors];
    load_row(right, b);
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const Vec<C> left = broadcast<C>(a[r * a_row_stride]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; v++) sum[r][v] = fma<C>(left, right[v], sum[r][v]);
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < kRows; r++) {
    C* const to = c + r * g.c_row_stride;
    if (const C* const first = g.adds ? to : g.start ? g.start + column : nullptr) {
      Vec<C> before[kVectors];
      load_row(before, first);
      for (int v = 0; v < kVectors; v++) sum[r][v] += before[v];
    }
    for (int v = 0; v < kVectors - 1; v++) store(to + v * kLanes<C>, sum[r][v], Whole{});
    store(to + (kVectors - 1) * kLanes<C>, sum[r][kVectors - 1], width);
  }
}

// Computes kVectors vectors of the rows from `row` on: tiles of kRows rows, then of half as many for the remaining
// rows.
template <class C, int kVectors, int kRows = kGemmRows<kVectors>, class Width>
CHARLM_INLINE void gemm_rows(const GemmParams<C>& g, int64_t row, int64_t column, Width width) {
  for (; row + kRows <= g.n_rows; row += kRows) gemm_tile<C, kRows, kVectors>(g, row, column, width);
  if constexpr (kRows > 1) gemm_rows<C, kVectors, kRows / 2>(g, row, column, width);
}

// Computes kVectors vectors of all rows.
template <class C, int kVectors, class Width>
CHARLM_NOINLINE void gemm_columns(const GemmParams<C>& g, int64_t column, Width width) {
  gemm_rows<C, kVectors>(g, 0, column, width);
}

// Calls f(Count<n>) for 1 <= n <= kMaxGemmVectors.
template <int kVectors = 1, class F>
CHARLM_INLINE void with_gemm_vectors(int64_t n, F&& f) {
  if constexpr (kVectors < kMaxGemmVectors) {
    if (n > kVectors) return with_gemm_vectors<kVectors + 1>(n, f);
  }
  f(Count<kVectors>{});
}

template <class C>
void gemm(const GemmParams<C>& g) {
  const int64_t n_vectors = (g.n_columns + kLanes<C> - 1) / kLanes<C>;
  const int64_t n_tiles = (n_vectors + kMaxGemmVectors - 1) / kMaxGemmVectors;  // of about equal width
  for (int64_t i = 0; i < n_tiles; i++) {
    const int64_t first = n_vectors * i / n_tiles, n = n_vectors * (i + 1) / n_tiles - first;
    const int64_t last_lanes = g.n_columns - (first + n - 1) * kLanes<C>;
    with_gemm_vectors(n, [&]<int kVectors>(Count<kVectors>) {
      if (last_lanes >= kLanes<C>) {
        gemm_columns<C, kVectors>(g, first * kLanes<C>, Whole{});
      } else {
        gemm_columns<C, kVectors>(g, first * kLanes<C>, Part{last_lanes});
      }
    });
  }
}

}  // namespace charlm::CHARLM_ISA
