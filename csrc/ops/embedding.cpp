// embedding: rows of a table gathered by index, and the sums of its gradient, from top to bottom.
#include "ops/embedding.h"

#include <ATen/TensorIndexing.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/grad_mode.h>
#include <ATen/ops/embedding.h>
#include <ATen/ops/embedding_backward.h>
#include <ATen/ops/embedding_dense_backward.h>
#include <ATen/ops/ones_like.h>
#include <ATen/ops/zeros.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <vector>

#include "core/autograd_node.h"
#include "core/checks.h"
#include "ops/embedding_gradient.h"

namespace charlm {

// -------------------------------------------------------------------------------------------------------- indices

at::Tensor checked_indices(const at::Tensor& indices, int64_t num_embeddings) {
  const at::Tensor wide = indices.to(at::kLong).contiguous();
  const int64_t* const index = const_data<int64_t>(wide);
  const auto first_bad = [&](int64_t begin, int64_t end) {
    return cpu_kernels().first_out_of_range(index, begin, end, num_embeddings);
  };
  std::atomic<bool> bad = false;
  at::parallel_for(0, wide.numel(), 16384, [&](int64_t begin, int64_t end) {
    if (first_bad(begin, end) >= 0) bad = true;
  });
  if (bad) raise_out_of_range(indices, first_bad(0, wide.numel()), num_embeddings, "index", "embeddings");
  return wide;
}

Indices GpuIndices::for_kernel(const Device& device, const Tensor& data, int64_t limit) const {
  Indices indices = device.gpu_indices(given, data, limit, IndexKind::kIndex);
  if (place < 0) return indices;
  IndexLimit& against = indices.against;
  against.kind = IndexKind::kIndexAtPlace;
  if (given.dim() > IndexLimit::kMaxDims) {
    against.n_dims = 2;
    against.sizes[0] = values.numel();
    against.sizes[1] = given.size(-1);
  }
  against.first() = place;
  return indices;
}

namespace {

// ---------------------------------------------------------------------------------------------- checks and shapes

void check(const Tensor& weight, const Tensor& indices) {
  TORCH_CHECK(weight.dim() == 2, "'weight' must be 2-D, got shape ", weight.sym_sizes());
  check_index_dtype(indices, "indices");
  check_same_device(weight, "weight", indices, "indices");
}

void check_backward(const Tensor& grad_output, const Tensor& indices) {
  check_index_dtype(indices, "indices");
  TORCH_CHECK(grad_output.dim() == indices.dim() + 1 && grad_output.sizes().slice(0, indices.dim()) == indices.sizes(),
              "grad_output must have the shape of indices and one dimension more, got ", grad_output.sizes(), " and ",
              indices.sizes());
  check_same_device(grad_output, "grad_output", indices, "indices");
}

Tensor meta_forward(const Tensor& weight, const Tensor& indices, int64_t, bool, bool) {
  check(weight, indices);
  c10::SymDimVector shape(indices.sym_sizes().begin(), indices.sym_sizes().end());
  shape.push_back(weight.sym_size(1));
  return at::empty_symint(shape, weight.options());
}

Tensor meta_backward(const Tensor& grad_output, const Tensor& indices, c10::SymInt num_embeddings, int64_t, bool) {
  return at::empty_symint({std::move(num_embeddings), grad_output.sym_size(-1)}, grad_output.options());
}

// ------------------------------------------------------------------------------------------------- implementation

Tensor forward(const Tensor& weight, const Tensor& indices, int64_t, bool, bool) {
  check(weight, indices);
  const Device device(weight);
  const Tensor index = indices.contiguous();
  at::DimVector shape(indices.sizes().begin(), indices.sizes().end());
  shape.push_back(weight.size(1));
  const Tensor output = device.empty(shape, weight.options());

  EmbeddingParams p;
  p.weight = const_data<char>(weight);
  p.element_size = static_cast<int64_t>(weight.element_size());
  p.row_stride = weight.stride(0) * p.element_size;
  p.column_stride = weight.stride(1) * p.element_size;
  p.embedding_dim = weight.size(1);
  p.num_embeddings = weight.size(0);
  p.n_indices = index.numel();
  p.output = mutable_data<char>(output);
  if (device.is_gpu()) {
    p.indices = device.gpu_indices(indices, index, p.num_embeddings, IndexKind::kIndex);
    device.run_on_gpu(device.kernels().embedding_forward, p);
    return output;
  }
  p.indices.data = index.const_data_ptr();
  p.indices.against.type = index_type(indices, index);
  const Blocks blocks(p.n_indices, p.embedding_dim);
  c10::SmallVector<int64_t, 64> first_bad(blocks.count());
  blocks.parallel_for([&](int64_t block, int64_t begin, int64_t end) {
    Launch launch{begin, end};
    device.kernels().embedding_forward(p, launch);
    first_bad[block] = launch.first_bad;
  });
  for (const int64_t position : first_bad) {
    if (position >= 0) raise_out_of_range(indices, position, p.num_embeddings, "index", "embeddings");
  }
  return output;
}

// The gradient on the CPU. The order of its sums depends on the sizes only; they are in Compute<T> and rounded once.
template <class T>
class GradientOnCpu {
  using C = Compute<T>;

