// Products by the kernels of cpu/gemm/gemm_tiles.h. What they stream through is cut into blocks that depend on nothing
// but the sizes; a long sum of few numbers is made of parts, which are added up in their order.
#include "cpu/gemm/gemm.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/mm.h>

namespace charlm {
namespace {

// Rows of the result for which b is worth copying into rows: a b of few numbers, and any.
constexpr int64_t kFewNumbers = 1 << 16, kWorthCopyingFew = 16, kWorthCopyingAny = 256;
constexpr int64_t kMostRead = 1 << 20;         // numbers of b that all rows read before others: a shared cache's
constexpr int64_t kRows = 48, kColumns = 256;  // of a block of the result: whole tiles of every width
constexpr int64_t kVector = 16;                // no vector of any instruction set holds more numbers

// MKL keeps to AVX2 on AMD's processors, whatever they have (bench/NOTES.md).
bool has_blas_half_our_vectors() {
#ifdef __x86_64__
  static const bool keeps_to_avx2 = at::hasMKL() && __builtin_cpu_is("amd");
  return keeps_to_avx2 && cpu_kernels().vector_bytes == 64;
#else
  return false;
#endif
}

struct Sizes {
  int64_t n_rows, n_columns, n_inner;

  Sizes(const Tensor& a, const Tensor& b) : n_rows(a.size(0)), n_columns(b.size(1)), n_inner(a.size(1)) {}

  bool is_long_sum() const { return n_inner > 4 * kPart && 2 * n_rows * n_columns <= kL1Numbers; }
  bool are_short() const {
    return std::min({n_rows, n_columns, n_inner}) <= kShort &&
           (n_inner * std::min(n_columns, kColumns) <= kL1Numbers || is_long_sum());
  }
};

bool is_ours(const Tensor& out, const Tensor& a, const Tensor& b) {
  const at::ScalarType dtype = out.scalar_type();
  return out.is_cpu() && (dtype == at::kFloat || dtype == at::kDouble) &&
         (Sizes(a, b).are_short() || has_blas_half_our_vectors()) &&
         (b.stride(1) == 1 || out.size(0) >= (b.numel() <= kFewNumbers ? kWorthCopyingFew : kWorthCopyingAny));
}

template <class C>
void by_blocks(const GemmArguments<C>& whole) {
  // Few rows make few blocks: then there are more columns of them, of about equal width.
  const int64_t most = whole.n_rows < 8 * kRows ? kColumns / 4 : kColumns;
  const int64_t n_vectors = (whole.n_columns + kVector - 1) / kVector;
  const int64_t row_blocks = (whole.n_rows + kRows - 1) / kRows, column_blocks = (whole.n_columns + most - 1) / most;
  const int64_t products = std::min(whole.n_rows, kRows) * std::min(whole.n_columns, most) * whole.n_inner;
  at::parallel_for(0, row_blocks * column_blocks, grain_of_products(products), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t row = block % row_blocks * kRows, i = block / row_blocks;
      const int64_t column = n_vectors * i / column_blocks * kVector,
                    last = std::min(whole.n_columns, n_vectors * (i + 1) / column_blocks * kVector);
      GemmArguments<C> g = whole;
      g.a += row * g.a_row_stride;
      g.b += column;
      if (g.start) g.start += column;
      g.c += row * g.c_row_stride + column;
      g.n_rows = std::min(kRows, whole.n_rows - row);
      g.n_columns = last - column;
      multiply_here(g);
    }
  });
}

// A long sum into few numbers: parts of the sum, each with a result of its own.
template <class C>
void by_parts_of_sums(const GemmArguments<C>& whole) {
  const int64_t n_parts = std::min(kMaxParts, whole.n_inner / kPart), size = whole.n_rows * whole.n_columns;
  std::vector<C> sums(n_parts * size);
  at::parallel_for(0, n_parts, grain_of_products(size * whole.n_inner / n_parts), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      const int64_t first = whole.n_inner * part / n_parts;
      GemmArguments<C> g = whole;
      g.a += first * g.a_column_stride;
      g.b += first * g.b_row_stride;
      g.start = nullptr;
      g.adds = false;
      g.c = sums.data() + part * size;
      g.c_row_stride = whole.n_columns;
      g.n_inner = whole.n_inner * (part + 1) / n_parts - first;
      multiply_here(g);
    }
  });
  for (int64_t row = 0; row < whole.n_rows; row++) {
    C* const c = whole.c + row * whole.c_row_stride;
    const C* const sum = sums.data() + row * whole.n_columns;
    for (int64_t n = 0; n < whole.n_columns; n++) {
      C total = whole.adds ? c[n] : whole.start ? whole.start[n] : C(0);
      for (int64_t part = 0; part < n_parts; part++) total += sum[part * size + n];
      c[n] = total;
    }
  }
}

// Of a large b, one part of the sums after the other.
template <class C>
void by_parts_of_b(const GemmArguments<C>& whole) {
  const int64_t most = std::max(kInner, kMostRead / std::max<int64_t>(1, whole.n_columns) / kInner * kInner);
  GemmArguments<C> g = whole;
  for (int64_t k = 0; k == 0 || k < whole.n_inner; k += most) {
    g.a = whole.a + k * g.a_column_stride;
    g.b = whole.b + k * g.b_row_stride;
    g.n_inner = std::min(most, whole.n_inner - k);
    g.adds = whole.adds || k > 0;
    by_blocks(g);
  }
}

template <class C>
void run(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& start, bool adds) {
  const Tensor whole_start = start ? start->contiguous() : Tensor();
  const Sizes sizes(a, b);
  // A b that is to be copied into rows: so many of its columns at once.
  const int64_t most = b.stride(1) == 1 ? sizes.n_columns : std::max(kColumns, kMostRead / (sizes.n_inner + 1));
  for (int64_t first = 0; first < sizes.n_columns; first += most) {
    const int64_t n = std::min(most, sizes.n_columns - first);
    const Tensor rows_of_b = with_contiguous_rows<C>(b.narrow(1, first, n));
    GemmArguments<C> g;
    g.a = const_data<C>(a);
    g.a_row_stride = a.stride(0);
    g.a_column_stride = a.stride(1);
    g.b = const_data<C>(rows_of_b);
    g.b_row_stride = rows_of_b.stride(0);
    g.start = start ? const_data<C>(whole_start) + first : nullptr;
    g.adds = adds;
    g.c = mutable_data<C>(out) + first;
    g.c_row_stride = out.stride(0);
    g.n_rows = sizes.n_rows;
    g.n_columns = n;
    g.n_inner = sizes.n_inner;
    sizes.is_long_sum() ? by_parts_of_sums(g) : by_parts_of_b(g);
  }
}

void run(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& start, bool adds) {
  if (out.scalar_type() == at::kDouble) {
    run<double>(out, a, b, start, adds);
  } else {
    run<float>(out, a, b, start, adds);
  }
}

}  // namespace

void multiply(const Tensor& out, const Tensor& a, const Tensor& b, const OptionalTensor& start) {
  if (is_ours(out, a, b)) return run(out, a, b, start, /*adds=*/false);
  Tensor result = out;
  start ? at::addmm_out(result, *start, a, b) : at::mm_out(result, a, b);
}

void add_product(const Tensor& out, const Tensor& a, const Tensor& b) {
  if (is_ours(out, a, b)) return run(out, a, b, std::nullopt, /*adds=*/true);
  Tensor result = out;
  at::addmm_out(result, result, a, b);
}

}  // namespace charlm
