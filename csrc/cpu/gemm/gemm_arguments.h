// Matrix products: what the adapter fills in, and the function that each instruction set provides.
#pragma once

#include "core/kernel.h"

namespace charlm {

// c[M, N] = start + a[M, K] b[K, N]. Rows of b and c are contiguous.
template <class C>
struct GemmArguments {
  const C* a = nullptr;
  int64_t a_row_stride = 0, a_column_stride = 0;
  const C* b = nullptr;
  int64_t b_row_stride = 0;
  const C* start = nullptr;  // [N], optional
  bool adds = false;         // to what c holds, instead
  C* c = nullptr;
  int64_t c_row_stride = 0;
  int64_t n_rows = 0, n_columns = 0, n_inner = 0;  // M, N, K
};

template <class C>
using GemmKernel = void (*)(const GemmArguments<C>&);

}  // namespace charlm
