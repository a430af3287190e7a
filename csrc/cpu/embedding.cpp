// embedding on the CPU: takes tensors apart and hands ranges of indices to the kernels.
#include "../embedding.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "adapter.h"
#include "indices.h"

namespace charlm {
namespace {

// Calls f(kernel, typed pointer) for the dtype of `indices`.
template <class F>
void with_index_type(const Tensor& indices, F&& f) {
  const EmbeddingForwards& kernels = cpu_kernels().embedding_forward;
  switch (indices.scalar_type()) {
    case at::kChar:
      return f(kernels.int8, const_data<int8_t>(indices));
    case at::kShort:
      return f(kernels.int16, const_data<int16_t>(indices));
    case at::kInt:
      return f(kernels.int32, const_data<int32_t>(indices));
    case at::kLong:
      return f(kernels.int64, const_data<int64_t>(indices));
    case at::kByte:
      return f(kernels.uint8, const_data<uint8_t>(indices));
    case at::kUInt16:
      return f(kernels.uint16, const_data<uint16_t>(indices));
    case at::kUInt32:
      return f(kernels.uint32, const_data<uint32_t>(indices));
    case at::kUInt64:
      return f(kernels.uint64, const_data<uint64_t>(indices));
    default:
      check_index_dtype(indices, "indices");
  }
}

Tensor embedding(const Tensor& weight, const Tensor& indices, int64_t, bool, bool) {
  check_embedding(weight, indices);
  const Tensor index = indices.contiguous();
  at::DimVector shape(indices.sizes().begin(), indices.sizes().end());
  shape.push_back(weight.size(1));
  Tensor output = new_output(shape, weight.options());

  const int64_t element_size = static_cast<int64_t>(weight.element_size());
  EmbeddingTable table;
  table.weight = const_data<char>(weight);
  table.row_stride = weight.stride(0) * element_size;
  table.column_stride = weight.stride(1) * element_size;
  table.element_size = element_size;
  table.embedding_dim = weight.size(1);
  table.num_embeddings = weight.size(0);
  char* const out = mutable_data<char>(output);

  int64_t bad = -1;
  with_index_type(index, [&](auto kernel, auto* typed_index) {
    const Blocks blocks(index.numel(), table.embedding_dim);
    c10::SmallVector<int64_t, 64> first_bad(blocks.count());
    blocks.parallel_for([&](int64_t block, int64_t begin, int64_t end) {
      first_bad[block] = kernel(table, typed_index, out, begin, end);
    });
    for (const int64_t position : first_bad) {
      if (position >= 0) {
        bad = position;
        break;
      }
    }
  });
  if (bad >= 0) raise_out_of_range(indices, bad, table.num_embeddings, "index", "embeddings");
  return output;
}

// One call's gradient. A row of it is the sum of the rows of grad_output with its index; sums run in an order that the
// sizes alone decide, in float for the half types, and are rounded once.
template <class T>
class Gradient {
  using C = Compute<T>;

 public:
  Gradient(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
           bool scale_grad_by_freq)
      : grad_output_(grad_output.contiguous()),
        index_(checked_indices(indices, num_embeddings)),
        n_(index_.numel()),
        v_(num_embeddings),
        d_(grad_output.size(-1)),
        padding_idx_(padding_idx),
        scale_grad_by_freq_(scale_grad_by_freq),
        kernels_(cpu_kernels().of<T>().embedding) {}

  Tensor operator()() const {
    Tensor grad = new_output({v_, d_}, grad_output_.options());
    if (v_ * table_stride() <= kTableElements && v_ * n_tables() <= n_ && !scale_grad_by_freq_) {
      from_tables(grad);
    } else {
      from_sorted(grad);
    }
    return grad;
  }

 private:
  static constexpr int64_t kTableElements = 1 << 17;  // tables that stay in a second-level cache
  static constexpr int64_t kVectorElements = 16;      // no vector of any instruction set holds more

  const int64_t* index() const { return const_data<int64_t>(index_); }
  const T* grad_output() const { return const_data<T>(grad_output_); }

  int64_t n_tables() const { return std::clamp<int64_t>(n_ / 4096, 1, 16); }

  // Rows of a table are whole vectors.
  int64_t table_stride() const { return (d_ + kVectorElements - 1) / kVectorElements * kVectorElements; }

  // Few rows: each of a fixed number of blocks of indices has a whole table of its own; then they are added up.
  void from_tables(const Tensor& grad) const {
    const int64_t n_blocks = n_tables(), stride = table_stride();
    const Tensor tables =
        at::empty({n_blocks, v_ * stride}, grad.options().dtype(std::is_same_v<C, double> ? at::kDouble : at::kFloat));
    C* const all = mutable_data<C>(tables);
    at::parallel_for(0, n_blocks, 1, [&](int64_t first, int64_t last) {
      for (int64_t b = first; b < last; b++) {
        C* const table = all + b * v_ * stride;
        std::fill_n(table, v_ * stride, C(0));
        kernels_.accumulate(table, stride, index(), grad_output(), d_, padding_idx_, n_ * b / n_blocks,
                            n_ * (b + 1) / n_blocks, n_);
      }
    });
    at::parallel_for(0, v_, std::max<int64_t>(1, 8192 / std::max<int64_t>(1, d_)), [&](int64_t begin, int64_t end) {
      kernels_.sum_tables(mutable_data<T>(grad), all, n_blocks, v_ * stride, stride, d_, begin, end);
    });
  }

  // Many rows: the positions of each index, in order, by a counting sort; each row is then summed by one thread.
  void from_sorted(const Tensor& grad) const {
    std::vector<int64_t> starts(v_ + 1);
    for (int64_t n = 0; n < n_; n++) starts[index()[n] + 1]++;
    std::partial_sum(starts.begin(), starts.end(), starts.begin());
    std::vector<int64_t> positions(n_), next(starts.begin(), starts.end() - 1);
    for (int64_t n = 0; n < n_; n++) positions[next[index()[n]]++] = n;
    const int64_t elements_per_row = std::max<int64_t>(1, d_ * std::max<int64_t>(1, n_ / std::max<int64_t>(1, v_)));
    at::parallel_for(0, v_, std::max<int64_t>(1, 65536 / elements_per_row), [&](int64_t first, int64_t last) {
      std::vector<C> sum(d_);
      T* const out = mutable_data<T>(grad);
      for (int64_t v = first; v < last;) {
        int64_t absent = 0;  // rows from here on without an index
        while (v + absent < last && (starts[v + absent] == starts[v + absent + 1] || v + absent == padding_idx_))
          absent++;
        std::memset(static_cast<void*>(out + v * d_), 0, absent * d_ * sizeof(T));
        v += absent;
        if (v == last) break;
        const int64_t count = starts[v + 1] - starts[v];
        kernels_.sum_rows(out + v * d_, sum.data(), grad_output(), positions.data() + starts[v], count, d_,
                          scale_grad_by_freq_ ? C(1) / static_cast<C>(count) : C(1));
        v++;
      }
    });
  }

  const Tensor grad_output_, index_;
  const int64_t n_, v_, d_, padding_idx_;
  const bool scale_grad_by_freq_;
  const EmbeddingKernels<T>& kernels_;
};

Tensor embedding_backward(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                          bool scale_grad_by_freq) {
  check_embedding_backward(grad_output, indices);
  return with_float_type(grad_output.scalar_type(), "embedding_backward", [&]<class T>() {
    return Gradient<T>(grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq)();
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(charlm, CPU, m) {
  m.impl("embedding", &embedding);
  m.impl("embedding_backward", &embedding_backward);
}

}  // namespace charlm