 public:
  GradientOnCpu(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
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

  // Small V: each of a fixed number of blocks of indices has a private table; then the tables are added up.
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

  // Large V: a counting sort finds the positions of each index, and one thread sums each row.
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

Tensor backward(const Tensor& grad_output, const Tensor& indices, int64_t num_embeddings, int64_t padding_idx,
                bool scale_grad_by_freq) {
  check_backward(grad_output, indices);
  const Device device(grad_output);
  return with_float_type(grad_output.scalar_type(), "embedding_backward", [&]<class T>() {
    if (!device.is_gpu()) {
      return GradientOnCpu<T>(grad_output, indices, num_embeddings, padding_idx, scale_grad_by_freq)();
    }
    const Tensor grad = at::empty({num_embeddings, grad_output.size(-1)}, grad_output.options());
    sum_by_index_on_gpu<T>(device, {indices, indices.contiguous().view({-1})}, grad_output.contiguous(), padding_idx,
                           scale_grad_by_freq, grad);
    return grad;
  });
}

}  // namespace

template <class T>
void sum_by_index_on_gpu(const Device& device, const GpuIndices& index, const Tensor& rows, int64_t padding_idx,
                         bool scale_grad_by_freq, const Tensor& grad) {
  const int64_t n = index.values.numel(), v = grad.size(0), d = grad.size(1);
  if (n == 0 || v == 0 || d == 0) {
    grad.zero_();
    return;
  }
  EmbeddingGradientParams<T> p;
  p.n_indices = n;
  p.grad_output = const_data<T>(rows);
  p.num_embeddings = v;
  p.embedding_dim = d;
  p.padding_idx = padding_idx;
  p.scale_grad_by_freq = scale_grad_by_freq;
  p.grad = mutable_data<T>(grad);
  const EmbeddingKernels<T>& kernels = device.kernels<T>().embedding;
  p.indices = index.for_kernel(device, index.values, v);
  device.run_on_gpu(kernels.backward, p, kernels.gradient_workspace(p));
}

template void sum_by_index_on_gpu<float>(const Device&, const GpuIndices&, const Tensor&, int64_t, bool, const Tensor&);
template void sum_by_index_on_gpu<double>(const Device&, const GpuIndices&, const Tensor&, int64_t, bool,
                                          const Tensor&);

namespace {

// ------------------------------------------------------------------------------------------------------- autograd

using Forward = Tensor(const Tensor&, const Tensor&, int64_t, bool, bool);
using Backward = Tensor(const Tensor&, const Tensor&, c10::SymInt, int64_t, bool);

struct EmbeddingNode final : KernelNode<EmbeddingNode, 1, c10::SymInt, int64_t, bool, bool> {
  static constexpr const char* kName = "EmbeddingBackward";

