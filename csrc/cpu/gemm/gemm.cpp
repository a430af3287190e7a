// Splits products into calls of the kernels of cpu/gemm/gemm_tiles.h. The blocks depend only on the sizes. A long sum
// into few numbers is split into parts, which are added up in order.
#include "cpu/gemm/gemm.h"

#include <ATen/Context.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/mm.h>

#include <algorithm>
#include <vector>

#include "core/kernels.h"
#include "cpu/blocks.h"

namespace charlm {
namespace {

constexpr int64_t kL1Numbers = 1 << 14;  // numbers of b that fit in a first-level cache
// A long sum is split into at most kMaxParts parts of at least kMinPartProducts products, which are added up in order.
constexpr int64_t kMinPartProducts = 256, kMaxParts = 16;

// Grain size of a parallel loop whose iterations take `products` multiplications each.
int64_t grain_of_products(int64_t products) { return std::max<int64_t>(1, (1 << 18) / std::max<int64_t>(1, products)); }

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
Tensor with_contiguous_rows(const Tensor& b) {
  if (b.stride(1) == 1) return b;
  const int64_t n_inner = b.size(0), n_columns = b.size(1), row_stride = b.stride(0), column_stride = b.stride(1);
  const Tensor result = at::empty({n_inner, n_columns}, b.options());
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

// A b without contiguous rows is copied if the result has at least this many rows, for a small b and for any b.
constexpr int64_t kSmallNumbers = 1 << 16, kMinRowsToCopySmall = 16, kMinRowsToCopy = 256;
constexpr int64_t kSharedCacheNumbers = 1 << 20;         // numbers of b that fit in a shared cache
constexpr int64_t kBlockRows = 48, kBlockColumns = 256;  // of a block of the result: whole tiles for every vector width
constexpr int64_t kMaxLanes = 16;                        // of any instruction set

// MKL uses AVX2 on AMD processors even if they support AVX-512 (bench/NOTES.md).
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

  bool is_long_sum() const { return n_inner > 4 * kMinPartProducts && 2 * n_rows * n_columns <= kL1Numbers; }
  bool are_short() const {
    return std::min({n_rows, n_columns, n_inner}) <= kMaxShortSide &&
           (n_inner * std::min(n_columns, kBlockColumns) <= kL1Numbers || is_long_sum());
  }
};

bool is_ours(const Tensor& out, const Tensor& a, const Tensor& b) {
  const at::ScalarType dtype = out.scalar_type();
  return out.is_cpu() && (dtype == at::kFloat || dtype == at::kDouble) &&
         (Sizes(a, b).are_short() || has_blas_half_our_vectors()) &&
         (b.stride(1) == 1 || out.size(0) >= (b.numel() <= kSmallNumbers ? kMinRowsToCopySmall : kMinRowsToCopy));
}

template <class C>
void by_blocks(const GemmParams<C>& whole) {
  // If there are few rows, the columns are divided into more blocks, of about equal width.
  const int64_t most = whole.n_rows < 8 * kBlockRows ? kBlockColumns / 4 : kBlockColumns;
  const int64_t n_vectors = (whole.n_columns + kMaxLanes - 1) / kMaxLanes;
  const int64_t row_blocks = (whole.n_rows + kBlockRows - 1) / kBlockRows,
                column_blocks = (whole.n_columns + most - 1) / most;
  const int64_t products = std::min(whole.n_rows, kBlockRows) * std::min(whole.n_columns, most) * whole.n_inner;
  at::parallel_for(0, row_blocks * column_blocks, grain_of_products(products), [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; block++) {
      const int64_t row = block % row_blocks * kBlockRows, i = block / row_blocks;
      const int64_t column = n_vectors * i / column_blocks * kMaxLanes,
                    last = std::min(whole.n_columns, n_vectors * (i + 1) / column_blocks * kMaxLanes);
      GemmParams<C> g = whole;
      g.a += row * g.a_row_stride;
      g.b += column;
      if (g.start) g.start += column;
      g.c += row * g.c_row_stride + column;
      g.n_rows = std::min(kBlockRows, whole.n_rows - row);
      g.n_columns = last - column;
      multiply_here(g);
    }
  });
}

// A long sum into few numbers: each part of the sum has its own result.
template <class C>
void by_parts_of_sums(const GemmParams<C>& whole) {
  const int64_t n_parts = std::min(kMaxParts, whole.n_inner / kMinPartProducts), size = whole.n_rows * whole.n_columns;
  std::vector<C> sums(n_parts * size);
  at::parallel_for(0, n_parts, grain_of_products(size * whole.n_inner / n_parts), [&](int64_t begin, int64_t end) {
    for (int64_t part = begin; part < end; part++) {
      const int64_t first = whole.n_inner * part / n_parts;
      GemmParams<C> g = whole;
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

// A large b: one part of the sums after the other.
template <class C>
void by_parts_of_b(const GemmParams<C>& whole) {
  const int64_t most =
      std::max(kInnerBlock, kSharedCacheNumbers / std::max<int64_t>(1, whole.n_columns) / kInnerBlock * kInnerBlock);
  GemmParams<C> g = whole;
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
  // If b must be copied, at most this many of its columns at once.
  const int64_t most =
      b.stride(1) == 1 ? sizes.n_columns : std::max(kBlockColumns, kSharedCacheNumbers / (sizes.n_inner + 1));
  for (int64_t first = 0; first < sizes.n_columns; first += most) {
    const int64_t n = std::min(most, sizes.n_columns - first);
    const Tensor rows_of_b = with_contiguous_rows<C>(b.narrow(1, first, n));
    GemmParams<C> g;
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