  static variable_list gradients(const BackwardCall& call, const c10::SymInt& num_embeddings, int64_t padding_idx,
                                 bool scale_grad_by_freq, bool sparse) {
    const Tensor& grad = call.grads[0];
    const Tensor index = call.saved(0);
    if (sparse) {
      return {at::embedding_backward_symint(grad, index.to(at::kLong), num_embeddings, padding_idx, scale_grad_by_freq,
                                            sparse)};
    }
    if (at::GradMode::is_enabled()) {
      return {differentiable(grad, index.to(at::kLong), num_embeddings, padding_idx, scale_grad_by_freq)};
    }
    static const Op<Backward> op("charlm::_embedding_backward");
    return {op(grad, index, num_embeddings, padding_idx, scale_grad_by_freq)};
  }

  // For double backward: torch's own op. The division by the counts is not left to it, because its derivative omits
  // them.
  static Tensor differentiable(const Tensor& grad_output, const Tensor& index, const c10::SymInt& num_embeddings,
                               int64_t padding_idx, bool scale_grad_by_freq) {
    raise_recorded_index_error(index);
    Tensor grad = grad_output;
    if (scale_grad_by_freq) {
      const Tensor ones = at::ones_like(index, grad.options());
      const Tensor none = at::zeros_symint({num_embeddings}, grad.options());
      const Tensor counts = none.index_add(0, index.flatten(), ones.flatten());
      grad = grad / counts.index({index}).unsqueeze(-1);
    }
    return at::embedding_dense_backward_symint(grad, index, num_embeddings, padding_idx, false);
  }
};

Tensor formula(const Tensor& weight, const Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq, bool sparse) {
  check(weight, indices);
  return at::embedding(weight, indices.to(at::kLong), padding_idx, scale_grad_by_freq, sparse);
}

Tensor autograd(const Tensor& weight, const Tensor& indices, int64_t padding_idx, bool scale_grad_by_freq,
                bool sparse) {
  if (needs_formula(weight) || needs_formula(indices)) {
    return formula(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  }
  const auto below_autograd = [&] {
    static const Op<Forward> op("charlm::embedding");
    at::AutoDispatchBelowADInplaceOrView guard;
    return op(weight, indices, padding_idx, scale_grad_by_freq, sparse);
  };
  if (!at::GradMode::is_enabled() || !weight.requires_grad()) return below_autograd();
  const auto node = make_node<EmbeddingNode>();
  node->set_next_edges(torch::autograd::collect_next_edges(weight));
  Tensor output = below_autograd();
  node->save(indices);
  node->options = {weight.sym_size(0), padding_idx, scale_grad_by_freq, sparse};
  torch::autograd::set_history(output, node);
  return output;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(charlm, m) {
  m.def("embedding(Tensor weight, Tensor indices, int padding_idx, bool scale_grad_by_freq, bool sparse) -> Tensor");
  m.def(
      "_embedding_backward(Tensor grad_output, Tensor indices, SymInt num_embeddings, int padding_idx, "
      "bool scale_grad_by_freq) -> Tensor");
  implement(m, "embedding", &forward);
  implement(m, "_embedding_backward", &backward);
}

TORCH_LIBRARY_IMPL(charlm, Meta, m) {
  m.impl("embedding", &meta_forward);
  m.impl("_embedding_backward", &meta_backward);
}

TORCH_LIBRARY_IMPL(charlm, Autograd, m) {
  m.impl("embedding", &autograd);
  m.impl("_embedding_backward", torch::autograd::autogradNotImplementedFallback());
}

TORCH_LIBRARY_IMPL(charlm, FuncTorchBatched, m) { m.impl("embedding", &formula); }

}  // namespace charlm
